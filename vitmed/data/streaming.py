"""Files decoded ahead of whoever takes them, a bounded number at a time, in their order; what cannot be read comes along as its fault.

Shapes: `*S` H,W or D,H,W, `C` channels (1 or 3).
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vitmed import config
from vitmed.data import listing, preparation, stored, volumes

# Decoders let go of Python's lock. A volume as it is stored may take gigabytes, so that few are read at once.
THREADS = {2: 4, 3: 2}


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """One file: images uint8 [*S, C] for each preparation asked for, in their order, or none and the `fault`.

    `size` is *S of the file, `resampled` what all of it became in each preparation before that cut or filled it up; `affine` as
    `stored.Image` has it.
    """

    entry: listing.Entry
    images: tuple[np.ndarray, ...] = ()
    fault: str = ""
    size: tuple[int, ...] = ()
    resampled: tuple[tuple[int, ...], ...] = ()
    affine: np.ndarray | None = None


def prepare(entry: listing.Entry, hows: Sequence[preparation.Preparation], shapes: Sequence[tuple[int, ...]]) -> Prepared:
    """A file by each preparation, held against the `shapes` [*S, C] that must come out."""
    try:
        image = volumes.read(entry.path, hows[0].rank)
        images = tuple(preparation.finished(image, how, entry.path) for how in hows)
        for made, shape in zip(images, shapes, strict=True):
            if made.shape != shape:
                raise stored.Unreadable(
                    f"{entry.path}: comes to {list(made.shape[:-1])} pixels, and the run takes {list(shape[:-1])}; "
                    "it was trained with data.size=0 on images that were all of this shape"
                )
        resampled = tuple(preparation.target(image, how, entry.path) for how in hows)
        return Prepared(entry, images, "", image.size, resampled, image.affine)
    except config.InputError as error:
        return Prepared(entry, fault=config.one_line(error))


def stream(
    entries: Iterable[listing.Entry], hows: Sequence[preparation.Preparation], shapes: Sequence[tuple[int, ...]], *, ahead: int
) -> Iterator[Prepared]:
    """Every entry in order; at most `ahead` are decoded or being decoded beyond the one that is taken. MachineError, not of one file."""
    waiting: collections.deque[concurrent.futures.Future[Prepared]] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(THREADS[hows[0].rank], thread_name_prefix="decode")
    try:
        for entry in entries:
            waiting.append(pool.submit(prepare, entry, hows, shapes))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def batches(prepared: Iterable[Prepared], batch_size: int) -> Iterator[list[Prepared]]:
    """So many files that could be read at a time, with those that could not among them in their place; the last batch may be smaller."""
    batch: list[Prepared] = []
    readable = 0
    for each in prepared:
        batch.append(each)
        readable += not each.fault
        # A long row of faults must not be held back either.
        if readable == batch_size or len(batch) - readable > batch_size:
            yield batch
            batch, readable = [], 0
    if batch:
        yield batch
