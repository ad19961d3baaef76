"""One file, or one folder of a DICOM series, becomes one image: its values as they are stored, its spacing and where it lies in space.

Pictures (PNG, JPEG, TIFF) keep their rows and columns. Volumes come in RAS orientation with the slowest axis first: D runs from inferior to
superior, H from posterior to anterior, W from left to right.
Shapes: `*S` H,W or D,H,W; `C` channels, 1 or 3.
"""

import functools
import math
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from vitmed import config
from vitmed.data import dicom, stored

FORMATS = ("PNG", "JPEG", "BMP")  # Pillow's names: a file that says to be another is not given to the decoders of forty formats


def read(path: pathlib.Path, rank: int) -> stored.Image:
    """The image that a file, or a folder of one DICOM series, holds; Unreadable where that is broken or not of this rank.

    MachineError where the package that reads it is missing. Whoever reads many, in threads, does so within `quiet`.
    """
    kind = stored.suffix(path)
    readers: dict[str, Callable[[pathlib.Path, int], stored.Image]] = {
        **dict.fromkeys(stored.PICTURES, _picture),
        **dict.fromkeys(stored.TIFFS, _tiff),
        **dict.fromkeys(stored.NIFTIS, _nifti),
    }
    reader = readers.get(kind, dicom.read)
    try:
        with stored.installed(path):
            image = reader(path, rank)
    except stored.Unreadable as error:
        if str(path) in str(error):
            raise
        raise stored.Unreadable(f"{path}: {error}") from error
    except config.MachineError:
        raise
    except MemoryError as error:
        raise stored.Unreadable(f"{path}: it does not fit the memory") from error
    except Exception as error:  # decoders raise whatever they like at damaged bytes; the file is named and the others go on
        raise stored.Unreadable(f"{path}: {config.one_line(error)[:200] or type(error).__name__}") from error
    if image.values.dtype.kind not in "biuf" or not image.values.size:
        raise stored.Unreadable(f"{path}: it holds {image.values.dtype} {list(image.values.shape)}, not an image of real numbers")
    if image.values.dtype.kind == "f" and not np.isfinite(image.values).all():
        raise stored.Unreadable(f"{path}: it holds NaN or infinite values; replace them")
    return image


@functools.lru_cache(maxsize=2**17)
def _picture_channels(path: pathlib.Path, size: int, time: int) -> int:
    """Channels of a picture by its header alone; `size` and `time` tell a file that was changed."""
    if stored.suffix(path) in stored.TIFFS:
        with stored.required("tifffile").TiffFile(path) as file:
            return 3 if file.pages[0].photometric.name in ("RGB", "YCBCR", "PALETTE") else 1
    with stored.required("PIL.Image").open(stored.opened(path), formats=FORMATS) as file:
        return 1 if file.mode in ("1", "L", "LA", "I", "F") or file.mode.startswith("I;16") else 3


def num_channels(path: pathlib.Path) -> int:
    """Channels of a picture, 1 or 3, by its header; 1 of other files, and of what cannot be read, which is named when it is."""
    if stored.suffix(path) not in (*stored.PICTURES, *stored.TIFFS):
        return 1
    try:
        found = path.stat()
        with stored.installed(path):
            return _picture_channels(path, found.st_size, found.st_mtime_ns)
    except config.MachineError:
        raise
    except Exception:  # noqa: BLE001 - as in `read`
        return 1


def _picture(path: pathlib.Path, rank: int) -> stored.Image:
    """PNG, JPEG, BMP, upright as the camera says; transparency is dropped, palettes become colours."""
    pillow = stored.required("PIL.Image")
    with pillow.open(stored.opened(path), formats=FORMATS) as file:
        stored.require_rank(path, (file.height, file.width), rank)
        upright = stored.required("PIL.ImageOps").exif_transpose(file)
        if upright.mode in ("1", "L", "I", "F") or upright.mode.startswith("I;16"):
            values = np.asarray(upright.convert("L") if upright.mode == "1" else upright)
        else:
            gray = upright.mode == "LA"
            values = np.asarray(upright.convert("L" if gray else "RGB"))
    return stored.Image(values if values.ndim == 3 else values[..., None])


def _tiff(path: pathlib.Path, rank: int) -> stored.Image:
    """TIFF of any depth; several pages are the slices of a volume. Palettes become colours, and white that is stored as 0 bright."""
    with stored.required("tifffile").TiffFile(path) as file:
        if len(file.series) > 1:
            raise stored.Unreadable(f"{path}: its {len(file.pages)} pages are of several shapes; save one image, or slices of one shape")
        series, page = file.series[0], file.pages[0]
        colours = series.shape[-1] if series.axes.endswith("S") else 0
        if colours not in (0, 3, 4):
            raise stored.Unreadable(f"{path}: {colours} samples per pixel; 1, 3 or 4 are known")
        size = tuple(length for length in series.shape[: -1 if colours else None])
        stored.require_rank(path, size, rank)
        values, photometric = series.asarray(), page.photometric.name
        if photometric == "PALETTE":
            values, colours = np.moveaxis(page.colormap, 0, -1)[values] >> 8, 3
            values = values.astype(np.uint8)
    if photometric == "MINISWHITE" and values.dtype.kind == "u":
        values = np.iinfo(values.dtype).max - values
    return stored.Image(values.reshape(*size, colours or 1)[..., :3])


def _nifti(path: pathlib.Path, rank: int) -> stored.Image:
    """NIfTI, reoriented to RAS; scaling (slope, intercept) applied. Colour voxels (RGB24) are three channels."""
    nibabel = stored.required("nibabel")
    try:
        file = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, EOFError, zlib.error) as error:
        raise stored.Unreadable(f"{path}: not a whole NIfTI file ({config.one_line(error)[:120]})") from error
    size = tuple(int(length) for length in file.shape)
    while len(size) > rank and size[-1] == 1:  # one volume of a series of one
        size = size[:-1]
    stored.require_rank(path, size, rank)
    to_mm = {"micron": 1e-3, "meter": 1e3}.get(file.header.get_xyzt_units()[0], 1.0)
    if rank == 2:
        values = _stored(file).reshape(size).T[..., None]
        return stored.Image(values, spacing=_positive(path, file.header.get_zooms()[1::-1], to_mm))
    canonical = nibabel.as_closest_canonical(nibabel.squeeze_image(file) if len(file.shape) > 3 else file)
    values = _stored(canonical)
    values = values.view(np.uint8).reshape(*values.shape, -1)[..., :3] if values.dtype.fields else values[..., None]
    spacing = _positive(path, nibabel.affines.voxel_sizes(canonical.affine)[::-1], to_mm)
    return stored.Image(np.ascontiguousarray(values.transpose(2, 1, 0, 3)), spacing=spacing, affine=canonical.affine)


def _stored(file: Any) -> np.ndarray:
    """The scaled values in the smallest type that the file has them in: integers stay integers where nothing scales them."""
    there = file.dataobj  # after it was reoriented an array, scaled already
    plain = (getattr(there, "slope", 1.0), getattr(there, "inter", 0.0)) == (1.0, 0.0)
    values = np.asarray(there if plain else file.get_fdata(dtype=np.float32))
    return values.astype(np.float32) if values.dtype == np.float64 else values


def _positive(path: pathlib.Path, zooms: Any, to_mm: float) -> tuple[float, ...]:
    """Spacings in mm; Unreadable where a header has none that can be."""
    spacing = tuple(float(abs(zoom)) * to_mm for zoom in zooms)
    if not all(math.isfinite(step) and step > 0 for step in spacing):
        raise stored.Unreadable(f"{path}: its header has the spacing {spacing}; mend it")
    return spacing
