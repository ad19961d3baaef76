"""Vision Transformers on 2D and 3D medical images, fine-tuned in JAX at any patch size."""

__version__ = "0.1.0"
