"""What the readers of files share: an image as it was stored, the error that names a file, the kinds of files, and packages of the extra.

Shapes: `*S` H,W or D,H,W; `C` channels, 1 or 3.
"""

import contextlib
import dataclasses
import importlib
import io
import math
import pathlib
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import BinaryIO

import numpy as np

from vitmed import config

PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
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


def opened(path: pathlib.Path) -> BinaryIO:
    """The file in memory: of one on a disk, Python would make room for as many bytes as a damaged header says a part of it has."""
    return io.BytesIO(path.read_bytes())


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
    if rank == 3 and min(size) == 1:
        raise Unreadable(
            f"{path}: {list(size)} is a single slice, no volume; give all slices{', or use configs/vit2d.py' * (size[-1] == 1)}"
        )


def required(name: str) -> ModuleType:
    """A package of the extra `medical`, imported only where a file needs it."""
    return importlib.import_module(name)
