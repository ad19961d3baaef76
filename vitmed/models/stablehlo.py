"""The whole way from stored bytes to probabilities as one file: StableHLO by `jax.export`, weights and preprocessing within.

The weights are constants of the program, not arguments: the file is then complete, nothing has to be named or turned to be fed to it, and
what was compared with the run cannot be given other weights. `b` batch (a symbol), `*S` spatial, `C` channels, `K` classes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from vitmed import config
from vitmed.models import attention, vit

PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST = 2**31 - 2**24  # bytes of weights: the form of the file (FlatBuffers) ends at 2 GiB
BLOCK = attention.SMALLEST_BLOCK


def attend(num_tokens: int) -> attention.Attention:
    """Attention that lowers for every platform, which cuDNN's does not; where tokens are many, of memory that grows with their number.

    How many queries a block has is fixed, since the batch that it usually follows from is not known.
    """
    return functools.partial(attention.blockwise, block=BLOCK) if num_tokens >= attention.LONG["cpu"] else attention.plain


def program(
    module: vit.ViT,
    params: Any,
    *,
    prepare: Callable[[jax.Array], jax.Array],
    probabilities: Callable[[jax.Array], jax.Array],
    inverted: bool,
) -> Callable[[jax.Array], jax.Array]:
    """Images uint8 [b, *S, C] as the set stores them -> probabilities float32 [b, K].

    `inverted`: the network was trained on (256 - x) mod 256, which otherwise happens as the set is read.
    """

    @jax.jit
    def probabilities_of(images: jax.Array) -> jax.Array:
        stored = jnp.negative(images) if inverted else images
        return probabilities(module.apply({"params": params}, prepare(stored))).astype(jnp.float32)

    return probabilities_of


def pack(function: Callable[[jax.Array], jax.Array], *, image_size: tuple[int, ...], num_channels: int) -> bytes:
    """The file of a program on images uint8 [b, *image_size, num_channels], for any b and all PLATFORMS; InputError if it is too large."""
    shape = jax.export.symbolic_shape(", ".join(["b", *map(str, image_size), str(num_channels)]))
    exported = jax.export.export(function, platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.uint8))
    return bytes(exported.serialize())


def require_size(num_params: int) -> None:
    """InputError where a network of as many float32 parameters does not go into a file."""
    if 4 * num_params > LARGEST:
        raise config.InputError(
            f"--format=stablehlo: {num_params:,} parameters are more than a file of it can hold ({LARGEST // 4:,}); take safetensors"
        )


def unpack(data: bytes) -> Callable[[np.ndarray], jax.Array]:
    """The program of a file, from its bytes alone."""
    return jax.export.deserialize(bytearray(data)).call
