"""The finished runs below some folders, read back whole and sorted; what cannot be read is named and left out.

Runs of one data set that differ in more than patch size and seeds form several series. A series is named by the settings in which it
departs from what is usual among these runs, the plain one by nothing. `R` seeds, `N` images, `L` labels, `K` classes.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vitmed import config as config_lib
from vitmed.runs import folder

# What may differ within a series: the data set and its recipe's rank, what is swept, and what the config's digest leaves out.
WITHIN_A_SERIES = ("data.name", "data.rank", "data.root", "model.patch_size", "seeds", "mesh", "tracking", "train.checkpoint_seconds")


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
    series: str = ""

    @property
    def dataset(self) -> str:
        """The data set's name, with its size where that is not MedMNIST's usual 28."""
        name, size = self.result["dataset"], self.config["data.size"]
        return name if size == 28 else f"{name} {size}"

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

    def of_seeds(self, split: str, metric: str) -> list[float | None]:
        """A metric of the seeds that have not failed."""
        values = dict(zip(self.result["seeds"], self.result[split][metric], strict=True))
        return [values[seed] for seed in self.seeds]


def collect(roots: Sequence[pathlib.Path]) -> tuple[list[Run], list[str]]:
    """(runs, faults): every finished run below the folders, and a line for each folder that looks like a run but cannot be taken.

    InputError where a folder does not exist, or there is no finished run at all.
    """
    runs, faults, seen = [], [], set()
    for root in roots:
        if not root.is_dir():
            raise config_lib.InputError(f"--workdir={root}: no such folder; give a run's folder or one that holds runs")
        for path in sorted({file.parent for name in ("config.json", "result.json") for file in root.rglob(name)}):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                runs.append(read(path))
            except (config_lib.InputError, OSError) as error:
                faults.append(f"{path}: left out: {str(error).removeprefix(f'{path}: ')}")
    if not runs:
        why = f": {'; '.join(faults)}" if faults else "; train some with vitmed.main"
        raise config_lib.InputError(f"--workdir={', '.join(map(str, roots))}: no finished run there{why}")
    runs, strangers = same_data(runs)
    runs, twins = without_twins(ordered(with_series(runs)))
    return runs, faults + strangers + twins


def read(path: pathlib.Path) -> Run:
    """A finished run; InputError where it is not finished, damaged, of a newer schema, or its files do not fit together."""
    run_folder = folder.RunFolder(path)
    result, config = run_folder.read_result(), config_lib.as_tuples(run_folder.read_config())
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
    return Run(
        path=path,
        result=result,
        config=config_lib.flatten(config),
        epochs=run_folder.read_metrics(),
        labels=predictions.labels,
        probabilities=probabilities,
        seeds=tuple(result["seeds"][index] for index in alive),
    )


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


def with_series(runs: Sequence[Run]) -> list[Run]:
    """The same runs, each knowing the name of its series: the settings in which it departs from the usual ones of its data set."""
    named = []
    for members in by_dataset(runs).values():
        fields = sorted({name for run in members for name in run.config if not _within(name)})
        usual = {name: _usual(run.config.get(name) for run in members) for name in fields}
        for run in members:
            odd = {name: run.config[name] for name in fields if name in run.config and run.config[name] != usual[name]}
            named.append(dataclasses.replace(run, series=", ".join(f"{short(name)} {_text(value)}" for name, value in odd.items())))
    return named


def without_twins(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """(runs, faults): of runs with the same settings the one with most seeds."""
    kept: dict[tuple[str, str, str], Run] = {}
    faults = []
    for run in runs:
        key = (run.dataset, run.series, run.patch)
        more, less = sorted((kept.get(key, run), run), key=lambda one: -len(one.seeds))
        kept[key] = more
        if more is not less:
            faults.append(f"{less.path}: left out: {more.path} has the same settings and {len(more.seeds)} seeds")
    return list(kept.values()), faults


def _within(name: str) -> bool:
    return any(f"{name}.".startswith(f"{free}.") for free in WITHIN_A_SERIES)


def _usual(values: Iterable[Any]) -> Any:
    """The most frequent value; of equally frequent ones that which comes first."""
    return collections.Counter(values).most_common(1)[0][0]


def short(field: str) -> str:
    """A setting's name as people read it: train.learning_rate -> learning rate."""
    return field.rpartition(".")[2].replace("_", " ")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else pathlib.PurePath(value).name if isinstance(value, str) else str(value)


def ordered(runs: Iterable[Run]) -> list[Run]:
    """2D before 3D, by data set, the plain series first, then from the coarsest patch to the finest."""
    return sorted(runs, key=lambda run: (run.rank, run.dataset, bool(run.series), run.series, run.result["num_tokens"], str(run.path)))
