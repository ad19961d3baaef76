"""What a data source hands over: uint8 images, integer labels, and a description of the set; the same for every source.

Shapes: `N` examples, `*S` H,W or D,H,W, `C` channels (1 or 3), `L` labels of one example, `K` classes.
"""

import dataclasses
import hashlib
from typing import Any, BinaryIO

import numpy as np

from vitmed import metrics


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [N, *S, C], labels int32 [N, L] and, where lesions are drawn, their masks bool [N, *S].

    `examples` say of each whence it came (path, label, group) where it is a file of its own.
    """

    images: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None
    examples: tuple[dict[str, str], ...] | None = None


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


def of_record(record: Any) -> Description:
    """The description that `dataclasses.asdict` and JSON turned into `record`; ValueError or TypeError where that is broken."""
    made = Description(**{**record, "class_names": tuple(record["class_names"]), "image_size": tuple(record["image_size"])})
    texts = (made.name, made.task, made.licence, *made.class_names)
    counts = (*made.image_size, made.num_channels, *made.num_examples.values())
    good = all(isinstance(text, str) for text in texts) and made.task in metrics.TASKS and made.rank in (2, 3) and bool(made.class_names)
    good = good and all(type(count) is int and count >= 0 for count in counts) and set(made.num_examples) == {"train", "val", "test"}
    if not (good and isinstance(made.synthetic, bool) and made.num_channels in (1, 3) and min(made.image_size) > 0):
        raise ValueError("not a description")
    return made


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A set in memory: splits "train", "val" and "test"; md5 of the file that was read, None for a generated set.

    Of own data md5 is of images, labels and splits, and `words` are lines that say what was read.
    """

    description: Description
    splits: dict[str, Split]
    md5: str | None
    words: str = ""


def inverted(dataset: Dataset) -> Dataset:
    """The set with (256 - x) mod 256 for every value x of its images: what 255 * x is in uint8, where the study's code overflows.

    The MD5 stays that of the file.
    """
    splits = {name: dataclasses.replace(split, images=np.negative(split.images)) for name, split in dataset.splits.items()}
    return dataclasses.replace(dataset, splits=splits)


def md5_of(file: BinaryIO) -> str:
    """MD5 (hexadecimal) of a whole open file, read in blocks."""
    file.seek(0)
    return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
