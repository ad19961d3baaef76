"""What a study compares: runs, ensembles of them, and the runs whose learning rate validation chose. `R` seeds, `N` images, `K` classes."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from vitmed import config as config_lib
from vitmed import metrics
from vitmed.study import collection
from vitmed.study import series as series_lib

PAPERS_ENSEMBLE = ("4", "2", "1")  # patch sizes whose mean probability the paper reports (arXiv 2602.18614)
RATE = "train.learning_rate"
CHOSEN = f"{series_lib.short(RATE)} chosen on validation loss"


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """One set of predictions of a test split: labels int [N, L], probabilities [R, N, K] of the seeds [R].

    `patch` is a run's patch size, or those of an ensemble's members, 4+2+1. `runs` are the run, or the members.
    """

    runs: tuple[collection.Run, ...]
    series: str
    patch: str
    seeds: tuple[int, ...]
    probabilities: np.ndarray

    @property
    def dataset(self) -> str:
        """The data set's name."""
        return self.runs[0].dataset

    @property
    def task(self) -> str:
        """One of `metrics.TASKS`."""
        return self.runs[0].task

    @property
    def rank(self) -> int:
        """Axes of an image."""
        return self.runs[0].rank

    @property
    def labels(self) -> np.ndarray:
        """int [N, L]."""
        return self.runs[0].labels

    @property
    def run(self) -> collection.Run | None:
        """The run, None of an ensemble."""
        return self.runs[0] if len(self.runs) == 1 else None

    @property
    def name(self) -> str:
        """What a person calls it within its data set."""
        word = "patch" if self.run else "ensemble of patches"
        return f"{word} {self.patch}" + (f", {self.series}" if self.series else "")

    def measured(self) -> dict[str, list[float | None]]:
        """Every metric of `metrics.compute`, a value per seed."""
        values = [metrics.compute(self.task, self.labels, of_seed).values for of_seed in self.probabilities]
        return {name: [value[name] for value in values] for name in metrics.metric_names(self.task)}


def of_runs(runs: Sequence[collection.Run]) -> list[Subject]:
    """A subject per run."""
    return [Subject((run,), run.series, run.patch, run.seeds, run.probabilities) for run in runs]


def ensemble(members: Sequence[Subject]) -> Subject:
    """The mean of the members' probabilities, seed by seed, of the seeds that all of them have; InputError where they do not fit."""
    first = members[0]
    for other in members[1:]:
        if other.dataset != first.dataset or not np.array_equal(other.labels, first.labels):
            where = f"{other.runs[0].path} ({other.dataset}) and {first.runs[0].path} ({first.dataset})"
            raise config_lib.InputError(f"an ensemble needs runs on the same images: {where} are on different ones; take one data set")
    seeds = tuple(seed for seed in first.seeds if all(seed in member.seeds for member in members))
    if not seeds:
        raise config_lib.InputError(
            f"an ensemble needs a seed that all have: {', '.join(str(one.runs[0].path) for one in members)} share none"
        )
    aligned = [member.probabilities[[member.seeds.index(seed) for seed in seeds]] for member in members]
    mean = np.mean(aligned, axis=0, dtype=np.float64)
    return Subject(tuple(run for one in members for run in one.runs), first.series, "+".join(one.patch for one in members), seeds, mean)


def ensembles(members: Sequence[Subject], wanted: Iterable[Sequence[str]] = ()) -> list[Subject]:
    """The ensembles of one data set's series: those of the patch sizes `wanted`, else the paper's and that of all patch sizes.

    Of the paper's three patch sizes those that are there, if at least two. Wanted ones that this series lacks are left out.
    """
    by_patch = {member.patch: member for member in members}
    named = [tuple(patch for patch in PAPERS_ENSEMBLE if patch in by_patch), tuple(by_patch)]
    picked = [tuple(patches) for patches in wanted] or named
    distinct = dict.fromkeys(patches for patches in picked if len(patches) > 1 and all(patch in by_patch for patch in patches))
    return [made for patches in distinct if (made := _if_any_seed([by_patch[patch] for patch in patches]))]


def _if_any_seed(members: Sequence[Subject]) -> Subject | None:
    common = set.intersection(*(set(member.seeds) for member in members))
    return ensemble(members) if common else None


def chosen_rates(members: Sequence[Subject]) -> list[Subject]:
    """Of one data set, for each patch size the run whose learning rate has the lowest mean validation loss; none where rates do not vary.

    Only runs that differ in nothing else than patch size and learning rate are weighed against each other, and only those with as many
    seeds left as any of them: a rate at which seeds diverge is not judged by those that did not. A series for each group of other settings.
    """
    rates: dict[tuple[series_lib.Departures, str], list[Subject]] = {}
    for member in members:
        others = tuple((field, value) for field, value in member.run.departures if field != RATE)
        rates.setdefault((others, member.patch), []).append(member)
    names = series_lib.names_of(others for others, _ in rates)
    chosen = []
    for (others, _), weighed in rates.items():
        if len({member.run.config[RATE] for member in weighed}) > 1:
            most = max(len(member.seeds) for member in weighed)
            whole = [member for member in weighed if len(member.seeds) == most]
            best = min(whole, key=lambda member: metrics.mean_and_sd(member.run.of_seeds("val", "loss"))[0])
            chosen.append(dataclasses.replace(best, series=", ".join(filter(None, (CHOSEN, names[others])))))
    return sorted(chosen, key=lambda one: (one.series, one.run.result["num_tokens"]))
