"""Heat over the grid of an image's patches, drawn on the image: PNG of images, NIfTI and a PNG of slices of volumes.

Heat stays in the blocks in which the network has it: every pixel takes its patch's, nothing is smoothed.
Shapes: `*G` the grid of patches, `*S` H,W or D,H,W of the image as it was prepared, `C` channels (1 or 3).
"""

import dataclasses
import gzip
import io
import math
from collections.abc import Sequence
from types import ModuleType

import matplotlib
import numpy as np
from matplotlib import image as matplotlib_image

from vitmed import config, cost

COLOURS = "inferno"
STRENGTH = 0.65  # of the colour over the image where heat is highest
LEAST_PIXELS = 224  # images are enlarged, by whole numbers, until their shorter side has so many; slices to half of it
SLICES = 12  # of a volume, at most
GAP = 4  # pixels


@dataclasses.dataclass(frozen=True)
class Lattice:
    """How patches lie on the image that the network sees: one entry per axis each; `kernel_size` as `cost.grid` takes it."""

    image_size: tuple[int, ...]
    patch_size: tuple[int, ...]
    kernel_size: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """*G."""
        return cost.grid(self.image_size, self.patch_size, self.kernel_size)

    def spread(self, heat: np.ndarray, places: Sequence[np.ndarray]) -> np.ndarray:
        """[*G] -> the heat at places along each axis, in shares of the image (0 to 1); nothing outside of it.

        A place takes the token whose kernel's centre is nearest.
        """
        spread = heat
        axes = zip(places, self.image_size, self.patch_size, self.kernel_size, self.grid, strict=True)
        for axis, (place, length, patch, kernel, count) in enumerate(axes):
            token = np.clip(np.floor((place * length - (kernel - patch) / 2) / patch), 0, count - 1).astype(int)
            inside = ((place >= 0) & (place <= 1)).reshape([-1 if each == axis else 1 for each in range(heat.ndim)])
            spread = np.where(inside, np.take(spread, token, axis=axis), 0)
        return spread


def centres(size: Sequence[int]) -> list[np.ndarray]:
    """Where the pixels' centres lie along each axis, in shares of the image."""
    return [(np.arange(length) + 0.5) / length for length in size]


def in_prepared(places: Sequence[np.ndarray], resampled: Sequence[int], prepared: Sequence[int]) -> list[np.ndarray]:
    """Places in shares of a file's image -> in shares of the prepared one, below 0 or above 1 where that was cut off.

    All of the file's image was resampled to `resampled` pixels, and that cut or filled up around its middle to `prepared`.
    """
    axes = zip(places, resampled, prepared, strict=True)
    return [(place * own - _cut(own, kept)) / kept for place, own, kept in axes]


def in_file(places: Sequence[np.ndarray], resampled: Sequence[int], prepared: Sequence[int]) -> list[np.ndarray]:
    """The other way."""
    axes = zip(places, resampled, prepared, strict=True)
    return [(place * kept + _cut(own, kept)) / own for place, own, kept in axes]


def _cut(own: int, kept: int) -> int:
    """Pixels cut off before the first one that is kept; negative where so many were put before it."""
    return (own - kept) // 2 if own >= kept else -((kept - own) // 2)


def picture(image: np.ndarray, heat: np.ndarray) -> bytes:
    """PNG of an image uint8 [H, W, C] beside itself under heat [H, W]; the highest heat has the strongest colour."""
    scale = math.ceil(LEAST_PIXELS / min(heat.shape))
    return _png(_side_by_side([_enlarged(_coloured(image), scale), _enlarged(_overlaid(image, _relative(heat)), scale)]))


def montage(volume: np.ndarray, heat: np.ndarray, *, radiological: bool = False) -> bytes:
    """PNG of slices of a volume uint8 [D, H, W, C], from the first to the last, beside the same under heat [D, H, W].

    `radiological`: of a volume in RAS orientation anterior is up and the patient's right on the left.
    """
    depth, relative = len(volume), _relative(heat)
    if radiological:
        volume, relative = volume[:, ::-1, ::-1], relative[:, ::-1, ::-1]
    chosen = np.unique(np.linspace(0, depth - 1, min(depth, SLICES)).round().astype(int))
    columns = math.ceil(math.sqrt(len(chosen)))
    scale = math.ceil(LEAST_PIXELS / 2 / min(volume.shape[1:3]))
    sides = [
        _tiled([_enlarged(drawn, scale) for drawn in each], columns)
        for each in ([_coloured(volume[i]) for i in chosen], [_overlaid(volume[i], relative[i]) for i in chosen])
    ]
    return _png(_side_by_side(sides))


def nifti(heat: np.ndarray, affine: np.ndarray | None) -> bytes:
    """A gzipped NIfTI of heat [D, H, W], float32; `affine` [4, 4] as `data.volumes` gives it, none is voxels of a millimetre."""
    nibabel = require_nibabel()
    made = nibabel.Nifti1Image(np.asarray(heat, np.float32).transpose(2, 1, 0), np.eye(4) if affine is None else affine)
    return gzip.compress(made.to_bytes(), mtime=0)


def require_nibabel() -> ModuleType:
    """nibabel, which writes NIfTI; InputError where it is not installed."""
    try:
        import nibabel
    except ImportError as error:
        raise config.InputError(
            "--explain of volumes writes NIfTI files, and nibabel is not installed; pip install 'vitmed[medical]'"
        ) from error
    return nibabel


def _relative(heat: np.ndarray) -> np.ndarray:
    """Heat over its highest."""
    return heat / max(float(heat.max()), np.finfo(np.float32).tiny)


def _coloured(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] -> float [H, W, 3] from 0 to 1."""
    return np.broadcast_to(image / 255, (*image.shape[:2], 3))


def _overlaid(image: np.ndarray, relative: np.ndarray) -> np.ndarray:
    """The image [H, W, C] with the colours of heat [H, W] from 0 to 1 over it, the stronger the hotter."""
    strength = STRENGTH * relative[..., None]
    return (1 - strength) * _coloured(image) + strength * matplotlib.colormaps[COLOURS](relative)[..., :3]


def _enlarged(image: np.ndarray, scale: int) -> np.ndarray:
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def _side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    return _tiled(images, len(images))


def _tiled(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Images [h, w, 3] of one size in rows, on white."""
    height, width = images[0].shape[:2]
    rows = math.ceil(len(images) / columns)
    tiled = np.ones((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3))
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        tiled[top : top + height, left : left + width] = image
    return tiled


def _png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    matplotlib_image.imsave(data, np.rint(image * 255).astype(np.uint8), format="png", metadata={"Software": None})
    return data.getvalue()
