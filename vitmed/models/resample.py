"""Patch kernels and position tables at any size and rank, in numpy float64: what lets one set of weights serve every patch size.

Shapes: `*P` pixels of a patch, `*G` grid of patches (h, w or d, h, w), `C` channels, `D` width. Every resize is separable: the resize
matrix of an image is the Kronecker product of its axes' matrices, and so is its pseudo-inverse, hence axes are resized one by one.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from vitmed import config, cost

INFLATIONS = ("average", "center")
POSITION_RESIZES = ("bicubic", "cut")
DEPTH_POSITIONS = ("copy", "sincos")
CUBIC_A = -0.5  # Keys' cubic as Pillow, and PyTorch where it antialiases, take it (without antialiasing PyTorch takes -.75)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel (1981), which is zero from distance 2 on."""
    x, a = np.abs(x), CUBIC_A
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@functools.lru_cache(maxsize=64)
def resize_matrix(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] that resizes a line of `old` pixels bicubically, antialiased, as Pillow and PyTorch do.

    Pixels are areas (align_corners=False); where the line shrinks the kernel widens by the same factor; rows sum to 1.
    """
    if old == new:
        return np.eye(old)
    scale = old / new
    stretch = max(scale, 1.0)
    centers = (np.arange(new) + 0.5) * scale
    # Both cut the kernel's support at whole pixels, which drops a little of its tails.
    first = np.maximum((centers - 2 * stretch + 0.5).astype(int), 0)[:, None]
    last = np.minimum((centers + 2 * stretch + 0.5).astype(int), old)[:, None]
    pixels = np.arange(old)[None]
    weights = _cubic((pixels + 0.5 - centers[:, None]) / stretch) * ((pixels >= first) & (pixels < last))
    matrix = weights / weights.sum(axis=1, keepdims=True)
    matrix.flags.writeable = False  # it is cached
    return matrix


@functools.lru_cache(maxsize=64)
def linear_matrix(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] that resizes a line linearly, not antialiased, as PyTorch's interpolate does (align_corners=False)."""
    places = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    matrix = np.maximum(0.0, 1 - np.abs(places[:, None] - np.arange(old)))
    matrix.flags.writeable = False
    return matrix


@functools.lru_cache(maxsize=64)
def kernel_matrix(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] of `resize_kernel` along one axis: the pseudo-inverse of the pixels' resize, transposed."""
    matrix = np.linalg.pinv(resize_matrix(old, new)).T
    matrix.flags.writeable = False
    return matrix


def _along(matrix: np.ndarray, array: np.ndarray, axis: int) -> np.ndarray:
    """matrix [new, old] applied to one axis of an array."""
    return np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis)


def resize_kernel(kernel: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A patch kernel [*P, C, D] for patches of another size, by the pseudo-inverse resize (PI-resize of FlexiViT, arXiv 2212.08013).

    The new kernel gives on resized patches, as nearly as least squares allow, what the old one gave on the patches themselves.
    """
    for axis, new in enumerate(size):
        if kernel.shape[axis] != new:
            kernel = _along(kernel_matrix(kernel.shape[axis], new), kernel, axis)
    return kernel


def resize_positions(table: np.ndarray, grid: tuple[int, ...], *, matrix: Callable[[int, int], np.ndarray] = resize_matrix) -> np.ndarray:
    """A position table [*G, D] for another grid, along every axis by `matrix`: bicubically and antialiased unless told otherwise."""
    for axis, new in enumerate(grid):
        if table.shape[axis] != new:
            table = _along(matrix(table.shape[axis], new), table, axis)
    return table


def uncut_grid(image_size: tuple[int, ...], patch_size: tuple[int, ...], kernel_size: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The grid of as many whole patches as fit, whose first positions `cut` takes; InputError where there are more tokens than that."""
    tokens = cost.num_patches(image_size, patch_size, kernel_size)
    grid = tuple(size // patch for size, patch in zip(image_size, patch_size, strict=True))
    if math.prod(grid) < tokens:
        raise config.InputError(
            f"position_resize=cut: {tokens} tokens, but patches of {patch_size} make only {math.prod(grid)} positions on {image_size}; "
            "take bicubic, or a patch that divides the image"
        )
    return grid


def inflate_kernel(kernel: np.ndarray, depth: int, inflation: str) -> np.ndarray:
    """A 2D kernel [h, w, C, D] -> [depth, h, w, C, D].

    `average` repeats it along depth and divides by depth: on a volume of equal slices it answers as the 2D kernel does (I3D, arXiv
    1705.07750). `center` is zero but for the middle slice, depth // 2 (ViViT's central frame, arXiv 2103.15691).
    """
    config.one_of("inflation", inflation, INFLATIONS)
    if inflation == "average":
        return np.broadcast_to(kernel / depth, (depth, *kernel.shape))
    inflated = np.zeros((depth, *kernel.shape), kernel.dtype)
    inflated[depth // 2] = kernel
    return inflated


def inflate_positions(table: np.ndarray, depth: int, depth_positions: str) -> np.ndarray:
    """A 2D table [h, w, D] -> [depth, h, w, D]: a `copy` for every depth, or with a `sincos` code of the depth added.

    The code is scaled to the root mean square of the table about its mean, so that depth weighs as much as the place in the plane.
    """
    config.one_of("depth_positions", depth_positions, DEPTH_POSITIONS)
    inflated = np.broadcast_to(table, (depth, *table.shape))
    if depth_positions == "copy":
        return inflated
    spread = float(np.sqrt(np.mean((table - table.mean(axis=(0, 1))) ** 2)))
    # A table of one position has no spread of its own; timm's initial one is .02.
    amplitude = math.sqrt(2) * (spread or 0.02)
    return inflated + amplitude * depth_sincos(depth, table.shape[-1])[:, None, None, :]


def depth_sincos(depth: int, width: int) -> np.ndarray:
    """Sines, then cosines of the index 0 .. depth - 1, [depth, width], of wavelengths 2 pi to 2e4 pi (arXiv 1706.03762)."""
    half = (width + 1) // 2
    angles = np.arange(depth)[:, None] / 10_000 ** (np.arange(half) / half)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width]


def flatten_kernel(kernel: np.ndarray) -> np.ndarray:
    """A 3D kernel [d, h, w, C, D] -> [h, w, C, D], its sum over depth: the answer to a volume of equal slices; undoes inflation."""
    return kernel.sum(axis=0)


def flatten_positions(table: np.ndarray) -> np.ndarray:
    """A 3D table [d, h, w, D] -> [h, w, D], its mean over depth; undoes `copy`."""
    return table.mean(axis=0)


def adapt_channels(kernel: np.ndarray, in_channels: int) -> np.ndarray:
    """A kernel [*P, C, D] for another number of channels, so that a gray image copied to all of them is answered as before.

    One channel gets the sum over the old ones, several get equal shares of a single old one; InputError for other changes.
    """
    channels = kernel.shape[-2]
    if in_channels == channels:
        return kernel
    if in_channels == 1:
        return kernel.sum(axis=-2, keepdims=True)
    if channels == 1:
        return np.repeat(kernel / in_channels, in_channels, axis=-2)
    raise config.InputError(f"in_channels={in_channels}: the weights are for {channels} channels; give {channels} or 1")


def kernel(weights: np.ndarray, *, patch_size: tuple[int, ...], in_channels: int, inflation: str) -> np.ndarray:
    """Any kernel [*P, C, D], 2D or 3D, as the flat float32 [P * C, D] of a model of any patch size, rank and number of channels."""
    weights = adapt_channels(weights.astype(np.float64), in_channels)
    old_rank, rank = weights.ndim - 2, len(patch_size)
    if old_rank > rank:
        weights = flatten_kernel(weights)
    weights = resize_kernel(weights, patch_size[-2:] if old_rank < rank else patch_size)
    weights = weights.astype(np.float32)  # before it grows by the depth
    if old_rank < rank:
        weights = inflate_kernel(weights, patch_size[0], inflation)
    return weights.reshape(-1, weights.shape[-1])


def positions(table: np.ndarray, *, grid: tuple[int, ...], depth_positions: str, position_resize: str = "bicubic") -> np.ndarray:
    """Any table [*G, D], 2D or 3D, as the flat float32 [N, D] of any grid.

    `bicubic` is antialiased; `cut` is how the study's released code resizes: linearly, not antialiased, to the grid of whole patches
    (`uncut_grid`), of which a model with fewer tokens then takes the first rows, wherever in the image its tokens are.
    """
    config.one_of("position_resize", position_resize, POSITION_RESIZES)
    matrix = linear_matrix if position_resize == "cut" else resize_matrix
    table = table.astype(np.float64)
    old_rank, rank = table.ndim - 1, len(grid)
    if old_rank > rank:
        table = flatten_positions(table)
    table = resize_positions(table, grid[-2:] if old_rank < rank else grid, matrix=matrix)
    if old_rank < rank:
        table = inflate_positions(table, grid[0], depth_positions)
    return table.astype(np.float32).reshape(-1, table.shape[-1])
