"""Own data, `folder:PATH`: a CSV or folders of PNG, JPEG, TIFF, NIfTI and DICOM files become a set like any other.

What is there and how it is split is known from names and headers (`describe`); `load` prepares every file once and keeps the outcome in
the user's cache. Every file counts: one that cannot be read ends the run with its name, nothing is dropped.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vitmed import config
from vitmed.data import dataset, listing, preparation, prepared, splits, stored, volumes

PREFIX = "folder:"
TASKS = ("auto", "binary", "multi-class", "multi-label", "ordinal")
JOINT = "|"  # between the labels of one image; none at all is written as "none"
NONE = "none"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How own data are read, as the config's section `data` says: sizes and spacings with one entry per axis or one for all."""

    rank: int
    spacing: tuple[float, ...] = (0.0,)
    window: str = "auto"
    task: str = "auto"
    classes: tuple[str, ...] = ()
    shares: tuple[float, ...] = (0.7, 0.1, 0.2)
    split_seed: int = 0
    folds: int = 0
    fold: int = 0
    cache: str = ""


@dataclasses.dataclass(frozen=True)
class Inventory:
    """What is there before a pixel is read: entries with split, group and classes, and what was passed over."""

    where: str
    entries: tuple[listing.Entry, ...]
    splits: tuple[str, ...]
    task: str
    class_names: tuple[str, ...]
    skipped: dict[str, int]
    unused: tuple[str, ...]

    @property
    def labels(self) -> np.ndarray:
        """int32 [N, L]."""
        place = {name: index for index, name in enumerate(self.class_names)}
        if self.task != "multi-label":
            return np.array([[place[entry.label]] for entry in self.entries], np.int32)
        found = np.zeros((len(self.entries), len(place)), np.int32)
        for row, entry in zip(found, self.entries, strict=True):
            row[[place[name] for name in parts(entry.label)]] = 1
        return found

    def of_split(self, split: str) -> list[int]:
        """The examples' numbers, in order."""
        return [index for index, each in enumerate(self.splits) if each == split]


def parts(label: str) -> list[str]:
    """The labels of one image, written a|b; none of them for 'none'."""
    return [name.strip() for name in label.split(JOINT) if name.strip() not in ("", NONE)]


def path_of(name: str, root: str = "") -> pathlib.Path:
    """Where `folder:PATH` lies: PATH, relative to `root` where that is given. InputError where there is none."""
    if not name.removeprefix(PREFIX):
        raise config.InputError(f"data.name={name}: names no folder; write folder:PATH, where PATH is a CSV or a folder")
    path = pathlib.Path(name.removeprefix(PREFIX)).expanduser()
    return pathlib.Path(root).expanduser() / path if root else path


def inventory(name: str, settings: Settings, *, root: str = "", whole: bool = False) -> Inventory:
    """The examples, their splits and classes; InputError. `whole`: of a set that names no splits, all of it is `test`."""
    path = path_of(name, root)
    found = listing.labelled(path, settings.rank)
    entries, where = found.entries, str(path)
    task, class_names = _classes(entries, settings, where)
    classes = [JOINT.join(sorted(parts(entry.label))) if task == "multi-label" else entry.label for entry in entries]
    groups = [entry.group if entry.group is not None else f"file {entry.name}" for entry in entries]
    if entries[0].split is not None and settings.folds:
        raise config.InputError(
            f"data.folds={settings.folds}: {where} names splits of its own; take that column out, or set data.folds to 0"
        )
    if entries[0].split is not None:
        of_each = splits.named([entry.split for entry in entries], where)
        if entries[0].group is not None:
            splits.check_groups(of_each, groups, where)
        if not whole:
            of_each = splits.complete(of_each, classes, groups, shares=settings.shares, seed=settings.split_seed)
    elif whole:
        of_each = ["test"] * len(entries)
    else:
        how = {"shares": settings.shares, "seed": settings.split_seed, "folds": settings.folds, "fold": settings.fold}
        of_each = splits.drawn(classes, groups, **how)
    made = Inventory(where, entries, tuple(of_each), task, class_names, found.skipped, found.unused)
    if not whole:
        _check_splits(made)
    return made


def _classes(entries: Sequence[listing.Entry], settings: Settings, where: str) -> tuple[str, tuple[str, ...]]:
    """(task, class names): as the labels say, in the order of `data.classes` or of their names, numbers by size."""
    multi = settings.task == "multi-label" or (settings.task == "auto" and any(JOINT in entry.label for entry in entries))
    there = {name for entry in entries for name in (parts(entry.label) if multi else [entry.label])}
    numbers = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in there)
    names = tuple(sorted(there, key=(lambda name: (int(name), name)) if numbers else None))
    if settings.classes:
        names = settings.classes
        unknown = sorted(there - set(names))
        if unknown or len(set(names)) != len(names):
            fault = f"{where} has the labels {', '.join(unknown)} besides" if unknown else "a class is named twice"
            raise config.InputError(f"data.classes={','.join(names)}: {fault}; name every class once")
    if len(names) < (1 if multi else 2):
        raise config.InputError(f"{where}: all labels are {', '.join(names) or NONE}; at least two classes are needed")
    task = settings.task if settings.task != "auto" else "multi-label" if multi else "binary" if len(names) == 2 else "multi-class"
    if (task == "binary") != (len(names) == 2 and not multi) and task in ("binary", "multi-class"):
        raise config.InputError(f"data.task={task}: {where} has {len(names)} classes ({', '.join(names[:9])}); set data.task=auto")
    return task, names


def _check_splits(made: Inventory) -> None:
    """InputError where a split is empty or training lacks a class that another split has."""
    counts = {split: len(made.of_split(split)) for split in splits.SPLITS}
    if empty := [split for split, count in counts.items() if not count]:
        raise config.InputError(
            f"{made.where}: no examples for {' and '.join(empty)} among {len(made.entries)}; add examples, "
            "change data.shares, or name the splits in a column `split`"
        )
    labels = made.labels
    held = labels if made.task == "multi-label" else np.eye(len(made.class_names), dtype=np.int32)[labels[:, 0]]
    trained = held[made.of_split("train")].any(axis=0)
    unseen = [name for name, seen, there in zip(made.class_names, trained, held.any(axis=0), strict=True) if there and not seen]
    if unseen:
        raise config.InputError(f"{made.where}: no training example of {', '.join(unseen)}; a class that is never seen cannot be learnt")


def describe(name: str, size: Sequence[int], settings: Settings, *, root: str = "", whole: bool = False) -> dataset.Description:
    """What the set is, from names and headers; InputError. With `size` 0 the images' own shape, which must be the same in all."""
    made = inventory(name, settings, root=root, whole=whole)
    return _description(name, made, *_shapes(made, size, settings))


def _description(name: str, made: Inventory, image_size: tuple[int, ...], num_channels: int) -> dataset.Description:
    return dataset.Description(
        name=name,
        task=made.task,
        class_names=made.class_names,
        image_size=image_size,
        num_channels=num_channels,
        num_examples={split: len(made.of_split(split)) for split in splits.SPLITS},
        licence="unknown: data of its user's own",
        synthetic=False,
    )


def _shapes(made: Inventory, size: Sequence[int], settings: Settings) -> tuple[tuple[int, ...], int]:
    """(*S, C) of the prepared images, three channels where any has colours; `load` holds every file against that."""
    first, image = _first(made.entries, settings.rank)
    channels = max(image.values.shape[-1], *(volumes.num_channels(entry.path) for entry in made.entries))
    how = preparation.Preparation(settings.rank, channels, tuple(size), settings.spacing, settings.window)
    target = preparation.target(image, how, first.path)
    return tuple(wanted or own for wanted, own in zip(how.per_axis(how.size), target, strict=True)), channels


def _first(entries: Sequence[listing.Entry], rank: int) -> tuple[listing.Entry, stored.Image]:
    """The first example that can be read; `load` names those that cannot, unless it is all of them: the first one's fault is raised."""
    faults = []
    for entry in entries:
        try:
            return entry, volumes.read(entry.path, rank)
        except stored.Unreadable as error:
            faults.append(error)
    raise faults[0]


def load(
    name: str, size: Sequence[int], settings: Settings, *, root: str = "", whole: bool = False, num_channels: int = 0
) -> dataset.Dataset:
    """The set in memory; each file is prepared once and kept in the cache. InputError, MachineError.

    `num_channels`: of a model that stands already; 0: as `describe` finds.
    """
    made = inventory(name, settings, root=root, whole=whole)
    image_size, found_channels = _shapes(made, size, settings)
    how = preparation.Preparation(settings.rank, num_channels or found_channels, tuple(size), settings.spacing, settings.window)
    arrays, report = prepared.load(made.entries, how, cache=settings.cache, where=made.where)
    if arrays.images.shape[1:-1] != image_size:
        raise ValueError(f"prepared to {arrays.images.shape[1:-1]}, described as {image_size}")
    labels = made.labels
    found = {}
    for split in splits.SPLITS:
        rows = made.of_split(split)
        found[split] = dataset.Split(
            arrays.images[rows],
            labels[rows],
            masks=None if arrays.masks is None else arrays.masks[rows],
            examples=tuple(_record(made.entries[row]) for row in rows),
        )
    description = _description(name, made, image_size, how.num_channels)
    return dataset.Dataset(description, found, _md5(arrays.digest, labels, made.splits), words(made, report))


def words(made: Inventory, report: prepared.Report) -> str:
    """What was read, in lines: counts by class and split, shapes, spacings, what was passed over and why."""
    lines = [f"{made.where}: {len(made.entries)} examples, {made.task}"]
    for split in splits.SPLITS:
        counts = _counts(made, split)
        lines.append(f"  {split:<5} {len(made.of_split(split)):>6}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    if any(entry.group is not None for entry in made.entries):
        lines.append(f"  groups {len({entry.group for entry in made.entries})}, none in two splits")
    else:
        lines.append("  no column `group`: every file counts as a patient of its own")
    if made.unused:
        lines.append(f"  columns not used: {', '.join(made.unused)}"[:300])
    for what, counts in (("stored shapes", report.shapes), ("spacings in mm", report.spacings)):
        shown = [f"{text} ({count})" for text, count in list(counts.items())[: listing.SHOWN]]
        more = [f"and {len(counts) - listing.SHOWN} others"] if len(counts) > listing.SHOWN else []
        lines.append(f"  {what}: " + ", ".join(shown + more))
    for reason, count in made.skipped.items():
        if count:
            lines.append(f"  passed over: {count} files, {reason}")
    if report.copies:
        torn = [pair for pair in report.copies if made.splits[pair[0]] != made.splits[pair[1]]]
        example = "".join(f" ({made.entries[a].name} and {made.entries[b].name})" for a, b in (torn or report.copies)[:1])
        lines.append(
            f"  {len(report.copies)} files are copies of others{example}; {len(torn)} of them are in another split than their twin"
        )
    if report.flat:
        lines.append(f"  of {report.flat} images one value is left everywhere: look at data.window")
    if report.lost_masks:
        lines.append(f"  of {report.lost_masks} masks nothing is left at this size: too small for its voxels")
    return "\n".join(lines)


def _record(entry: listing.Entry) -> dict[str, str]:
    return {"path": entry.name, "label": entry.label, "group": entry.group or ""}


def _counts(made: Inventory, split: str) -> dict[str, int]:
    """Examples of each class in a split."""
    rows = made.labels[made.of_split(split)]
    held = rows.sum(axis=0) if made.task == "multi-label" else np.bincount(rows[:, 0], minlength=len(made.class_names))
    return dict(zip(made.class_names, held.tolist(), strict=True))


def _md5(digest: str, labels: np.ndarray, of_each: Iterable[str]) -> str:
    """MD5 over what a run is trained and measured on: images, labels, splits."""
    said: Any = [digest, labels.tolist(), list(of_each)]
    return hashlib.md5(json.dumps(said).encode(), usedforsecurity=False).hexdigest()
