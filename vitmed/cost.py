"""What a ViT on an image costs, by arithmetic: patches, tokens, parameters, multiply-accumulates, bytes and seconds of a training step.

Plain numbers in and out, so that a wrong patch or a model that does not fit is refused before anything is built.
`N` tokens, `D` width, `M` width of the MLP, `H` heads; sizes are tuples, one entry per axis (H,W or D,H,W).
"""

import math
from typing import NamedTuple

from vitmed import config

AXES = {2: ("height", "width"), 3: ("depth", "height", "width")}
# Parameters, gradients, moments and the softmax of attention stay float32 whatever the activations are.
BYTES_OF_A_PARAMETER = BYTES_OF_A_SCORE = 4
GMACS_PER_SECOND, PARAMETER_BYTES_PER_SECOND = 50.0, 5e9  # of two slow cores


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
    blocks = depth * block_params(width, mlp_width, swiglu=swiglu)
    head = (width + 1) * num_classes
    return embedding + (num_prefix_tokens + tokens) * width + blocks + 2 * width + head


def block_params(width: int, mlp_width: int, *, swiglu: bool = False) -> int:
    """Return the parameters of one block: two norms, attention, MLP."""
    attention = (width + 1) * 3 * width + (width + 1) * width
    mlp = (width + 1) * mlp_width * (1 + swiglu) + (mlp_width + 1) * width
    return 2 * 2 * width + attention + mlp


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
    pooling: str = "cls",
    num_pooled_tokens: int | None = None,
) -> float:
    """Return 1e9 multiply-accumulates of one image's forward pass: patch embedding, blocks, pool and head; norms and biases are free.

    A block costs N (4 D^2 + 2 D M) in its linear layers, with SwiGLU N (4 D^2 + 3 D M), and 2 N^2 D in attention (scores and weighted
    sum). Every block is counted over all tokens, as the costs of ViTs are; with `num_pooled_tokens`, how many first tokens the classifier
    looks at, the last block counts with what they need of it alone, which is what `vit.ViT` computes. A `pooling` by
    attention, `map` or `attention`, costs keys and values of the patches, one query's attention to them, and with `map` one token's MLP.
    """
    patches = num_patches(image_size, patch_size, kernel_size)
    tokens = patches + num_prefix_tokens
    embedding = patches * math.prod(kernel_size or patch_size) * in_channels * width
    linear = tokens * (4 * width**2 + (2 + swiglu) * width * mlp_width)
    attention = 2 * tokens**2 * width
    idle = 0 if num_pooled_tokens is None else tokens - num_pooled_tokens  # tokens that are keys and values alone in the last block
    left_out = idle * (width**2 + (2 + swiglu) * width * mlp_width + 2 * tokens * width)
    pool = 0
    if pooling in ("map", "attention"):
        pool = patches * (2 * width**2 + 2 * width) + 2 * width**2 + (2 * width * mlp_width if pooling == "map" else 0)
    return (embedding + depth * (linear + attention) - left_out + pool + width * num_classes) / 1e9


class Activations(NamedTuple):
    """Numbers that a backward pass needs kept: attention's weights, where it keeps them, and everything else.

    `copies` are kept besides, though nothing needs them: queries, keys, values and output in the order of blockwise attention's loops.
    """

    linear: int
    attention_weights: int
    copies: int = 0


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
    swiglu: bool = False,
    remat: str = "none",
    attention: str = "plain",
) -> Activations:
    """Return how many numbers of one example a backward pass needs kept, by what it computes again (`remat`) and the form of attention.

    Per block: 8 N D (input of the block, output of its first norm, q, k, v, attention output, input and output of the second
    norm), 2 N M (the MLP before and after GELU, 3 N M of SwiGLU), of plain attention the weights H N^2, and 4 N D copies of blockwise. With
    remat=attention one block's weights are there at a time, with remat=blocks one block's everything, besides the input of each.
    Around the blocks: the normalised image and the input and output of the last norm.
    """
    tokens = num_tokens(image_size, patch_size, kernel_size=kernel_size, num_prefix_tokens=num_prefix_tokens)
    weights = num_heads * tokens**2 if attention == "plain" else 0
    copies = 4 * tokens * width if attention == "blockwise" else 0
    inside = 8 * tokens * width + (2 + swiglu) * tokens * mlp_width
    blocks = inside + depth * tokens * width if remat == "blocks" else depth * inside
    return Activations(
        linear=math.prod(image_size) * in_channels + blocks + 2 * tokens * width,
        attention_weights=depth * weights if remat == "none" else weights,
        copies=copies if remat == "blocks" else depth * copies,
    )


class Memory(NamedTuple):
    """Bytes: what a run cannot do without, and what it is likely to take."""

    least: int
    likely: int


def training_memory(
    *,
    num_params: int,
    activations: Activations,
    block_attention_weights: int,
    num_tokens: int,
    width: int,
    batch_size: int,
    eval_batch_size: int,
    num_runs: int = 1,
    mapped: bool = False,
    scanned: bool = False,
    averaged: bool = False,
    bytes_per_activation: int = 4,
    split_bytes: int = 0,
    waiting_bytes: int = 0,
) -> Memory:
    """Return the bytes that all runs take on one device; `mapped` runs follow each other, others are computed at once.

    `activations` are those of one example, `block_attention_weights` one block's as a prediction holds them, none where attention keeps
    none. `split_bytes` is the training split, where it lives on the device; where a batch goes through the model in parts
    of `batch_size`, `waiting_bytes` are those of all of it and of the gradients summed so far. A state that is `averaged` holds one more
    copy of the parameters.

    The least: parameters, two Adam moments and the best parameters of every run, and for the runs computed at once either the gradients
    or, where these are more, what the backward pass needs. The likely is fitted to what XLA 0.10 says of the compiled step on a CPU
    (memory_analysis): 1.4 times the activations and 1.2 times the attention weights, or the gradients where these are more; `lax.map` over
    several runs copies their state once more, and one run's. A model whose blocks are `scanned` takes 1.3 times the activations and holds
    parameters and gradients once more, stacked. A prediction takes 14 numbers for each of a token's channels, and a block's attention
    weights twice (measured by the process's size: XLA does not count them). On 35 programs (vit_ti, vit_s and vit_b, p 28 to 1 in 2D and 7
    to 2 in 3D, one and three runs, both ways, each `remat`, one lane and two) it was from 8 % too low to 20 % too high, before
    2026-11-30, when programs came to keep less; none had SwiGLU, slices or bfloat16.
    """
    params, at_once = num_params * BYTES_OF_A_PARAMETER, 1 if mapped else num_runs
    state = (4 + averaged) * params * num_runs + split_bytes
    kept = batch_size * (activations.linear + activations.attention_weights) * bytes_per_activation
    backward = batch_size * backward_memory(activations, bytes_per_activation, scanned=scanned)
    step = max(params, backward + (2 * params if scanned else 0))
    copies = (3 + averaged) * params * (num_runs + 1) if mapped and num_runs > 1 else 0
    prediction = eval_batch_size * prediction_memory(num_tokens, width, block_attention_weights, bytes_per_activation)
    likely = state + int(max(copies + at_once * (step + waiting_bytes), at_once * prediction))
    return Memory(least=state + at_once * max(params, kept), likely=likely)


def backward_memory(activations: Activations, bytes_per_activation: int = 4, *, scanned: bool = False) -> float:
    """Return the bytes that one image's forward and backward pass is likely to take, as `training_memory` says."""
    of_linear = (1.3 if scanned else 1.4) * (activations.linear + activations.copies) * bytes_per_activation
    return of_linear + 1.2 * activations.attention_weights * BYTES_OF_A_SCORE


def prediction_memory(num_tokens: int, width: int, block_attention_weights: int, bytes_per_activation: int = 4) -> int:
    """Return the bytes that one image is likely to take in a prediction, as `training_memory` says."""
    return 14 * num_tokens * width * bytes_per_activation + 2 * block_attention_weights * BYTES_OF_A_SCORE


def step_seconds(*, gmacs_forward: float, num_params: int, batch_size: int, num_runs: int, passes: float = 3.0) -> float:
    """Return roughly what a training step of all runs takes on two slow cores: for proportions between runs, not for promises.

    `passes` are forward passes that forward and backward pass together cost; `num_params` are those that are trained.
    """
    arithmetic = passes * gmacs_forward * batch_size * num_runs / GMACS_PER_SECOND
    # An AdamW step reads and writes about eight arrays of the parameters' size.
    memory = 8 * BYTES_OF_A_PARAMETER * num_params * num_runs / PARAMETER_BYTES_PER_SECOND
    return arithmetic + memory


# --- many devices ---------------------------------------------------------------------------------------------------------------


def attention_gmacs(*, num_tokens: int, width: int, depth: int, num_pooled_tokens: int | None = None) -> float:
    """Return the part of `gmacs_forward` that is attention itself, 2 N^2 D a block; in the last one only for the pooled tokens' queries."""
    queries = depth * num_tokens - (0 if num_pooled_tokens is None else num_tokens - num_pooled_tokens)
    return 2 * queries * num_tokens * width / 1e9


def training_gmacs(*, linear: float, attention: float, remat: str = "none", keeps_weights: bool = True) -> float:
    """Return 1e9 multiply-accumulates of one example's forward and backward pass, from those forward in linear layers and in attention.

    The backward pass has two products for each of the forward one's. Attention that keeps no weights computes its scores, half of its
    forward pass, again (arXiv 2205.14135); `remat` computes attention or the whole blocks once more besides.
    """
    again = {"none": (0, 0), "attention": (0, 1), "blocks": (1, 1)}[remat]
    return (3 + again[0]) * linear + (3 + again[1] + (0 if keeps_weights else 0.5)) * attention
