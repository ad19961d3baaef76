"""Arrays out of an .npz file that nobody vouches for.

What an array declares is known, and can be refused, before it is decompressed, and nothing is ever unpickled.
"""

import math
import struct
import tokenize
import warnings
import zipfile
import zlib

import numpy as np

# What zipfile and numpy raise on damaged files, found by flipping bytes; RuntimeError is an encrypted or unknown zip feature.
DAMAGE = (ValueError, RuntimeError, EOFError, SyntaxError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error)


def read_header(archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype that an array declares; ValueError where its size in the archive is another, or where it is pickled."""
    try:
        member = archive.getinfo(f"{key}.npy")
    except KeyError:
        raise ValueError(f"it lacks the array {key}") from None
    # np.savez writes nothing else, and zipfile bounds only these two by the size asked for while it decompresses.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{key} is compressed in a way that numpy does not write")
    with archive.open(member) as stream, warnings.catch_warnings(action="ignore"):  # numpy warns of old dialects, and reads them
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{key} has the unknown .npy version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, _, dtype = read(stream)
        except (TypeError, LookupError, MemoryError) as error:  # a literal, but no header; MemoryError is the parser's, of its depth
            raise ValueError(f"{key} has a header that is none ({type(error).__name__})") from error
        start = stream.tell()
    if dtype.hasobject:
        raise ValueError(f"{key} holds pickled objects, which are never loaded")
    if min(shape, default=0) < 0 or member.file_size != start + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{key} declares {dtype} {list(shape)}, which is not the {member.file_size} bytes that it has")
    return shape, dtype


def read_array(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """An array whose header was found right; zipfile checks its CRC."""
    with archive.open(f"{key}.npy") as stream, warnings.catch_warnings(action="ignore"):
        return np.lib.format.read_array(stream, allow_pickle=False)
