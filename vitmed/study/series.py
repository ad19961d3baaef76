"""Runs of one data set that differ in more than patch size and seeds form several series, named by the settings in which they depart.

The usual values of what differs are the recipe's own (configs/vit2d.py, vit3d.py) where some run has them all, however many others there
are; else that of most runs for each setting, the recipe's own or else the first in their order where several are equally frequent. The
plain series departs in nothing. There may be none: then nothing is called plain.
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vitmed import config as config_lib
from vitmed.runs import folder
from vitmed.study import collection, folds

# What may differ within a series: the data set and its recipe's rank, what is swept, and what the config's digest leaves out.
WITHIN_A_SERIES = ("data.name", "data.rank", "model.patch_size", "seeds", *folder.MAY_CHANGE)

Departures = tuple[tuple[str, Any], ...]  # (field, value) of every setting that is not the usual one, sorted


def collect(roots: Sequence[pathlib.Path]) -> tuple[list[collection.Run], list[str]]:
    """(runs, faults): every finished run below the folders in the order of a report, each knowing its series; a line for what is left out.

    InputError where a folder does not exist, or there is no finished run at all.
    """
    runs, faults = collection.read_all(roots)
    runs, folds_missing = folds.pooled(runs)
    runs, strangers = collection.same_data(runs)
    faults += folds_missing + strangers
    runs, twins = without_twins(ordered(named(runs)))
    return runs, faults + twins


def named(runs: Sequence[collection.Run]) -> list[collection.Run]:
    """The same runs, each knowing in what it departs from the usual settings of its data set, and its series' name."""
    found = []
    for members in collection.by_dataset(runs).values():
        departures = _departures(members)
        names = names_of(departures)
        found += [dataclasses.replace(run, departures=odd, series=names[odd]) for run, odd in zip(members, departures, strict=True)]
    return found


def _departures(members: Sequence[collection.Run]) -> list[Departures]:
    """What each run of a data set departs in; a setting that an older run does not have has the recipe's value."""
    defaults = _defaults(members[0].rank)
    settings = [{name: value for name, value in (defaults | run.config).items() if not within(name)} for run in members]
    fields = sorted({name for one in settings for name in one})
    # What a network of several patch sizes does at each of them is one run all the same.
    weights = [1 / len(one["model.patch_sizes"].split(",")) for one in settings]
    usual = {name: _usual([one.get(name) for one in settings], weights, defaults.get(name)) for name in fields}
    differing = [name for name in fields if any(one.get(name) != settings[0].get(name) for one in settings)]
    recipes = {name: defaults.get(name) for name in differing}
    if any(recipes.items() <= one.items() for one in settings):
        usual |= recipes
    return [tuple((name, one.get(name)) for name in fields if one.get(name) != usual[name]) for one in settings]


def _usual(values: Sequence[Any], weights: Sequence[float], default: Any) -> Any:
    """The most frequent value; of equally frequent ones the default, else the first in the order of their texts."""
    counts: dict[Any, float] = collections.defaultdict(float)
    for value, weight in zip(values, weights, strict=True):
        counts[value] += weight
    return min(counts, key=lambda value: (-round(counts[value], 6), value != default, repr(value)))


@functools.cache
def _defaults(rank: int) -> Mapping[str, Any]:
    """The flat config of the study's recipe for a number of axes."""
    return config_lib.flatten(config_lib.load(str(config_lib.shipped_file(f"vit{rank}d.py"))).to_dict())


def within(field: str) -> bool:
    """Whether runs of one series may differ in a field."""
    return any(f"{field}.".startswith(f"{free}.") for free in WITHIN_A_SERIES)


def names_of(departures: Iterable[Departures]) -> dict[Departures, str]:
    """A name for each: its settings in short, such as `learning rate 3e-05`; in full where the short ones do not tell them apart."""
    distinct = list(dict.fromkeys(departures))
    brief = {odd: ", ".join(f"{short(field)} {_text(value)}" for field, value in odd) for odd in distinct}
    twice = {name for name, count in collections.Counter(brief.values()).items() if count > 1}
    return {odd: ", ".join(f"{field} {value!r}" for field, value in odd) if name in twice else name for odd, name in brief.items()}


def short(field: str) -> str:
    """A setting's name as people read it: train.learning_rate -> learning rate."""
    return field.rpartition(".")[2].replace("_", " ")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(_text, value))
    if isinstance(value, str):
        return pathlib.PurePath(value).name or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def without_twins(runs: Sequence[collection.Run]) -> tuple[list[collection.Run], list[str]]:
    """(runs, faults): of runs with the same settings the one with most seeds."""
    kept: dict[tuple, collection.Run] = {}
    faults = []
    for run in runs:
        key = (run.dataset, run.departures, run.patch)
        more, less = sorted((kept.get(key, run), run), key=lambda one: -len(one.seeds))
        kept[key] = more
        if more is not less:
            seeds = f"{len(more.seeds)} seed{'s' * (len(more.seeds) != 1)}"
            faults.append(f"{less.path}: left out: {more.path} has the same settings and {seeds}; seeds of several runs are not pooled")
    return list(kept.values()), faults


def ordered(runs: Iterable[collection.Run]) -> list[collection.Run]:
    """2D before 3D, by data set, the plain series first, then from the coarsest patch to the finest."""
    return sorted(runs, key=lambda run: (run.rank, run.dataset, bool(run.departures), run.series, run.result["num_tokens"], str(run.path)))
