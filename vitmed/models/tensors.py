"""Files of pretrained weights - safetensors, PyTorch, .npz - opened alike: named tensors that are read one by one, as float32.

A file may come from anywhere: nothing in it is executed, and whatever is wrong with it is an InputError of one line. What a file is,
its content says and not its name. Bytes are read rather than mapped: the pages of a map would count, and stay, beside the arrays.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import pathlib
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from vitmed import config, npz
from vitmed.models import torch_files

READABLE = {np.dtype(name).name: np.dtype(name) for name in ("float64", "float32", "float16", ml_dtypes.bfloat16)}
SAFETENSORS = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
MAX_HEADER = 16 * 2**20  # bytes of a safetensors header; those of the largest ViTs have less than 1 MiB
MAX_ARRAYS = 20_000  # in an .npz file: each costs a header to read before the first is known
MAX_GROWTH, MAX_EXTRA = 20, 64 * 2**20  # tensors may take that many times the file's bytes, and that many more: zeros compress well
DAMAGE = (*npz.DAMAGE, safetensors.SafetensorError, ArithmeticError)

FORMATS = "a .safetensors file, a PyTorch state_dict (.pth, .pt, .bin) or an .npz file"
AGAIN = f"fetch it again, or name another: {FORMATS}"
CONVERT = "if you trust whom it comes from, load it in PyTorch and save its state_dict with safetensors.torch.save_file"
# First bytes of what is given for weights by mistake: what it is, and what to do.
STRANGERS = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the weights themselves", "run git lfs pull, or download the file itself"),
    (b"<", "is an HTML page or the like, not weights", "download the file itself: the link led to a page about it"),
    (b"\x80", "is a pickle, perhaps of the PyTorch before 1.6, which is not loaded because it can run any code", CONVERT),
    (b"\x89HDF", "is an HDF5 file", f"name {FORMATS}"),
    (b"\x93NUMPY", "is a single array", f"name {FORMATS}"),
    (b"\x1f\x8b", "is compressed by gzip", "unpack it with gunzip or tar"),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file; `read()` gives it as float32, C-contiguous, in memory of its own, or raises InputError."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A file of weights: its tensors by name, and the metadata of a safetensors file."""

    path: pathlib.Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Raw:
    """A tensor as it lies in a file: its dtype, None where it is none of ours, that dtype's name, and how to get at it."""

    shape: tuple[int, ...]
    dtype: np.dtype | None
    kind: str
    read: Callable[[], np.ndarray]


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Opened]:
    """The file's tensors, none of them read yet; `read` works within the context. InputError for whatever is wrong with the file."""
    path = pathlib.Path(os.path.expanduser(path))
    with contextlib.ExitStack() as stack:
        with explained(path, AGAIN):
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise config.InputError(f"{path}: is {'a folder' if path.is_dir() else 'no regular file'}; name {FORMATS}")
            file = stack.enter_context(open(path, "rb"))
            archive = archive_of(path, file)
            is_torch = archive is not None and torch_files.pickle_of(archive) is not None
        mend = f"fetch it again or, {CONVERT}" if is_torch else AGAIN
        with explained(path, mend):
            if archive is None:
                raws, metadata = in_safetensors(path, file)
            else:
                raws, metadata = in_torch(archive, file) if is_torch else in_npz(archive), {}
            bound(raws, os.fstat(file.fileno()).st_size)
        yield Opened(path, {name: tensor(file, name, raw, mend) for name, raw in raws.items()}, metadata)


@contextlib.contextmanager
def explained(what: str | pathlib.Path, mend: str) -> Iterator[None]:
    """Turn what a missing, unreadable or damaged file raises into an InputError of one line."""
    try:
        yield
    except config.InputError:
        raise
    except (OSError, *DAMAGE) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that comes of a damaged archive, which points before its start
            raise config.InputError(f"{what}: {error.strerror or error}; name a file that can be read: {FORMATS}") from error
        cause = "it points outside itself" if isinstance(error, OSError) else config.one_line(error)[:400] or "it ends too early"
        raise config.InputError(f"{what}: cannot be read: {cause}; {mend}") from error


def archive_of(path: pathlib.Path, file: BinaryIO) -> zipfile.ZipFile | None:
    """The file as a zip archive, None where it may be safetensors; InputError or one of DAMAGE where it can be neither."""
    head = file.read(512)
    if head.startswith((b"PK\3\4", b"PK\5\6")):  # not PK alone: with that a safetensors file of some header length starts
        try:
            return zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise ValueError(f"it is a zip archive, but damaged or incomplete ({error})") from error
    if head[8:9] == b"{":  # safetensors starts with a length of eight bytes, any bytes, and a brace
        return None
    for magic, words, mend in STRANGERS:
        if head.lstrip().lower().startswith(magic.lower()):
            raise config.InputError(f"{path}: {words}; {mend}")
    if head[257:262] == b"ustar":
        raise config.InputError(f"{path}: is a tar file; unpack it, or where it is from the first PyTorch: {CONVERT}")
    raise ValueError("it is of an unknown format" if head else "it is empty")


def tensor(file: BinaryIO, name: str, raw: Raw, mend: str) -> Tensor:
    """The tensor, whose `read` raises nothing but InputError while the file is open."""

    def read() -> np.ndarray:
        if file.closed:
            raise RuntimeError("a tensor can be read only within the context of tensors.opened")
        what = f"{file.name}: tensor {name[:100]!r}"
        if raw.dtype is None or raw.dtype.newbyteorder("=") not in READABLE.values():
            raise config.InputError(f"{what} holds {raw.kind}; weights are {', '.join(READABLE)}: convert it, or leave it out")
        # float64 beyond float32 is an error rather than infinite; a NaN is for others to judge.
        with explained(what, mend), np.errstate(over="raise", invalid="ignore"):
            return np.asarray(raw.read(), np.float32, order="C")

    return Tensor(raw.shape, read)


def bound(raws: dict[str, Raw], size: int) -> None:
    """ValueError where there are no tensors, or shapes that numpy does not know, or far more to put in memory than the file has bytes."""
    if not raws:
        raise ValueError("it holds no tensors")
    for name, raw in raws.items():
        if len(raw.shape) > torch_files.MAX_RANK or max(raw.shape, default=0) >= 2**48:
            raise ValueError(f"the tensor {name[:100]!r} has a shape that no tensor has")
    total = sum(math.prod(raw.shape) * max(4, raw.dtype.itemsize if raw.dtype else 0) for raw in raws.values())
    if total > (most := MAX_GROWTH * size + MAX_EXTRA):
        raise ValueError(f"its tensors would take {total} bytes, more than the {most} allowed for a file of {size}")


def read_at(file: BinaryIO, start: int, dtype: np.dtype, count: int) -> np.ndarray:
    """So many elements from that byte of the file on; EOFError where it ends before."""
    flat = np.empty(count, dtype)
    file.seek(start)
    if file.readinto(flat.view(np.uint8)) != flat.nbytes:
        raise EOFError
    return flat


def in_safetensors(path: pathlib.Path, file: BinaryIO) -> tuple[dict[str, Raw], dict[str, str]]:
    """Tensors and metadata; the safetensors library judges the header: after that every tensor lies where it says."""
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER:
        raise ValueError(f"its safetensors header would have {length} bytes, more than the {MAX_HEADER} that any model needs")
    try:
        with safetensors.safe_open(path, framework="np") as checked:
            metadata = checked.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is no safetensors file, or damaged or incomplete ({error})") from error
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)

    def raw(kind: str, shape: list[int], place: list[int]) -> Raw:
        dtype, (start, end) = SAFETENSORS.get(kind), place
        if dtype is not None and end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError("its safetensors header contradicts itself")
        return Raw(tuple(shape), dtype, kind, lambda: read_at(file, 8 + length + start, dtype, math.prod(shape)).reshape(shape))

    return {name: raw(entry["dtype"], entry["shape"], entry["data_offsets"]) for name, entry in header.items()}, metadata


def in_torch(archive: zipfile.ZipFile, file: BinaryIO) -> dict[str, Raw]:
    """The tensors of a PyTorch file; the CRC of a storage is compared before the first of its tensors is read."""
    checked = set()

    def read(view: torch_files.View) -> np.ndarray:
        storage, dtype = view.storage, view.storage.dtype
        if storage.member.filename not in checked:
            torch_files.check(archive, storage)
            checked.add(storage.member.filename)
        flat = read_at(file, torch_files.start(file, storage) + view.offset * dtype.itemsize, dtype, view.span)
        return np.lib.stride_tricks.as_strided(flat, view.shape, [stride * dtype.itemsize for stride in view.strides])

    views = torch_files.views(archive)
    return {
        name: Raw(view.shape, view.storage.dtype, str(view.storage.dtype), functools.partial(read, view)) for name, view in views.items()
    }


def in_npz(archive: zipfile.ZipFile) -> dict[str, Raw]:
    """The arrays of an .npz file, by their names without .npy."""
    names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    if not names:
        raise ValueError("it is a zip archive without a PyTorch state_dict and without arrays")
    if len(names) > MAX_ARRAYS:
        raise ValueError(f"it holds {len(names)} arrays, more than the {MAX_ARRAYS} that any model needs")

    def raw(name: str) -> Raw:
        shape, dtype = npz.read_header(archive, name)
        # numpy writes bfloat16, which it does not know, as two bytes of unknown meaning.
        dtype = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
        return Raw(shape, dtype, str(dtype), lambda: npz.read_array(archive, name).view(dtype))

    return {name: raw(name) for name in names}
