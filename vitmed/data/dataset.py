"""What a data source hands over: uint8 images, integer labels, and a description of the set; the same for every source.

`read_header` and `read_array` take arrays out of an .npz file that nobody vouches for: what an array declares is known, and can be
refused, before it is decompressed, and nothing is ever unpickled.
Shapes: `N` examples, `*S` H,W or D,H,W, `C` channels (1 or 3), `L` labels of one example, `K` classes.
"""

import dataclasses
import hashlib
import math
import struct
import tokenize
import zipfile
import zlib
from typing import BinaryIO

import numpy as np

# What zipfile and numpy raise on damaged files, found by flipping bytes; RuntimeError is an encrypted or unknown zip feature.
DAMAGE = (ValueError, RuntimeError, EOFError, SyntaxError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [N, *S, C], labels int32 [N, L] and, where the lesion is known (phantoms), its mask bool [N, *S]."""

    images: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Description:
    """What a set is: task "binary", "multi-class", "multi-label" or "ordinal"; image_size *S; num_examples of each split."""

    name: str
    task: str
    class_names: tuple[str, ...]
    image_size: tuple[int, ...]
    num_channels: int
    num_examples: dict[str, int]
    licence: str
    synthetic: bool

    @property
    def rank(self) -> int:
        """Number of spatial axes: 2 or 3."""
        return len(self.image_size)

    @property
    def num_classes(self) -> int:
        """K: the classes, or for multi-label the labels, each of which is 0 or 1."""
        return len(self.class_names)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A set in memory: splits "train", "val" and "test"; md5 of the file that was read, None for a generated set."""

    description: Description
    splits: dict[str, Split]
    md5: str | None


def md5_of(file: BinaryIO) -> str:
    """MD5 (hexadecimal) of a whole open file, read in blocks."""
    file.seek(0)
    return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def read_header(archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype that an array declares; ValueError where its size in the archive is another, or where it is pickled."""
    if f"{key}.npy" not in archive.namelist():
        raise ValueError(f"it lacks the array {key}")
    member = archive.getinfo(f"{key}.npy")
    # np.savez writes nothing else, and zipfile bounds only these two by the size asked for while it decompresses.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{key} is compressed in a way that numpy does not write")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{key} has the unknown .npy version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        start = stream.tell()
    if dtype.hasobject:
        raise ValueError(f"{key} holds pickled objects, which are never loaded")
    if member.file_size != start + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{key} declares {dtype} {list(shape)}, which is not the {member.file_size} bytes that it has")
    return shape, dtype


def read_array(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """An array whose header was found right; zipfile checks its CRC."""
    with archive.open(f"{key}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)
