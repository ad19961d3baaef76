"""One file, or one folder of a DICOM series, becomes one image: its values as they are stored, its spacing and where it lies in space.

Pictures (PNG, JPEG, TIFF) keep their rows and columns. Volumes come in RAS orientation with the slowest axis first: D runs from inferior to
superior, H from posterior to anterior, W from left to right.
Shapes: `*S` H,W or D,H,W; `C` channels, 1 or 3.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
import pathlib
import warnings
import zlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from vitmed import config

PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
FORMATS = ("PNG", "JPEG", "BMP")  # Pillow's names: a file that says to be another is not given to the decoders of forty formats
TIFFS = (".tif", ".tiff")
NIFTIS = (".nii", ".nii.gz")
DICOMS = (".dcm", ".dicom", ".ima")
MOST_VALUES = 2**31  # of one file: more is a broken header, or what no network of ours could see
INSTALL = "install what reads it with: pip install 'vitmed[medical]'"


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """values [*S, C] of any real dtype, spacing (mm between neighbours along each axis, None where the file does not tell it).

    `affine` [4, 4] takes the voxel (w, h, d) of a volume to millimetres to the right, anterior, superior; None of a picture.
    """

    values: np.ndarray
    spacing: tuple[float, ...] | None = None
    affine: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """*S."""
        return self.values.shape[:-1]


class Unreadable(config.InputError):
    """A file that does not hold one image of the rank asked for: the message names the file and says why."""


def suffix(path: pathlib.Path) -> str:
    """The file's kind by its name: .nii.gz, .png, .dcm; files of a DICOM series often have none or a number."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else pathlib.PurePath(name).suffix


def read(path: pathlib.Path, rank: int) -> Image:
    """The image that a file, or a folder of one DICOM series, holds; Unreadable where that is broken or not of this rank.

    MachineError where the package that reads it is missing. Whoever reads many, in threads, does so within `quiet`.
    """
    from vitmed.data import dicom  # here, since it needs Image

    kind = suffix(path)
    readers: dict[str, Callable[[pathlib.Path, int], Image]] = {
        **dict.fromkeys(PICTURES, _picture),
        **dict.fromkeys(TIFFS, _tiff),
        **dict.fromkeys(NIFTIS, _nifti),
    }
    reader = readers.get(kind, dicom.read)
    try:
        with installed(path):
            image = reader(path, rank)
    except Unreadable as error:
        if str(path) in str(error):
            raise
        raise Unreadable(f"{path}: {error}") from error
    except config.MachineError:
        raise
    except MemoryError as error:
        raise Unreadable(f"{path}: it does not fit the memory") from error
    except Exception as error:  # decoders raise whatever they like at damaged bytes; the file is named and the others go on
        raise Unreadable(f"{path}: {config.one_line(error)[:200] or type(error).__name__}") from error
    if image.values.dtype.kind not in "biuf" or not image.values.size:
        raise Unreadable(f"{path}: it holds {image.values.dtype} {list(image.values.shape)}, not an image of real numbers")
    if image.values.dtype.kind == "f" and not np.isfinite(image.values).all():
        raise Unreadable(f"{path}: it holds NaN or infinite values; replace them")
    return image


@functools.lru_cache(maxsize=2**17)
def _picture_channels(path: pathlib.Path, size: int, time: int) -> int:
    """Channels of a picture by its header alone; `size` and `time` tell a file that was changed."""
    if suffix(path) in TIFFS:
        with required("tifffile").TiffFile(path) as file:
            return 3 if file.pages[0].photometric.name in ("RGB", "YCBCR", "PALETTE") else 1
    with required("PIL.Image").open(path, formats=FORMATS) as file:
        return 1 if file.mode in ("1", "L", "LA", "I", "F") or file.mode.startswith("I;16") else 3


def num_channels(path: pathlib.Path) -> int:
    """Channels of a picture, 1 or 3, by its header; 1 of other files, and of what cannot be read, which is named when it is."""
    if suffix(path) not in (*PICTURES, *TIFFS):
        return 1
    try:
        found = path.stat()
        with installed(path):
            return _picture_channels(path, found.st_size, found.st_mtime_ns)
    except config.MachineError:
        raise
    except Exception:  # noqa: BLE001 - as in `read`
        return 1


@contextlib.contextmanager
def installed(path: pathlib.Path) -> Iterator[None]:
    """MachineError where a package is missing that a file needs."""
    try:
        yield
    except ImportError as error:
        raise config.MachineError(f"{path}: {error.name} is missing; {INSTALL}") from error


def quiet() -> contextlib.AbstractContextManager:
    """Without the warnings of decoders, which warn of what they mend. Around threads, not within: filters are the whole process's."""
    return warnings.catch_warnings(action="ignore")


def require_rank(path: pathlib.Path, size: tuple[int, ...], rank: int) -> None:
    """Unreadable unless a file's spatial shape is of this rank, and not too large to be an image."""
    if math.prod(size) > MOST_VALUES or not all(size):
        raise Unreadable(f"{path}: its header says {list(size)}, which is no image")
    if len(size) != rank:
        what = {2: "a picture", 3: "a volume", 4: "a series of volumes (4D)"}.get(len(size), f"of {len(size)} axes")
        use = {2: "use configs/vit2d.py", 3: "use configs/vit3d.py"}.get(len(size), "take one volume out of it")
        raise Unreadable(f"{path}: {list(size)} is {what}, this config is for {rank}D data; {use}")


def required(name: str) -> ModuleType:
    """A package of the extra `medical`, imported only where a file needs it."""
    return importlib.import_module(name)


def _picture(path: pathlib.Path, rank: int) -> Image:
    """PNG, JPEG, BMP, upright as the camera says; transparency is dropped, palettes become colours."""
    pillow = required("PIL.Image")
    with pillow.open(path, formats=FORMATS) as file:
        require_rank(path, (file.height, file.width), rank)
        upright = required("PIL.ImageOps").exif_transpose(file)
        if upright.mode in ("1", "L", "I", "F") or upright.mode.startswith("I;16"):
            values = np.asarray(upright.convert("L") if upright.mode == "1" else upright)
        else:
            gray = upright.mode == "LA"
            values = np.asarray(upright.convert("L" if gray else "RGB"))
    return Image(values if values.ndim == 3 else values[..., None])


def _tiff(path: pathlib.Path, rank: int) -> Image:
    """TIFF of any depth; several pages are the slices of a volume. Palettes become colours, and white that is stored as 0 bright."""
    with required("tifffile").TiffFile(path) as file:
        if len(file.series) > 1:
            raise Unreadable(f"{path}: its {len(file.pages)} pages are of several shapes; save one image, or slices of one shape")
        series, page = file.series[0], file.pages[0]
        colours = series.shape[-1] if series.axes.endswith("S") else 0
        if colours not in (0, 3, 4):
            raise Unreadable(f"{path}: {colours} samples per pixel; 1, 3 or 4 are known")
        size = tuple(length for length in series.shape[: -1 if colours else None])
        require_rank(path, size, rank)
        values, photometric = series.asarray(), page.photometric.name
        if photometric == "PALETTE":
            values, colours = np.moveaxis(page.colormap, 0, -1)[values] >> 8, 3
            values = values.astype(np.uint8)
    if photometric == "MINISWHITE" and values.dtype.kind == "u":
        values = np.iinfo(values.dtype).max - values
    return Image(values.reshape(*size, colours or 1)[..., :3])


def _nifti(path: pathlib.Path, rank: int) -> Image:
    """NIfTI, reoriented to RAS; scaling (slope, intercept) applied. Colour voxels (RGB24) are three channels."""
    nibabel = required("nibabel")
    try:
        file = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, EOFError, zlib.error) as error:
        raise Unreadable(f"{path}: not a whole NIfTI file ({config.one_line(error)[:120]})") from error
    size = tuple(int(length) for length in file.shape)
    while len(size) > rank and size[-1] == 1:  # one volume of a series of one
        size = size[:-1]
    require_rank(path, size, rank)
    to_mm = {"micron": 1e-3, "meter": 1e3}.get(file.header.get_xyzt_units()[0], 1.0)
    if rank == 2:
        values = _stored(file).reshape(size).T[..., None]
        return Image(values, spacing=_positive(path, file.header.get_zooms()[1::-1], to_mm))
    canonical = nibabel.as_closest_canonical(nibabel.squeeze_image(file) if len(file.shape) > 3 else file)
    values = _stored(canonical)
    values = values.view(np.uint8).reshape(*values.shape, -1)[..., :3] if values.dtype.fields else values[..., None]
    spacing = _positive(path, nibabel.affines.voxel_sizes(canonical.affine)[::-1], to_mm)
    return Image(np.ascontiguousarray(values.transpose(2, 1, 0, 3)), spacing=spacing, affine=canonical.affine)


def _stored(file: Any) -> np.ndarray:
    """The scaled values in the smallest type that the file has them in: integers stay integers where nothing scales them."""
    stored = file.dataobj  # after it was reoriented an array, scaled already
    plain = (getattr(stored, "slope", 1.0), getattr(stored, "inter", 0.0)) == (1.0, 0.0)
    values = np.asarray(stored if plain else file.get_fdata(dtype=np.float32))
    return values.astype(np.float32) if values.dtype == np.float64 else values


def _positive(path: pathlib.Path, zooms: Any, to_mm: float) -> tuple[float, ...]:
    """Spacings in mm; Unreadable where a header has none that can be."""
    spacing = tuple(float(abs(zoom)) * to_mm for zoom in zooms)
    if not all(math.isfinite(step) and step > 0 for step in spacing):
        raise Unreadable(f"{path}: its header has the spacing {spacing}; mend it")
    return spacing
