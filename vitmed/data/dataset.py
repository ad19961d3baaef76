"""What a data source hands over: uint8 images, integer labels, and a description of the set; the same for every source.

Shapes: `N` examples, `*S` H,W or D,H,W, `C` channels (1 or 3), `L` labels of one example, `K` classes.
"""

import dataclasses
import hashlib
from typing import BinaryIO

import numpy as np


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
