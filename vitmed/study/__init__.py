"""What is done with many runs; no jax."""
