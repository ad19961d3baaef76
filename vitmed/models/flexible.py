"""One network for several patch sizes (FlexiViT, arXiv 2212.08013): kernel and positions are kept at a size of their own and resized
within the program to those of a patch, by constant matrices along each axis that gradients go back through.

Shapes: `*K` pixels of a kernel, `*G` grid of patches, `C` channels, `D` width.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitmed.models import resample

# What is kept is at least what the study's weights have, so that a run starts at each patch size from just what a run of that size alone
# would start from: kernels of 16 pixels, positions of a grid of 14. FlexiViT itself has 32 and 7, and no weights to keep to.
KERNEL, GRID = 16, 14


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Pixels of the kernel and the grid of positions, one entry per axis each."""

    kernel: tuple[int, ...]
    grid: tuple[int, ...]


def kept(grids: list[tuple[int, ...]]) -> Sizes:
    """The sizes at which parameters are kept for patches that make these grids: in the plane GRID or the finest, along depth the finest."""
    finest = tuple(map(max, *grids))
    plane = tuple(max(size, GRID) for size in finest[-2:])
    return Sizes(kernel=(KERNEL,) * len(finest), grid=(*finest[:-2], *plane))


def resized(params: Any, *, kept: Sizes, to: Sizes) -> Any:
    """A ViT's parameters at other sizes: the kernel by PI-resize, positions bicubically, all other arrays the same ones.

    Rows of the position table before those of the grid are the prefix tokens' and stay as they are.
    """
    kernel, table = params["patch_embed"]["kernel"], params["pos_embed"]
    width = kernel.shape[-1]
    channels = kernel.shape[0] // math.prod(kept.kernel)
    kernel = _along_axes(kernel.reshape(*kept.kernel, channels, width), to.kernel, resample.kernel_matrix)
    prefix = table.shape[0] - math.prod(kept.grid)
    patches = _along_axes(table[prefix:].reshape(*kept.grid, width), to.grid, resample.resize_matrix)
    table = jnp.concatenate([table[:prefix], patches.reshape(-1, width)])
    return {**params, "patch_embed": {**params["patch_embed"], "kernel": kernel.reshape(-1, width)}, "pos_embed": table}


def _along_axes(array: jax.Array, sizes: tuple[int, ...], matrix: Callable[[int, int], np.ndarray]) -> jax.Array:
    """The first axes of an array brought to these sizes."""
    for axis, new in enumerate(sizes):
        if array.shape[axis] != new:
            by = jnp.asarray(matrix(array.shape[axis], new), jnp.float32)
            array = jnp.moveaxis(jnp.tensordot(by, array, axes=(1, axis), precision=jax.lax.Precision.HIGHEST), 0, axis)
    return array


def applying(apply: Callable[..., Any], *, kept: Sizes, to: Sizes) -> Callable[..., Any]:
    """A ViT's `apply` for parameters at the sizes that are `kept`."""
    return lambda variables, *inputs, **how: apply({"params": resized(variables["params"], kept=kept, to=to)}, *inputs, **how)
