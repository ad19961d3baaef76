"""Which differences a study asks for, each with its interval and its p-value corrected for how many were asked.

Within a series every patch size against the largest, the paper's fixed contrast among them; between series each run against its
counterpart in the plain one, and slices against patches that are trained alike. All are paired: the same test images and seeds.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from vitmed import metrics
from vitmed.study import statistics, subjects

PAPERS_CONTRAST = {2: ("2", "28"), 3: ("1", "14")}  # small against large patch (arXiv 2602.18614); by rank
METRICS = ("balanced_accuracy", "auc")
VIEWS = "model.views"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`first` minus `second` in `metric`; `adjusted` is its p-value after Holm's correction over the comparisons asked together."""

    first: subjects.Subject
    second: subjects.Subject
    metric: str
    difference: statistics.Difference
    num_seeds: int
    adjusted: float | None = None

    @property
    def num_images(self) -> int:
        """Test images."""
        return len(self.first.labels)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """The paper's contrast in one series, or the nearest to it that was run; `note` says how it departs, or why there is none."""

    comparisons: tuple[Comparison, ...]  # one per metric, none where it cannot be asked
    note: str = ""


class Resampler:
    """Resamples seeds and images together, 2,000 times by default; the same resamples for all that is compared on a data set."""

    def __init__(self, *, resamples: int = 2000, seed: int = 0):
        self._resamples, self._seed = resamples, seed
        self._known: dict[tuple[int, tuple[int, ...]], dict[str, np.ndarray]] = {}
        self._subjects: list[subjects.Subject] = []  # kept, so that an identity is never given to another

    def values(self, subject: subjects.Subject, seeds: tuple[int, ...] | None = None) -> dict[str, np.ndarray]:
        """Per metric its value in every resample [resamples], the mean over these seeds (all by default)."""
        seeds = subject.seeds if seeds is None else seeds
        key = (id(subject), seeds)
        if key not in self._known:
            draws = statistics.draw(subject.task, subject.labels, num_seeds=len(seeds), resamples=self._resamples, seed=self._seed)
            self._known[key] = statistics.distribution(subject.task, subject.labels, _of_seeds(subject, seeds), draws)
            self._subjects.append(subject)
        return self._known[key]

    def intervals(self, subject: subjects.Subject) -> dict[str, statistics.Interval | None]:
        """The mean over seeds of every metric with its interval; None where it is undefined."""
        values, measured = self.values(subject), _means(subject, subject.seeds)
        return {name: None if measured[name] is None else statistics.interval(measured[name], values[name]) for name in measured}

    def resampled(self, subject: subjects.Subject, measures: Sequence[statistics.Measure]) -> dict[str, np.ndarray]:
        """What a measure for each seed of the subject gives in every resample: see `statistics.resampled`."""
        draws = statistics.draw(subject.task, subject.labels, num_seeds=len(measures), resamples=self._resamples, seed=self._seed)
        return statistics.resampled(draws, measures)

    def compare(self, first: subjects.Subject, second: subjects.Subject) -> list[Comparison]:
        """`first` minus `second` in every one of METRICS that is defined, over the seeds that both have; none where they share none."""
        seeds = tuple(seed for seed in first.seeds if seed in second.seeds)
        if not seeds:
            return []
        of_first, of_second = _means(first, seeds), _means(second, seeds)
        found = []
        for metric in METRICS:
            if of_first[metric] is not None and of_second[metric] is not None:
                gap = of_first[metric] - of_second[metric]
                difference = statistics.difference(gap, self.values(first, seeds)[metric], self.values(second, seeds)[metric])
                if difference is not None:
                    found.append(Comparison(first, second, metric, difference, len(seeds)))
        return found


def _of_seeds(subject: subjects.Subject, seeds: Sequence[int]) -> np.ndarray:
    return subject.probabilities[[subject.seeds.index(seed) for seed in seeds]]


def _means(subject: subjects.Subject, seeds: Sequence[int]) -> dict[str, float | None]:
    """Every metric's mean over seeds; None where it is undefined for one."""
    measured = [metrics.compute(subject.task, subject.labels, one).values for one in _of_seeds(subject, seeds)]
    names = metrics.metric_names(subject.task)
    return {name: None if any(one[name] is None for one in measured) else float(np.mean([one[name] for one in measured])) for name in names}


def corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with Holm's correction, over those of each metric."""
    corrected = list(found)
    for metric in METRICS:
        places = [place for place, one in enumerate(found) if one.metric == metric]
        adjusted = statistics.holm([found[place].difference.p_value for place in places])
        for place, value in zip(places, adjusted, strict=True):
            corrected[place] = dataclasses.replace(found[place], adjusted=value)
    return corrected


def gains(series: Sequence[subjects.Subject], resampler: Resampler) -> list[Comparison]:
    """Every run of a series against that of the largest patch, which comes first."""
    largest, *smaller = series
    return corrected([one for subject in smaller for one in resampler.compare(subject, largest)])


def contrast(series: Sequence[subjects.Subject], resampler: Resampler) -> Contrast:
    """The paper's small patch against its large one; where the small one was not run, the smallest that was."""
    small, large = PAPERS_CONTRAST[series[0].rank]
    by_patch = {subject.patch: subject for subject in series if "x" not in subject.patch}
    if large not in by_patch:
        return Contrast((), f"patch {large}, which the paper's contrast starts from, was not run")
    finer = [patch for patch in by_patch if int(patch) < int(large)]
    if not finer:
        return Contrast((), f"no patch smaller than {large} was run")
    taken = small if small in by_patch else min(finer, key=int)
    note = "" if taken == small else f"patch {small}, the paper's small patch, was not run; {taken} is the smallest that was"
    found = tuple(resampler.compare(by_patch[taken], by_patch[large]))
    return Contrast(found, note if found else f"patches {taken} and {large} have no seed in common")


def counterparts(plain: Sequence[subjects.Subject], other: Sequence[subjects.Subject], resampler: Resampler) -> list[Comparison]:
    """Each run of another series against the plain one's of the same patch size, else of the same number of tokens."""
    by_patch = {subject.patch: subject for subject in plain}
    by_tokens = {subject.run.result["num_tokens"]: subject for subject in plain}
    pairs = [(subject, by_patch.get(subject.patch) or by_tokens.get(subject.run.result["num_tokens"])) for subject in other]
    different = [(subject, same) for subject, same in pairs if same is not None and same.runs != subject.runs]  # a chosen run may be plain
    return corrected([one for subject, same in different for one in resampler.compare(subject, same)])


def other_views(
    members: Sequence[subjects.Subject], resampler: Resampler, *, known: Sequence[Comparison] = ()
) -> tuple[list[Comparison], list[Comparison]]:
    """(slices against patches, several views against other ones): runs that differ in `model.views`, two by two, but for pairs `known`.

    They have the patch size in common; slices and patches may instead have about as many tokens, up to a quarter more of either.
    """
    alike: dict[tuple, list[subjects.Subject]] = {}
    for member in members:
        rest = tuple(departure for departure in member.run.departures if departure[0] != VIEWS)
        alike.setdefault(rest, []).append(member)
    there = [{id(one.first), id(one.second)} for one in known]
    of_patches, of_views = [], []
    for group in alike.values():
        for second, first in itertools.combinations(sorted(group, key=lambda member: len(views_of(member))), 2):
            if views_of(first) != views_of(second) and _comparable(first, second) and {id(first), id(second)} not in there:
                (of_views if views_of(second) else of_patches).extend(resampler.compare(first, second))
    return corrected(of_patches), corrected(of_views)


def _comparable(first: subjects.Subject, second: subjects.Subject) -> bool:
    few, many = sorted(one.run.result["num_tokens"] for one in (first, second))
    about_as_many = many <= 1.25 * few and not (views_of(first) and views_of(second))
    return first.patch == second.patch or about_as_many


def views_of(subject: subjects.Subject) -> list[str]:
    """The views of the slices that a run sees, none of patches."""
    return [view for view in str(subject.run.config.get(VIEWS, "")).split(",") if view]
