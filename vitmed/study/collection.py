"""The finished runs below some folders, read back whole; what cannot be read is named and left out.

`R` seeds, `N` images, `L` labels, `K` classes.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vitmed import config as config_lib
from vitmed import fields as fields_lib
from vitmed.runs import folder
from vitmed.study import operating

MARKS = ("config.json", "result.json", "failure.json")  # files by which a run's folder is known


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its result, its flat config, a row per epoch, and its test predictions without failed seeds [R, N, K]."""

    path: pathlib.Path
    result: Mapping[str, Any]
    config: Mapping[str, Any]
    epochs: Sequence[Mapping[str, Any]]
    labels: np.ndarray
    probabilities: np.ndarray
    seeds: tuple[int, ...]
    departures: tuple[tuple[str, Any], ...] = ()  # the settings in which it is not as usual: see `series`
    series: str = ""
    calibration: Mapping[str, Any] | None = None  # temperatures and operating points, see `operating`

    @property
    def dataset(self) -> str:
        """The data set's name, with its size where that is not MedMNIST's usual 28."""
        name, size = self.result["dataset"], self.config["data.size"]
        return name if set(size) == {28} else f"{name} {config_lib.patch_text(size)}"

    @property
    def task(self) -> str:
        """One of `metrics.TASKS`."""
        return self.result["task"]

    @property
    def rank(self) -> int:
        """Axes of an image."""
        return len(self.result["patch_size"])

    @property
    def patch(self) -> str:
        """The patch size as it is written: 7, or 2x7x7."""
        return config_lib.patch_text(self.result["patch_size"])

    @property
    def name(self) -> str:
        """What a person calls it within its data set."""
        return f"patch {self.patch}" + (f", {self.series}" if self.series else "")

    @property
    def label(self) -> str:
        """Its folder's name; of one of a run's patch sizes after that of the run, such as breast/14."""
        own = self.path.resolve()
        return f"{own.parent.parent.name}/{own.name}" if own.parent.name == folder.AT_PATCH else own.name

    @property
    def fitted(self) -> list[Mapping[str, Any]]:
        """Temperature and operating points of the seeds that have not failed; none where the calibration could not be read."""
        if self.calibration is None:
            return []
        of_seeds = dict(zip(self.result["seeds"], self.calibration["of_seeds"], strict=True))
        return [of_seeds[seed] for seed in self.seeds]

    def of_seeds(self, split: str, metric: str) -> list[float | None]:
        """A metric of the seeds that have not failed."""
        values = dict(zip(self.result["seeds"], self.result[split][metric], strict=True))
        return [values[seed] for seed in self.seeds]


def read_all(roots: Sequence[pathlib.Path]) -> tuple[list[Run], list[str]]:
    """(runs, faults): every finished run below the folders, and a line for each run, or seeds of one, that cannot be taken.

    InputError where a folder does not exist, or there is no finished run at all.
    """
    runs, faults, seen = [], [], set()
    for root in roots:
        if not root.is_dir():
            raise config_lib.InputError(f"--workdir={root}: no such folder; give a run's folder or one that holds runs")
        for path in sorted({file.parent for name in MARKS for file in root.rglob(name)}):
            if path.resolve() in seen or not is_run(path):
                continue
            seen.add(path.resolve())
            try:
                run = read(path)
                epochs, fault = read_epochs(path, num_seeds=len(run.result["seeds"]))
                calibrated, uncalibrated = read_calibration(run)
                runs.append(dataclasses.replace(run, epochs=epochs, calibration=calibrated))
                faults += [found for found in (fault, uncalibrated) if found]
            except (config_lib.InputError, OSError) as error:
                faults.append(f"{path}: left out: {str(error).removeprefix(f'{path}: ')}")
    if not runs:
        why = f": {'; '.join(faults)}" if faults else "; train some with vitmed.main"
        raise config_lib.InputError(f"--workdir={', '.join(map(str, roots))}: no finished run there{why}")
    faults += [
        f"{run.path}: left out: failed seeds {', '.join(map(str, run.result['failed_seeds']))}"
        for run in runs
        if run.result["failed_seeds"]
    ]
    return runs, faults


def is_run(path: pathlib.Path) -> bool:
    """Whether a folder with one of MARKS is a run's; of a config.json alone, which others write too, whether it has a run's sections."""
    if any((path / name).exists() for name in MARKS if name != "config.json"):
        return True
    try:
        config = folder.RunFolder(path).read_config()
    except (config_lib.InputError, OSError):
        return True  # half-written, perhaps: its fault is named
    return {"data", "model", "train"} <= config.keys()


def read(path: pathlib.Path) -> Run:
    """A finished run without its epochs; InputError where it is not finished, damaged, of a newer schema, or its files do not fit."""
    run_folder = folder.RunFolder(path)
    result, failure = run_folder.read_result(), run_folder.read_failure()
    if result is None and failure is not None:
        why = ": ".join(str(failure[key]) for key in ("ended", "said") if failure.get(key))
        raise config_lib.InputError(f"{path}: failed: {why}; mend that and run it again with vitmed.main")
    config = config_lib.as_tuples(run_folder.read_config())
    if result is None:
        raise config_lib.InputError(f"{path}: not finished: there is no result.json; run it again with vitmed.main to go on")
    if folder.digest(config) != result["config_digest"]:
        raise config_lib.InputError(f"{path}: result.json is not of the run that config.json describes; restore them from one copy")
    predictions = run_folder.read_predictions("test")
    if predictions.seeds.tolist() != result["seeds"]:
        raise config_lib.InputError(f"{path}: predictions/test.npz has seeds {predictions.seeds.tolist()}, result.json {result['seeds']}")
    alive = [index for index, seed in enumerate(result["seeds"]) if seed not in result["failed_seeds"]]
    probabilities = predictions.probabilities[alive]
    if not alive or not np.isfinite(probabilities).all():
        raise config_lib.InputError(f"{path}: {'its predictions are not all finite' if alive else 'every seed has failed'}")
    if fault := _labels_fault(result["task"], predictions.labels, probabilities):
        raise config_lib.InputError(f"{path}: {fault}; restore it from a copy")
    return Run(
        path=path,
        result=result,
        config=config_lib.flatten(config_lib.as_tuples(fields_lib.completed(config))),
        epochs=(),
        labels=predictions.labels,
        probabilities=probabilities,
        seeds=tuple(result["seeds"][index] for index in alive),
    )


def read_epochs(path: pathlib.Path, *, num_seeds: int) -> tuple[list[dict[str, Any]], str | None]:
    """(rows of metrics.jsonl, None), or (none, what is wrong with them): a run is whole without its curves."""
    try:
        epochs = folder.RunFolder(path).read_metrics()
        fault = _epochs_fault(epochs, num_seeds)
    except config_lib.InputError as error:
        fault = str(error).removeprefix(f"{path}/")
    if not fault:
        return epochs, None
    return [], f"{path}: learning curves left out: {fault}"


def read_calibration(run: Run) -> tuple[dict[str, Any] | None, str | None]:
    """(the run's calibration, None), or (None, what is wrong with it): a run is whole without it."""
    try:
        record = operating.of_run(folder.RunFolder(run.path), task=run.task, seeds=run.result["seeds"])
        missing = [seed for seed, fitted in zip(run.result["seeds"], record["of_seeds"], strict=True) if seed in run.seeds and not fitted]
        fault = f"it has none of seeds {', '.join(map(str, missing))}" if missing else None
    except config_lib.InputError as error:
        fault = str(error).removeprefix(f"{run.path}/").removeprefix(f"{run.path} ")
    return (None, f"{run.path}: calibration left out: {fault}") if fault else (record, None)


def _labels_fault(task: str, labels: np.ndarray, probabilities: np.ndarray) -> str | None:
    """What is wrong with labels [N, L] of a task with probabilities [R, N, K]."""
    num_classes = probabilities.shape[2]
    columns, classes = (num_classes, 2) if task == "multi-label" else (1, num_classes)
    if labels.shape[1] != columns or (task == "binary" and num_classes != 2):
        return f"predictions/test.npz has {labels.shape[1]} labels and {num_classes} classes, which do not fit its task, {task}"
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        return f"predictions/test.npz has labels from {labels.min()} to {labels.max()}, its task has 0 to {classes - 1}"
    return None


def _epochs_fault(epochs: Sequence[Mapping[str, Any]], num_seeds: int) -> str | None:
    """What is wrong with the first row that does not hold the losses of all seeds."""
    for number, row in enumerate(epochs, start=1):
        val = row.get("val")
        losses = {"train_loss": row.get("train_loss"), "val.loss": val.get("loss") if isinstance(val, Mapping) else None}
        for name, values in losses.items():
            good = isinstance(values, list) and len(values) == num_seeds
            if not good or not all(value is None or isinstance(value, int | float) for value in values):
                return f"metrics.jsonl line {number} has no {name} of {num_seeds} seeds"
    return None


def same_data(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """(runs, faults): of each data set only the runs on the data that most of them used, so that all can be compared image by image."""
    kept, faults = [], []
    for dataset, members in by_dataset(runs).items():
        keys = [(run.result["data_md5"], run.labels.shape, run.labels.tobytes()) for run in members]
        usual = collections.Counter(keys).most_common(1)[0][0]
        kept += [run for run, key in zip(members, keys, strict=True) if key == usual]
        other = "left out: other data (MD5 or labels) than most runs of"
        faults += [f"{run.path}: {other} {dataset}" for run, key in zip(members, keys, strict=True) if key != usual]
    return kept, faults


def by_dataset(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each data set, in the order in which they come."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.dataset, []).append(run)
    return groups
