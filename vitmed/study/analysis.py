"""From runs to everything that a report says: subjects with intervals, gains, contrasts, ensembles, and what holds over data sets."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from vitmed import metrics
from vitmed.study import calibration, classes, collection, comparisons, operating, statistics, subjects


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What temperature scaling does to a run's expected calibration error on the test split: the temperatures [R] are validation's."""

    temperatures: list[float]
    before: statistics.Interval
    after: statistics.Interval


@dataclasses.dataclass(frozen=True)
class Measured:
    """A subject with what it scores: per metric a value per seed and the interval of their mean; calibration per seed.

    Of runs also every class by itself, and temperature scaling where the run's calibration could be read.
    """

    subject: subjects.Subject
    per_seed: dict[str, list[float | None]]
    intervals: dict[str, statistics.Interval | None]
    brier_score: list[float]
    expected_calibration_error: list[float]
    of_classes: tuple[classes.OfClass, ...] = ()
    scaling: Scaling | None = None


@dataclasses.dataclass(frozen=True)
class Series:
    """Runs of one data set that differ in patch size alone, from the largest patch to the smallest, and their ensembles."""

    name: str
    runs: tuple[Measured, ...]
    ensembles: tuple[Measured, ...]
    gains: tuple[comparisons.Comparison, ...]
    contrast: comparisons.Contrast
    of_ensembles: tuple[comparisons.Comparison, ...]  # each against its best member by validation loss
    against_plain: tuple[comparisons.Comparison, ...]

    @property
    def members(self) -> tuple[Measured, ...]:
        """Runs, then ensembles."""
        return self.runs + self.ensembles


@dataclasses.dataclass(frozen=True)
class DataSet:
    """All series of one data set, the plain one first if there is one."""

    name: str
    source: str  # its name whatever the size of its images
    task: str
    rank: int
    num_pixels: tuple[int, ...]  # of an image as it is stored, along each axis or along all
    num_images: int
    series: tuple[Series, ...]
    against_patches: tuple[comparisons.Comparison, ...]  # slices, trained alike
    other_views: tuple[comparisons.Comparison, ...]

    @property
    def plain(self) -> Series | None:
        """The series with the usual settings, which the others are held against."""
        return None if self.series[0].name else self.series[0]

    @property
    def synthetic(self) -> bool:
        """Whether its images are generated."""
        return self.name.startswith("phantom")


@dataclasses.dataclass(frozen=True)
class Across:
    """The plain series' contrasts of all data sets of one rank: Wilcoxon's signed-rank test, None with too few sets.

    A data set at several image sizes is one set, not several: that of the smallest size stands for it.
    """

    rank: int
    metric: str
    contrasts: dict[str, comparisons.Comparison]
    p_value: float | None


@dataclasses.dataclass(frozen=True)
class Study:
    """What a report is made of; `faults` says which folders are left out and why."""

    data_sets: tuple[DataSet, ...]
    across: tuple[Across, ...]
    faults: tuple[str, ...]
    resamples: int


def analyse(
    runs: Sequence[collection.Run], *, faults: Sequence[str] = (), ensembles: Sequence[Sequence[str]] = (), resamples: int = 2000
) -> Study:
    """Measure and compare the runs; `ensembles` are patch sizes that belong together, by default the paper's and all."""
    resampler = comparisons.Resampler(resamples=resamples)
    sets = tuple(_data_set(members, ensembles, resampler) for members in collection.by_dataset(runs).values())
    return Study(sets, _across(sets), tuple(faults), resamples)


def _measure(subject: subjects.Subject, resampler: comparisons.Resampler) -> Measured:
    task, labels = subject.task, subject.labels
    of_classes, scaling = _details(subject, resampler) if subject.run else ((), None)
    return Measured(
        subject,
        subject.measured(),
        resampler.intervals(subject),
        brier_score=[calibration.brier_score(task, labels, one) for one in subject.probabilities],
        expected_calibration_error=[calibration.expected_calibration_error(task, labels, one) for one in subject.probabilities],
        of_classes=of_classes,
        scaling=scaling,
    )


def _details(subject: subjects.Subject, resampler: comparisons.Resampler) -> tuple[tuple[classes.OfClass, ...], Scaling | None]:
    """Classes and calibration of a run, all from one pass over the resamples."""
    task, labels, before = subject.task, subject.labels, subject.probabilities
    temperatures = [fitted["temperature"] for fitted in subject.run.fitted]
    scaled = {"before": before}
    if temperatures:
        scaled["after"] = [operating.temper(task, one, temperature) for one, temperature in zip(before, temperatures, strict=True)]
    values = resampler.resampled(subject, [_detail(task, labels, seed, scaled) for seed in range(len(before))])
    errors = {}
    for name, probabilities in scaled.items():
        mean = float(np.mean([calibration.expected_calibration_error(task, labels, one) for one in probabilities]))
        errors[name] = statistics.interval(mean, values[name])
    return classes.of_seeds(task, labels, before, values), Scaling(temperatures, **errors) if temperatures else None


def _detail(task: str, labels: np.ndarray, seed: int, scaled: Mapping[str, Sequence[np.ndarray]]) -> statistics.Measure:
    """Of one seed the metrics of every class, and the calibration error of each of the `scaled` probabilities [R, N, K]."""
    of_classes = classes.measure(task, labels, scaled["before"][seed])
    errors = {name: calibration.resampled_error(task, labels, probabilities[seed]) for name, probabilities in scaled.items()}
    return lambda drawn: of_classes(drawn) | {name: error(drawn) for name, error in errors.items()}


def _data_set(runs: Sequence[collection.Run], ensembles: Sequence[Sequence[str]], resampler: comparisons.Resampler) -> DataSet:
    members = subjects.of_runs(runs)
    groups: dict[str, list[subjects.Subject]] = {}
    for member in [*members, *subjects.chosen_rates(members)]:
        groups.setdefault(member.series, []).append(member)
    plain = groups.get("", ())
    series = tuple(_series(name, group, plain, ensembles, resampler) for name, group in groups.items())
    first = runs[0]
    size = first.config["data.size"]
    known = [asked for one in series for asked in one.against_plain]
    of_views = (tuple(found) for found in comparisons.other_views(members, resampler, known=known))
    return DataSet(first.dataset, first.result["dataset"], first.task, first.rank, size, len(first.labels), series, *of_views)


def _series(
    name: str,
    runs: Sequence[subjects.Subject],
    plain: Sequence[subjects.Subject],
    ensembles: Sequence[Sequence[str]],
    resampler: comparisons.Resampler,
) -> Series:
    made = subjects.ensembles(runs, ensembles)
    against_best = [one for ensemble in made for one in resampler.compare(ensemble, _best_member(ensemble, runs))]
    return Series(
        name,
        runs=tuple(_measure(run, resampler) for run in runs),
        ensembles=tuple(_measure(ensemble, resampler) for ensemble in made),
        gains=tuple(comparisons.gains(runs, resampler)),
        contrast=comparisons.contrast(runs, resampler),
        of_ensembles=tuple(comparisons.corrected(against_best)),
        against_plain=tuple(comparisons.counterparts(plain, runs, resampler)) if runs is not plain else (),
    )


def _best_member(ensemble: subjects.Subject, runs: Sequence[subjects.Subject]) -> subjects.Subject:
    """The member of the lowest mean validation loss: what one would use instead, chosen without looking at the test split."""
    members = [run for run in runs if run.run in ensemble.runs]
    return min(members, key=lambda member: metrics.mean_and_sd(member.run.of_seeds("val", "loss"))[0])


def _across(sets: Sequence[DataSet]) -> tuple[Across, ...]:
    real = {}
    for one in sorted(sets, key=lambda one: one.num_pixels):
        if one.plain is not None and not one.synthetic:
            real.setdefault((one.rank, one.source), one)
    found = []
    for rank in sorted({rank for rank, _ in real}):
        for metric in comparisons.METRICS:
            contrasts = {
                one.name: asked
                for one in sorted(real.values(), key=lambda one: one.name)
                if one.rank == rank
                for asked in one.plain.contrast.comparisons
                if asked.metric == metric
            }
            if contrasts:
                p_value = statistics.wilcoxon([asked.difference.estimate for asked in contrasts.values()])
                found.append(Across(rank, metric, contrasts, p_value))
    return tuple(found)
