"""Every class by itself: sensitivity, specificity, precision and F1 against the rest, with intervals over seeds and images.

`R` seeds, `N` images, `L` labels, `K` classes, `b` resamples of a chunk.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from vitmed import metrics
from vitmed.study import statistics


@dataclasses.dataclass(frozen=True)
class OfClass:
    """One class: its number, how many images are of it, and per metric a value for each seed and the interval of their mean.

    The mean is over the seeds for which the metric is defined; an interval is None where it is for none of them.
    """

    number: int
    count: int
    per_seed: dict[str, list[float | None]]
    intervals: dict[str, statistics.Interval | None]


def measure(task: str, labels: np.ndarray, probabilities: np.ndarray) -> statistics.Measure:
    """CLASS_METRICS of one seed's probabilities [N, K] as a function of counts [N, b]: values [b, K] by name, NaN where undefined."""
    truth, chosen = metrics.of_class(task, labels, probabilities.shape[1]), metrics.decided(task, probabilities)
    counted = np.concatenate([truth & chosen, chosen, truth], axis=1).astype(np.float32)

    def measured(drawn: np.ndarray) -> dict[str, np.ndarray]:
        hits, predicted, positives = np.split(drawn.T @ counted, 3, axis=1)
        return metrics.class_rates(hits, predicted=predicted, positives=positives, num_examples=len(labels))

    return measured


def of_seeds(task: str, labels: np.ndarray, probabilities: np.ndarray, values: Mapping[str, np.ndarray]) -> tuple[OfClass, ...]:
    """All classes: probabilities finite [R, N, K], and what `measure` gives in every resample [resamples, K]."""
    seeds = [metrics.per_class(task, labels, of_seed) for of_seed in probabilities]
    return tuple(_of_class(number, seeds, values) for number in range(probabilities.shape[2]))


def _of_class(number: int, seeds: Sequence[metrics.OfClasses], values: Mapping[str, np.ndarray]) -> OfClass:
    per_seed = {name: [seed.values[name][number] for seed in seeds] for name in metrics.CLASS_METRICS}
    means = {name: metrics.mean_and_sd(known)[0] for name, known in per_seed.items()}
    intervals = {name: None if mean is None else statistics.interval(mean, values[name][:, number]) for name, mean in means.items()}
    return OfClass(number, seeds[0].counts[number], per_seed, intervals)


def resampled(task: str, labels: np.ndarray, probabilities: np.ndarray, *, resamples: int = 2000) -> tuple[OfClass, ...]:
    """All classes with their intervals, from labels [N, L] and finite probabilities [R, N, K] alone."""
    draws = statistics.draw(task, labels, num_seeds=len(probabilities), resamples=resamples)
    values = statistics.resampled(draws, [measure(task, labels, of_seed) for of_seed in probabilities])
    return of_seeds(task, labels, probabilities, values)
