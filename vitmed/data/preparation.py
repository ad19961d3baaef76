"""From an image as it was stored to the uint8 array that a network is trained on: window, resampling, shape; the same for prediction.

Shapes: `*S` H,W or D,H,W, `C` channels (1 or 3).
"""

import dataclasses
import math
import pathlib
import re

import numpy as np
from scipy import ndimage

from vitmed import config
from vitmed.data import stored, volumes

# Hounsfield units, (lowest, highest) as radiologists set them: level - width / 2 to level + width / 2.
CT_WINDOWS = {
    "lung": (-1350.0, 150.0),
    "mediastinum": (-160.0, 240.0),
    "abdomen": (-160.0, 240.0),
    "liver": (-45.0, 105.0),
    "bone": (-450.0, 1050.0),
    "brain": (0.0, 80.0),
    "subdural": (-20.0, 180.0),
}
WINDOWS = ("auto", "none", "minmax", "percentile", "zscore", *CT_WINDOWS)
PERCENTILES = (0.5, 99.5)
DEVIATIONS = 3.0  # of zscore, either way
NUMBER = r"(-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
BOUNDS = re.compile(f"{NUMBER}:{NUMBER}")


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What becomes of a file: `size` is *S of the outcome, one entry per axis or one for all, 0 for the image's own.

    With `spacing` (mm, likewise; 0: none) the image is resampled to it and then cut or filled up to `size` around its middle; without, all
    of it is resampled to `size`. `window`: one of WINDOWS, or LOW:HIGH in the file's own units.
    """

    rank: int
    num_channels: int
    size: tuple[int, ...] = (0,)
    spacing: tuple[float, ...] = (0.0,)
    window: str = "auto"

    def per_axis(self, numbers: tuple) -> tuple:
        """One entry per axis."""
        return numbers * self.rank if len(numbers) == 1 else numbers


def check_window(window: str) -> None:
    """InputError unless it is a window's name or LOW:HIGH."""
    if bounds := BOUNDS.fullmatch(window):
        low, high = map(float, bounds.groups())
        config.require(math.isfinite(low) and low < high < math.inf, "data.window", window, "LOW:HIGH with LOW below HIGH")
    elif window not in WINDOWS:
        raise config.InputError(f"data.window={window}: unknown; {config.nearest(window, WINDOWS)}, or LOW:HIGH such as -160:240")


def prepare(path: pathlib.Path, how: Preparation) -> np.ndarray:
    """uint8 [*S, C] of a file or DICOM folder; InputError that names it where it cannot be read or does not fit."""
    return finished(volumes.read(path, how.rank), how, path)


def finished(image: stored.Image, how: Preparation, path: pathlib.Path) -> np.ndarray:
    """uint8 [*S, C] of an image that was read from `path`."""
    values = in_channels(image.values, how.num_channels, path)
    if how.window in ("auto", "none") and values.dtype == np.uint8:
        scaled = values if target(image, how, path) == image.size and not any(how.spacing) else values.astype(np.float32) / 255
    else:
        scaled = windowed(values, how.window, path)
    if scaled.dtype == np.uint8:
        return scaled
    return np.rint(np.clip(fitted(scaled, image, how, path), 0, 1) * 255).astype(np.uint8)


def mask(path: pathlib.Path, image: stored.Image, how: Preparation) -> tuple[np.ndarray, bool]:
    """(bool [*S], whether anything is drawn): the mask in a file that belongs to an image, what is more than half of a voxel inside.

    InputError where it has another shape than the image, or lies elsewhere.
    """
    drawn = volumes.read(path, how.rank)
    if drawn.size != image.size:
        raise stored.Unreadable(f"{path}: a mask of {list(drawn.size)} for an image of {list(image.size)}; they must have one shape")
    placed = [one.affine for one in (drawn, image)]
    if (placed[0] is None) != (placed[1] is None):
        raise stored.Unreadable(f"{path}: of mask and image only one says where it lies, so that they may not lie alike; save both alike")
    if placed[0] is not None and np.abs(placed[0] - placed[1]).max() > 0.1 * min(image.spacing):
        raise stored.Unreadable(f"{path}: the mask does not lie where the image does; they must have one affine")
    inside = (drawn.values != 0).any(axis=-1, keepdims=True).astype(np.float32)
    return fitted(inside, image, how, path)[..., 0] > 0.5, bool(inside.any())


def in_channels(values: np.ndarray, num_channels: int, path: pathlib.Path) -> np.ndarray:
    """[*S, C]: gray copied to three channels; colours that are gray become one. Unreadable where colours would be lost."""
    if values.shape[-1] == num_channels:
        return values
    if num_channels == 3:
        return np.repeat(values, 3, axis=-1)
    if (values == values[..., :1]).all():
        return values[..., :1]
    raise stored.Unreadable(f"{path}: a colour image, and this model takes gray ones; convert it")


def windowed(values: np.ndarray, window: str, path: pathlib.Path) -> np.ndarray:
    """float32 [*S, C] from 0 to 1: the window's lowest value to its highest, what lies outside cut off."""
    if window == "none":
        raise stored.Unreadable(f"{path}: {values.dtype} values and data.window=none, which takes 8-bit images as they are; name a window")
    values = values.astype(np.float32)
    if window in ("auto", "percentile"):
        low, high = np.percentile(values, PERCENTILES)
    elif window == "minmax":
        low, high = values.min(), values.max()
    elif window == "zscore":
        mean, deviation = values.mean(dtype=np.float64), values.std(dtype=np.float64)
        low, high = mean - DEVIATIONS * deviation, mean + DEVIATIONS * deviation
    else:
        low, high = CT_WINDOWS.get(window) or map(float, BOUNDS.fullmatch(window).groups())
    if high <= low:  # one value everywhere, or nearly
        return np.zeros_like(values)
    return np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)


def target(image: stored.Image, how: Preparation, path: pathlib.Path) -> tuple[int, ...]:
    """*S that the whole image is resampled to."""
    size, spacing = how.per_axis(how.size), how.per_axis(how.spacing)
    if not any(spacing):
        return tuple(wanted or own for wanted, own in zip(size, image.size, strict=True))
    if image.spacing is None:
        raise stored.Unreadable(f"{path}: it does not say its spacing, and data.spacing={spacing} needs it; set data.spacing to 0")
    steps = zip(image.size, image.spacing, spacing, strict=True)
    resampled = tuple(max(1, round(own * step / wanted)) if wanted else own for own, step, wanted in steps)
    if math.prod(resampled) > stored.MOST_VALUES:
        raise stored.Unreadable(f"{path}: at the spacing {spacing} it has {list(resampled)} voxels, which is too many")
    return resampled


def resized(values: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """float32 [*S, C] -> [*size, C], linear; axes that shrink by a factor f are first blurred with deviation (f - 1) / 2 against aliasing.

    The corners of the outer pixels stay where they are. The same as skimage.transform.resize with antialiasing.
    """
    factors = np.array([own / wanted for own, wanted in zip(values.shape, (*size, values.shape[-1]), strict=True)])
    blurred = ndimage.gaussian_filter(values, np.maximum(factors - 1, 0) / 2, mode="nearest")
    return ndimage.zoom(blurred, 1 / factors, order=1, mode="nearest", grid_mode=True)


def fitted(values: np.ndarray, image: stored.Image, how: Preparation, path: pathlib.Path) -> np.ndarray:
    """float32 [*S, C] resampled, antialiased where it shrinks, and then cut or filled up with zeros to `how.size`."""
    size = target(image, how, path)
    if values.shape[:-1] != size:
        values = resized(values, size)
    for axis, wanted in enumerate(how.per_axis(how.size)):
        own = values.shape[axis]
        if wanted and own > wanted:
            values = np.take(values, range((own - wanted) // 2, (own - wanted) // 2 + wanted), axis=axis)
        elif wanted and own < wanted:
            before = (wanted - own) // 2
            values = np.pad(values, [(before, wanted - own - before) if each == axis else (0, 0) for each in range(values.ndim)])
    return values
