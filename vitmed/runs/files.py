"""Files written whole or not at all, and JSON read with its faults named."""

import contextlib
import errno
import json
import math
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vitmed import config as config_lib

LEFTOVER = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    """MachineError where a path cannot be written."""
    try:
        yield
    except OSError as error:
        raise config_lib.MachineError(
            f"{path} could not be written: {error.strerror or error}; mend that and run the same command again"
        ) from error


def write_whole(path: str | os.PathLike, data: bytes, *, make_parent: bool = False) -> None:
    """Put data at path so that a reader, a crash or a power cut meets the old file or the new one; MachineError if it cannot.

    `make_parent` makes the folder that holds it, but not what that is in.
    """
    if make_parent:
        with _writing(pathlib.Path(path)):
            pathlib.Path(path).parent.mkdir(exist_ok=True)
    with writing_whole(path) as write:
        write(data)


@contextlib.contextmanager
def writing_whole(path: str | os.PathLike) -> Iterator[Callable[[bytes], None]]:
    """Give what appends data to a file that comes to be at path, as with `write_whole`, when the context ends without an error."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")  # LEFTOVER knows the form
    with _writing(path):
        file = open(temporary, "xb")  # noqa: SIM115 - closed below, where the disk may be full
    try:

        def write(data: bytes) -> None:
            with _writing(path):
                file.write(data)

        yield write
        with _writing(path):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()  # tries once more to write what a full disk refused
        temporary.unlink(missing_ok=True)
        raise
    with _writing(path):
        _sync_folder(path.parent)


def remove_leftovers(folder: pathlib.Path) -> None:
    """Delete from a folder what `write_whole` had begun when its process was killed; nobody else may be writing there."""
    for file in folder.glob(".*.tmp"):
        if LEFTOVER.fullmatch(file.name):
            file.unlink(missing_ok=True)


def _sync_folder(path: pathlib.Path) -> None:
    """Make a rename in the folder survive a power cut, where the file system can promise that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def json_ready(value: Any) -> Any:
    """Turn numpy values into Python's, tuples into lists and numbers that JSON does not have into null."""
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return json_ready(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_bytes(value: Any) -> bytes:
    """Encode for a file that people read too; ValueError for numbers that JSON does not have."""
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"


def read(path: pathlib.Path) -> bytes:
    """Return the bytes of a file; FileNotFoundError if it is absent, InputError if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise config_lib.InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_json(data: bytes, *, where: str) -> dict[str, Any]:
    """Return the JSON object in data; InputError that says where and what is wrong."""
    try:
        value = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise config_lib.InputError(f"{where} is broken: {error}; restore it from a copy or run into another folder") from error
    if not isinstance(value, dict):
        raise config_lib.InputError(f"{where} is broken: expected a JSON object, got {type(value).__name__}")
    return value


def make_folder(path: pathlib.Path) -> None:
    """Make a folder and its parents; InputError if the path is at fault, MachineError if the disk is."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        kind = config_lib.MachineError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else config_lib.InputError
        raise kind(f"the folder {path} cannot be made: {error.strerror or error}") from error


def check_folder(path: pathlib.Path, refused: str) -> None:
    """InputError that begins with `refused`, and nothing written, if the path is no folder and none can be made there, or not written."""
    absolute = pathlib.Path(os.path.abspath(path))
    nearest = next(parent for parent in (absolute, *absolute.parents) if os.path.lexists(parent))
    if not nearest.is_dir():
        raise config_lib.InputError(f"{refused}: {nearest} is a file where a folder should be; choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise config_lib.InputError(f"{refused}: {nearest} is not writable; choose another")


def write_folder(path: pathlib.Path, contents: Mapping[str, bytes]) -> None:
    """Make a folder that holds these files, all of them or none; a path that exists is an empty folder. MachineError if it cannot."""
    path = pathlib.Path(os.path.realpath(path))
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with _writing(path):
        try:
            temporary.mkdir()
            for name, data in contents.items():
                write_whole(temporary / name, data)
            temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(path.parent)


def check_new_folder(path: pathlib.Path, refused: str) -> None:
    """InputError that begins with `refused`, and nothing written, unless `write_folder` can make the path: absent, or an empty folder."""
    check_folder(path, refused)
    real = pathlib.Path(os.path.realpath(path))
    check_folder(real.parent, refused)
    if real.is_dir() and any(real.iterdir()):
        raise config_lib.InputError(f"{refused}: it exists and is not empty; name a new folder")
    if real.is_mount():
        raise config_lib.InputError(f"{refused}: it is a mount point, which cannot be replaced as a whole; name a folder within it")
