"""Which examples train, validate and test: stratified by class and by group, so that no patient is in two splits; or folds of all.

A split is a pure function of labels, groups, shares and a seed, not of the order of the files.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from vitmed import config

SPLITS = ("train", "val", "test")
ALSO_CALLED = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}


def spread(classes: Sequence[str], groups: Sequence[str], shares: Sequence[float], seed: int) -> np.ndarray:
    """The part [N] of each example: parts have about these shares of every class, and no group is in two of them.

    The largest groups are placed first, each where its classes are still wanted most (a greedy form of stratified group k-fold); `seed`
    decides between groups of one size.
    """
    names, class_of = np.unique(np.asarray(classes), return_inverse=True)
    keys, group_of = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.zeros((len(keys), len(names)))
    np.add.at(counts, (group_of, class_of), 1)
    wanted = np.asarray(shares, float)[:, None] / sum(shares) * counts.sum(axis=0)  # [parts, classes]
    drawn = [hashlib.sha256(f"{seed} {key}".encode()).hexdigest() for key in keys]
    part_of = np.zeros(len(keys), np.int64)
    rarity = 1 / counts.sum(axis=0)
    # Of groups of one size the rarest classes first: what is left for the end can only be evened out with what is common.
    for group in sorted(range(len(keys)), key=lambda index: (-counts[index].sum(), -(counts[index] * rarity).max(), drawn[index])):
        gain = (np.maximum(wanted, 0) * rarity * counts[group]).sum(axis=1)  # how much of it is wanted, by part
        room = np.asarray(shares) > 0
        best = max(range(len(shares)), key=lambda part: (room[part], gain[part], wanted[part].sum()))
        part_of[group] = best
        wanted[best] -= counts[group]
    return part_of[group_of]


def named(splits: Sequence[str], where: str) -> list[str]:
    """The splits that a CSV names, by their usual names; InputError for another word."""
    found = []
    for name in splits:
        usual = ALSO_CALLED.get(name.lower(), name.lower())
        if usual not in SPLITS:
            raise config.InputError(f"{where}: the split {name!r} is unknown; allowed are {', '.join(SPLITS)}")
        found.append(usual)
    return found


def check_groups(splits: Sequence[str], groups: Sequence[str], where: str) -> None:
    """InputError where a group is in two splits: what was learnt of a patient would be tested on that same patient."""
    first: dict[str, str] = {}
    torn = sorted({group for split, group in zip(splits, groups, strict=True) if first.setdefault(group, split) != split})
    if torn:
        shown = ", ".join(torn[:5]) + (f" and {len(torn) - 5} more" if len(torn) > 5 else "")
        raise config.InputError(f"{where}: {len(torn)} groups are in more than one split ({shown}); put each into one, or leave split out")


def drawn(
    classes: Sequence[str], groups: Sequence[str], *, shares: tuple[float, ...], seed: int, folds: int = 0, fold: int = 0
) -> list[str]:
    """The split of each example: by `shares` of train, val, test; or with `folds` fold number `fold` tests and the one after validates."""
    if not folds:
        return [SPLITS[part] for part in spread(classes, groups, shares, seed)]
    names = {fold: "test", (fold + 1) % folds: "val"}
    return [names.get(part, "train") for part in spread(classes, groups, (1.0,) * folds, seed)]


def complete(splits: Sequence[str], classes: Sequence[str], groups: Sequence[str], *, shares: tuple[float, ...], seed: int) -> list[str]:
    """A CSV's splits where validation is among them; else some of the training examples, by group, become it."""
    splits = list(splits)
    if "val" in splits:
        return splits
    training = [index for index, split in enumerate(splits) if split == "train"]
    train_share, val_share = shares[0], shares[1]
    if not training or not val_share:
        return splits
    parts = spread([classes[i] for i in training], [groups[i] for i in training], (train_share, val_share), seed)
    for index, part in zip(training, parts, strict=True):
        splits[index] = SPLITS[part]
    return splits
