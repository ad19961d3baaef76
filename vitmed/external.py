"""External validation: another set than the one that a run was trained on, read as the run reads its own, its classes found by name."""

import dataclasses

import numpy as np

from vitmed import config as config_lib
from vitmed import planning
from vitmed.data import folder, listing, sources


def load(name: str, planned: planning.Experiment, *, root: str) -> sources.Dataset:
    """A set by name, or `folder:PATH`, with the run's size, spacing, window and channels and labels that count the run's classes.

    `root` is where a named set's file is looked for. Of a folder that names no splits all of it is `test`. Its classes may be fewer than
    the run's, and in another order. InputError where task, rank or channels are others, or a class is none of the run's.
    """
    return _own(name, planned) if sources.is_own(name) else _named(name, planned, root)


def _own(name: str, planned: planning.Experiment) -> sources.Dataset:
    trained, config = planned.description, planned.config
    found = listing.labelled(folder.path_of(name), trained.rank)
    multi = trained.task == "multi-label"
    _check_classes(name, {each for entry in found.entries for each in (folder.parts(entry.label) if multi else [entry.label])}, trained)
    settings = folder.Settings(
        rank=trained.rank,
        spacing=config.data.spacing,
        window=config.data.window,
        task=trained.task,
        classes=trained.class_names,
        cache=config.data.cache,
    )
    # With data.size=0 a run takes images of the shape that its own had.
    size = tuple(wanted or own for wanted, own in zip(planned.preparation.per_axis(config.data.size), trained.image_size, strict=True))
    return _inverted(folder.load(name, size, settings, whole=True, num_channels=trained.num_channels), planned)


def _named(name: str, planned: planning.Experiment, root: str) -> sources.Dataset:
    trained, data = planned.description, planned.config.data
    described = sources.describe(name, data.size)
    for what, theirs, ours in (("rank", described.rank, trained.rank), ("task", described.task, trained.task)):
        if theirs != ours:
            raise config_lib.InputError(f"--dataset={name}: its {what} is {theirs}, that of the run is {ours}; choose another set")
    if described.num_channels not in (1, trained.num_channels):
        raise config_lib.InputError(f"--dataset={name}: its images are in colour, the run's are gray; choose another set")
    if described.image_size != trained.image_size:
        raise config_lib.InputError(f"--dataset={name}: its images are {described.image_size}, the run's {trained.image_size}")
    _check_classes(name, set(described.class_names), trained)
    loaded = sources.load(name, size=data.size, root=root, verify=data.verify)
    numbers = np.array([trained.class_names.index(each) for each in described.class_names])
    splits = {}
    for split, arrays in loaded.splits.items():
        labels = numbers[arrays.labels].astype(np.int32)
        if trained.task == "multi-label":
            labels = np.zeros((len(arrays.labels), trained.num_classes), np.int32)
            labels[:, numbers] = arrays.labels
        splits[split] = dataclasses.replace(arrays, labels=labels)
    described = dataclasses.replace(described, class_names=trained.class_names)
    return _inverted(dataclasses.replace(loaded, description=described, splits=splits), planned)


def _inverted(dataset: sources.Dataset, planned: planning.Experiment) -> sources.Dataset:
    return sources.inverted(dataset) if planned.config.data.invert else dataset


def _check_classes(name: str, theirs: set[str], trained: sources.Description) -> None:
    if unknown := sorted(theirs - set(trained.class_names)):
        raise config_lib.InputError(
            f"--dataset={name}: its classes {', '.join(unknown)} are none of the run's, which are {', '.join(trained.class_names)}; "
            "give them the run's names"
        )
