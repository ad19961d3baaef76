"""Files prepared once: the arrays of a set of own data, kept as one .npz in the user's cache beside a manifest of what they were made of.

The manifest holds the SHA-256, size and time of every file. Files whose size and time are as before are believed to be the same; of others
the hash decides; a set of which anything differs is prepared anew. Shapes: images uint8 [N, *S, C], masks bool [N, *S].
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import secrets
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import rich.console
import rich.progress

from vitmed import config, npz
from vitmed.data import dicom, listing, preparation, stored, volumes

FORM = 1  # of cache and manifest; another one is not read
THREADS = 4  # decoders let go of Python's lock


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """images uint8 [N, *S, C], masks bool [N, *S] (None where no example has one; nothing inside of one that has none), their SHA-256."""

    images: np.ndarray
    masks: np.ndarray | None
    digest: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What was read: how many files had each stored shape and each spacing in mm, of how many masks nothing was left, and how many
    prepared images are `flat`, of one value.

    `copies` are pairs of examples, by their numbers, of which the second has the bytes of the first.
    """

    shapes: dict[str, int]
    spacings: dict[str, int]
    lost_masks: int
    flat: int = 0
    copies: list[list[int]] = dataclasses.field(default_factory=list)


def folder(cache: str) -> pathlib.Path:
    """Where prepared sets are kept: `cache`, else $XDG_CACHE_HOME/vitmed/data, else ~/.cache/vitmed/data."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(os.path.expanduser(cache)) if cache else pathlib.Path(root, "vitmed", "data")


def load(entries: Sequence[listing.Entry], how: preparation.Preparation, *, cache: str, where: str) -> tuple[Arrays, Report]:
    """The prepared images in the order of the entries, from the cache where it has them. InputError that counts and names what is wrong."""
    window = preparation.CT_WINDOWS.get(how.window)  # in units, should a name ever mean others
    key = hashlib.sha256(json.dumps([FORM, os.path.abspath(where), dataclasses.asdict(how), window]).encode()).hexdigest()[:24]
    data, manifest = folder(cache) / f"{key}.npz", folder(cache) / f"{key}.json"
    files = _files(entries)
    kept = _kept(data, manifest, files, entries)
    if kept is not None:
        return kept
    before = _stats(files)
    arrays, report = _prepare(entries, how)
    hashed = _hashed(files)
    report = dataclasses.replace(report, copies=_copies(entries, hashed))
    record = {"form": FORM, "where": where, "images": arrays.digest, "entries": [_text(entry) for entry in entries]}
    record |= {"files": hashed, "report": dataclasses.asdict(report)}
    if _stats(files) != before:
        print(f"vitmed: {where}: files changed while they were read, so what was read is not kept", file=sys.stderr)
        return arrays, report
    members = {"images": arrays.images} | ({} if arrays.masks is None else {"masks": arrays.masks})
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        _write(data, lambda file: np.savez(file, **members))
        _write(manifest, lambda file: file.write(json.dumps(record).encode()))
    except OSError as error:
        print(f"vitmed: {data}: not kept ({error.strerror or error}); the files are prepared again next time", file=sys.stderr)
    return arrays, report


def _files(entries: Sequence[listing.Entry]) -> list[pathlib.Path]:
    """Every file that the entries are made of, masks and the slices of DICOM series among them."""
    paths = [path for entry in entries for path in (entry.path, entry.mask) if path is not None]
    return [file for path in paths for file in (dicom.in_folder(path) if path.is_dir() else [path])]


def _text(entry: listing.Entry) -> list[str]:
    return [str(entry.path), str(entry.mask or "")]


def _stats(files: Sequence[pathlib.Path]) -> list[list[int]]:
    """Size and time of each; of one that is not there nothing."""
    return [_stat(path) if path.exists() else [] for path in files]


def _stat(path: pathlib.Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashed(files: Sequence[pathlib.Path]) -> dict[str, list[Any]]:
    """Size, time and SHA-256 by path."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return {str(path): [*_stat(path), sha] for path, sha in zip(files, pool.map(_sha256, files), strict=True)}


def _copies(entries: Sequence[listing.Entry], hashed: Mapping[str, list[Any]]) -> list[list[int]]:
    """Examples that are the same file again under another name: a leak where they are in two splits."""
    first: dict[str, int] = {}
    found = []
    for index, entry in enumerate(entries):
        sha = hashed[str(entry.path)][-1] if str(entry.path) in hashed else str(entry.path)  # a folder is compared with none
        if first.setdefault(sha, index) != index:
            found.append([first[sha], index])
    return found


def _write(path: pathlib.Path, fill: Callable[[BinaryIO], Any]) -> None:
    """The whole file or none, whoever else is writing it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            fill(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _kept(
    data: pathlib.Path, manifest: pathlib.Path, files: Sequence[pathlib.Path], entries: Sequence[listing.Entry]
) -> tuple[Arrays, Report] | None:
    """What the cache holds of just these files; None where it has nothing, something else, or is damaged."""
    try:
        record = json.loads(manifest.read_bytes())
        if record["form"] != FORM or record["entries"] != [_text(entry) for entry in entries]:
            return None
        known = record["files"]
        if list(known) != [str(path) for path in files]:
            return None
        stale = [path for path in files if known[str(path)][:2] != _stat(path)]
        if any(known[str(path)][2] != _sha256(path) for path in stale):
            return None
        with zipfile.ZipFile(data) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            for name in names:
                npz.read_header(archive, name)
            images = npz.read_array(archive, "images")
            masks = npz.read_array(archive, "masks") if "masks" in names else None
        if images.dtype != np.uint8 or len(images) != len(entries) or _digest(images, masks) != record["images"]:
            return None
        if stale:  # the same bytes at another time: known from now on
            _write(manifest, lambda file: file.write(json.dumps({**record, "files": _hashed(files)}).encode()))
        return Arrays(images, masks, record["images"]), Report(**record["report"])
    except (OSError, KeyError, TypeError, *npz.DAMAGE):
        return None


def _digest(images: np.ndarray, masks: np.ndarray | None) -> str:
    sha = hashlib.sha256(f"{images.shape}".encode())
    for array in (images, masks):
        if array is not None:
            sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


# --- preparing ------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Made:
    """One prepared example, with what its file said."""

    image: np.ndarray
    mask: np.ndarray | None
    shape: str
    spacing: str
    lost_mask: bool


def _prepare(entries: Sequence[listing.Entry], how: preparation.Preparation) -> tuple[Arrays, Report]:
    """Every entry; InputError, after all have been tried, that counts and names those that cannot be read or differ in shape."""
    images: np.ndarray | None = None
    masks: np.ndarray | None = None
    faults: list[str] = []
    sizes: dict[tuple[int, ...], list[str]] = collections.defaultdict(list)
    shapes, spacings, lost, flat = collections.Counter(), collections.Counter(), 0, 0
    with stored.quiet(), concurrent.futures.ThreadPoolExecutor(THREADS) as pool, _progress(len(entries)) as advance:
        for index, made in enumerate(_ahead(pool, functools.partial(_one, how=how), entries)):
            advance()
            if isinstance(made, str):
                faults.append(made)
                continue
            size = made.image.shape[:-1]
            sizes[size].append(str(entries[index].path))
            if images is None:
                images = np.empty((len(entries), *made.image.shape), np.uint8)
            if size != images.shape[1:-1]:
                continue  # named below
            images[index] = made.image
            flat += int(made.image.min()) == int(made.image.max())
            shapes[made.shape] += 1
            spacings[made.spacing] += 1
            if made.mask is not None:
                masks = np.zeros(images.shape[:-1], bool) if masks is None else masks
                masks[index] = made.mask
                lost += made.lost_mask
    if faults:
        shown = "; ".join(faults[: listing.SHOWN]) + (f"; and {len(faults) - listing.SHOWN} more" if len(faults) > listing.SHOWN else "")
        of = f"{len(faults)} of {len(entries)} examples cannot be used"
        raise config.InputError(f"{of}: {shown}. Mend the files, or take them out of the set: nothing is left out silently")
    if len(sizes) > 1:
        usual = max(sizes, key=lambda size: len(sizes[size]))
        said = ", ".join(f"{len(paths)} of {'x'.join(map(str, size))}" for size, paths in sizes.items())
        odd = listing.counted([path for size, paths in sizes.items() if size != usual for path in paths], "image", "differs", "differ")
        raise config.InputError(f"data.size=0 takes images as they are, and these have several shapes: {said[:300]}; {odd}; give data.size")
    return Arrays(images, masks, _digest(images, masks)), Report(dict(shapes.most_common()), dict(spacings.most_common()), lost, flat)


def _ahead(pool: concurrent.futures.Executor, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """The results in order, computed a few ahead: a pool's own `map` would keep all that are waiting to be taken."""
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 4 * THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _one(entry: listing.Entry, how: preparation.Preparation) -> _Made | str:
    """A prepared example, or what is wrong with it."""
    try:
        image = volumes.read(entry.path, how.rank)
        mask, lost = None, False
        if entry.mask is not None:
            mask, drawn = preparation.mask(entry.mask, image, how)
            lost = drawn and not mask.any()
        spacing = "unknown" if image.spacing is None else "x".join(f"{step:.3g}" for step in image.spacing)
        shape = "x".join(map(str, image.size))
        return _Made(preparation.finished(image, how, entry.path), mask, shape, spacing, lost)
    except stored.Unreadable as error:
        return str(error)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on a terminal; yields what moves it by one."""
    columns = ("reading files", rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn())
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
