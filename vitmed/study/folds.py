"""Cross-validation: the runs of all folds of one setting are pooled into one whose test images are all images, each tested once.

Metrics are of the pooled predictions, so that n is the number of images and intervals are as those of other runs; each fold's images were
predicted by a model that had not seen them. `R` seeds, `N` images.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitmed import config as config_lib
from vitmed import metrics
from vitmed.runs import folder
from vitmed.study import collection

FOLD, FOLDS = "data.fold", "data.folds"


def pooled(runs: Sequence[collection.Run]) -> tuple[list[collection.Run], list[str]]:
    """(runs, faults): with the folds of each setting as one run; a line for each setting of which folds are missing or come twice."""
    groups: dict[Any, list[collection.Run]] = collections.defaultdict(list)
    whole = []
    for run in runs:
        settings = {name: value for name, value in run.config.items() if name != FOLD and not _free(name)}
        if run.config.get(FOLDS):
            groups[tuple(sorted((name, repr(value)) for name, value in settings.items()))].append(run)
        else:
            whole.append(run)
    faults = []
    for members in groups.values():
        seeds = [seed for seed in members[0].seeds if all(seed in run.seeds for run in members)]
        fault = _fault(members, seeds)
        if fault is None:
            whole.append(_pool(sorted(members, key=lambda run: run.config[FOLD]), seeds))
        else:
            faults += [f"{run.path}: left out: {fault}" for run in members]
    return whole, faults


def _fault(members: Sequence[collection.Run], seeds: Sequence[int]) -> str | None:
    """Why runs are not the folds of one cross-validation, each once and on the same examples; None where they are."""
    found, wanted = sorted(run.config[FOLD] for run in members), members[0].config[FOLDS]
    if found != list(range(wanted)):
        return f"folds {', '.join(map(str, found))} of {wanted} are there; cross-validation needs each once"
    if not seeds:
        return "the folds share no seed that has not failed"
    try:
        examples = [folder.RunFolder(run.path).read_examples() for run in members]
    except config_lib.InputError as error:
        return f"it cannot be told which examples the folds tested: {error}"
    everyone = [sorted((row["path"], row["label"], row["group"]) for row in rows) for rows in examples]
    tested = sorted((row["path"], row["label"], row["group"]) for rows in examples for row in rows if row["split"] == "test")
    if any(rows != tested for rows in everyone) or sum(len(run.labels) for run in members) != len(tested):
        return (
            "the folds were made of different examples, so that some were tested twice or never; run all of them on one state of the data"
        )
    return None


def _free(name: str) -> bool:
    return any(f"{name}.".startswith(f"{free}.") for free in folder.MAY_CHANGE)


def _pool(of_folds: Sequence[collection.Run], seeds: Sequence[int]) -> collection.Run:
    """All folds' test images behind one another; times add up, other numbers of cost are means."""
    members = [dataclasses.replace(run, seeds=tuple(seeds), probabilities=_of_seeds(run, seeds)) for run in of_folds]
    first = members[0]
    probabilities = np.concatenate([run.probabilities for run in members], axis=1)
    labels = np.concatenate([run.labels for run in members])
    measured = [metrics.compute(first.task, labels, of_seed).values for of_seed in probabilities]
    counts = [len(run.labels) for run in members]

    def mean(split: str, name: str) -> list[float | None]:
        columns = zip(*(run.of_seeds(split, name) for run in members), strict=True)
        return [None if None in values else float(np.average(values, weights=counts)) for values in columns]

    result = dict(first.result)
    result |= {"seeds": list(seeds), "failed_seeds": []}
    result["test"] = {name: [one[name] for one in measured] for name in metrics.metric_names(first.task)} | {"loss": mean("test", "loss")}
    result["val"] = {name: mean("val", name) for name in first.result["val"]}
    epochs = [[run.result["best_epoch"][run.result["seeds"].index(seed)] for run in members] for seed in seeds]
    result["best_epoch"] = [round(float(np.mean(of_seed))) for of_seed in epochs]
    for name in ("train_seconds", "compile_seconds"):
        result[name] = sum(run.result[name] for run in members)
    for name in ("train_images_per_second", "test_milliseconds_per_image"):
        result[name] = float(np.mean([run.result[name] for run in members]))
    result["data_md5"] = hashlib.md5("".join(str(run.result["data_md5"]) for run in members).encode(), usedforsecurity=False).hexdigest()
    # A fold's temperatures are its own; the pooled predictions have none.
    pooled = {"labels": labels, "probabilities": probabilities, "calibration": None, "config": {**first.config, FOLD: 0}}
    return dataclasses.replace(first, result=result, epochs=(), **pooled)


def _of_seeds(run: collection.Run, seeds: Sequence[int]) -> np.ndarray:
    return run.probabilities[[run.seeds.index(seed) for seed in seeds]]
