"""What a ViT on an image costs, by arithmetic: patches, tokens, parameters, multiply-accumulates, bytes of a training step.

Plain numbers in and out, so that a wrong patch or a model that does not fit is refused before anything is built.
`N` tokens, `D` width, `M` width of the MLP, `H` heads; sizes are tuples, one entry per axis (H,W or D,H,W).
"""

import math

from vitmed import config

AXES = {2: ("height", "width"), 3: ("depth", "height", "width")}
BYTES_OF_A_PARAMETER = 4  # parameters, gradients and moments stay float32 whatever the activations are


def divisors(n: int) -> list[int]:
    """Return the divisors of n in ascending order: the patch sizes that cut an axis of n pixels evenly."""
    return [d for d in range(1, n + 1) if n % d == 0]


def grid(image_size: tuple[int, ...], patch_size: tuple[int, ...], kernel_size: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Return the number of tokens along each axis; InputError (with the allowed sizes) where the patch does not divide.

    `kernel_size` are the pixels that a token is computed from, the patch's unless given. Along an axis where they are not the patch's, the
    patch is the kernel's stride and need not divide: as many tokens as kernels that lie wholly within the image.
    """
    image_size, patch_size = tuple(image_size), tuple(patch_size)
    kernel_size = patch_size if kernel_size is None else tuple(kernel_size)
    for what, size in (("patch_size", patch_size), ("kernel_size", kernel_size)):
        if len(image_size) != len(size) or not image_size:
            raise config.InputError(
                f"{what} {size} has {len(size)} entries and image_size {image_size} has {len(image_size)}; give one per axis"
            )
    for axis, (length, patch, kernel) in enumerate(zip(image_size, patch_size, kernel_size, strict=True)):
        name = AXES.get(len(image_size), range(len(image_size)))[axis]
        if length < 1:
            raise config.InputError(f"image_size {image_size} must be at least 1 along every axis")
        if kernel != patch and (patch < 1 or not 1 <= kernel <= length):
            raise config.InputError(
                f"kernel_size {kernel_size} at every {patch_size} pixels does not fit axis {name} of image_size {image_size}; "
                f"the kernel must be from 1 to {length} there, the patch positive"
            )
        if kernel == patch and (patch < 1 or length % patch):
            allowed = ", ".join(map(str, divisors(length)))
            raise config.InputError(
                f"patch_size {patch_size}: {patch} does not divide the {length} pixels of axis {name} of image_size {image_size}; "
                f"allowed there: {allowed}"
            )
    return tuple((length - kernel) // patch + 1 for length, patch, kernel in zip(image_size, patch_size, kernel_size, strict=True))


def num_patches(image_size: tuple[int, ...], patch_size: tuple[int, ...], kernel_size: tuple[int, ...] | None = None) -> int:
    """Return the number of patches of an image; InputError as of `grid`."""
    return math.prod(grid(image_size, patch_size, kernel_size))


def num_tokens(
    image_size: tuple[int, ...],
    patch_size: tuple[int, ...],
    *,
    kernel_size: tuple[int, ...] | None = None,
    num_prefix_tokens: int = 1,
) -> int:
    """Return patches plus prefix tokens (CLS and registers); InputError as of `grid`."""
    return num_patches(image_size, patch_size, kernel_size) + num_prefix_tokens


def num_params(
    *,
    image_size: tuple[int, ...],
    patch_size: tuple[int, ...],
    in_channels: int,
    width: int,
    depth: int,
    mlp_width: int,
    num_classes: int,
    kernel_size: tuple[int, ...] | None = None,
    num_prefix_tokens: int = 1,
    swiglu: bool = False,
) -> int:
    """Return the parameters of one ViT (one seed): patch embedding, prefix tokens, positions of all tokens, blocks, norm, head.

    Equals timm's count for a model with a learned position for every token; num_classes 0 is a model without a head. Layer scale and
    attention pooling are not counted.
    """
    tokens = num_tokens(image_size, patch_size, kernel_size=kernel_size, num_prefix_tokens=num_prefix_tokens)
    embedding = (math.prod(kernel_size or patch_size) * in_channels + 1) * width
    attention = (width + 1) * 3 * width + (width + 1) * width
    mlp = (width + 1) * mlp_width * (1 + swiglu) + (mlp_width + 1) * width
    norm = 2 * width
    head = (width + 1) * num_classes
    return embedding + (num_prefix_tokens + tokens) * width + depth * (2 * norm + attention + mlp) + norm + head


def gmacs_forward(
    *,
    image_size: tuple[int, ...],
    patch_size: tuple[int, ...],
    in_channels: int,
    width: int,
    depth: int,
    mlp_width: int,
    num_classes: int,
    kernel_size: tuple[int, ...] | None = None,
    num_prefix_tokens: int = 1,
    swiglu: bool = False,
    attention_pool: bool = False,
) -> float:
    """Return 1e9 multiply-accumulates of one image's forward pass: patch embedding, blocks, pool and head; norms and biases are free.

    A block costs N (4 D^2 + 2 D M) in its linear layers, with SwiGLU N (4 D^2 + 3 D M), and 2 N^2 D in attention (scores and weighted
    sum). An attention pool costs keys and values of the patches, one query's attention to them, and one token's MLP.
    """
    patches = num_patches(image_size, patch_size, kernel_size)
    tokens = patches + num_prefix_tokens
    embedding = patches * math.prod(kernel_size or patch_size) * in_channels * width
    linear = tokens * (4 * width**2 + (2 + swiglu) * width * mlp_width)
    attention = 2 * tokens**2 * width
    pool = patches * (2 * width**2 + 2 * width) + 2 * width**2 + 2 * width * mlp_width if attention_pool else 0
    return (embedding + depth * (linear + attention) + pool + width * num_classes) / 1e9


def activations_per_example(
    *,
    image_size: tuple[int, ...],
    patch_size: tuple[int, ...],
    in_channels: int,
    width: int,
    depth: int,
    mlp_width: int,
    num_heads: int,
    kernel_size: tuple[int, ...] | None = None,
    num_prefix_tokens: int = 1,
    keeps_attention: bool = True,
) -> int:
    """Return how many numbers of one example a backward pass needs kept, nothing being recomputed.

    Per block: 8 N D (input of the block, output of its first norm, q, k, v, attention output, input and output of the second
    norm), 2 N M (the MLP before and after GELU) and the attention weights H N^2, unless attention recomputes them
    (keeps_attention=False). Around the blocks: the normalised image and the input and output of the last norm.
    """
    tokens = num_tokens(image_size, patch_size, kernel_size=kernel_size, num_prefix_tokens=num_prefix_tokens)
    weights = num_heads * tokens**2 if keeps_attention else 0
    block = 8 * tokens * width + 2 * tokens * mlp_width + weights
    return math.prod(image_size) * in_channels + depth * block + 2 * tokens * width


def training_memory(
    *,
    image_size: tuple[int, ...],
    patch_size: tuple[int, ...],
    in_channels: int,
    width: int,
    depth: int,
    mlp_width: int,
    num_heads: int,
    num_classes: int,
    batch_size: int,
    num_runs: int = 1,
    runs_at_once: int | None = None,
    bytes_per_activation: int = 4,
    kernel_size: tuple[int, ...] | None = None,
    num_prefix_tokens: int = 1,
    keeps_attention: bool = True,
) -> int:
    """Estimate the bytes of one training step of all runs: five copies of the parameters each, and the activations.

    The copies are parameters, two Adam moments and the best parameters (kept for every run) and the gradients; gradients and
    activations exist for the `runs_at_once` (all by default; 1 where runs follow each other). A lower bound: the data set and the
    compiler's temporaries come on top (XLA on CPU took 1.7 to 2.3 times these activations for ViT-Ti at p 4 to 1).
    """
    shape = {"image_size": image_size, "patch_size": patch_size, "in_channels": in_channels, "width": width, "depth": depth}
    shape |= {"mlp_width": mlp_width, "kernel_size": kernel_size, "num_prefix_tokens": num_prefix_tokens}
    params = num_params(**shape, num_classes=num_classes)
    activations = activations_per_example(**shape, num_heads=num_heads, keeps_attention=keeps_attention)
    parallel = num_runs if runs_at_once is None else min(runs_at_once, num_runs)
    state = 4 * params * num_runs * BYTES_OF_A_PARAMETER
    return state + parallel * (params * BYTES_OF_A_PARAMETER + batch_size * activations * bytes_per_activation)
