"""How sure a study's numbers are: a bootstrap of seeds and test images together, and what is built on it.

Intervals over images alone forget that another seed gives another model, intervals over seeds alone that other patients give other images:
both are drawn anew, crossed (every drawn seed is measured on the same drawn images). That errs on the wide side where seeds hardly differ
(Owen 2007), on the narrow side where a few differ much more than images do; docs/report.md has figures.

`R` seeds, `N` images, `L` labels, `K` classes, `b` resamples of a chunk.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import sparse, stats

from vitmed import metrics

Measure = Callable[[np.ndarray], dict[str, np.ndarray]]
CHUNK_CELLS = 2**22  # resamples x images held at a time
FEWEST_SETS = 6  # with five the smallest two-sided p-value of the signed-rank test is .0625


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference(Interval):
    """A paired difference with its interval and two-sided p-value."""

    p_value: float


@dataclasses.dataclass(frozen=True, eq=False)
class Draws:
    """The resamples of `num_seeds` seeds and of the images of labels [N, L], a function of `seed`: whatever is compared shares them.

    Images are drawn within their class, so every resample has the test split's class counts; those of multi-label sets, which have no
    single class, are drawn from all. Of R >= 2 seeds R - 1 are drawn: the variance of the mean over R draws out of R is (R - 1) / R of the
    unbiased one, a third too little with three seeds, and R - 1 draws set that right (McCarthy and Snowden 1985; Rao and Wu 1988). One
    seed is no sample: then only images are resampled.
    """

    task: str
    labels: np.ndarray
    num_seeds: int
    resamples: int
    seed: int

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(how often each image was drawn float32 [N, b], the weight of each seed float64 [R, b]), a chunk after the other."""
        num_images = len(self.labels)
        strata = [np.arange(num_images)]
        if self.task != "multi-label":
            strata = [np.flatnonzero(self.labels[:, 0] == k) for k in np.unique(self.labels[:, 0])]
        size = max(1, CHUNK_CELLS // num_images)
        for start in range(0, self.resamples, size):
            count = min(size, self.resamples - start)
            # Seeds have a stream of their own: the images of a resample are the same however many seeds there are.
            of_images, of_seeds = (np.random.default_rng([self.seed, start, stream]) for stream in range(2))
            drawn = np.empty((num_images, count), np.float32)
            for members in strata:
                drawn[members] = _counts(of_images, len(members), draws=len(members), resamples=count)
            picked = np.ones((1, count))
            if self.num_seeds > 1:
                picked = _counts(of_seeds, self.num_seeds, draws=self.num_seeds - 1, resamples=count).astype(np.float64)
            yield drawn, picked / picked.sum(axis=0)


def _counts(rng: np.random.Generator, num: int, *, draws: int, resamples: int) -> np.ndarray:
    """How often each of `num` things comes up in `draws` draws with replacement: float32 [num, resamples]."""
    picked = rng.integers(num, size=(draws, resamples)) * resamples + np.arange(resamples)
    return np.bincount(picked.ravel(), minlength=num * resamples).reshape(num, resamples).astype(np.float32)


def draw(task: str, labels: np.ndarray, *, num_seeds: int, resamples: int = 2000, seed: int = 0) -> Draws:
    """The resamples for labels [N, L] and as many seeds; ValueError for an unknown task or where there is nothing to draw."""
    metrics.metric_names(task)
    if not len(labels) or num_seeds < 1 or resamples < 1:
        raise ValueError(f"{len(labels)} images, {num_seeds} seeds and {resamples} resamples: at least one of each is needed")
    return Draws(task, np.asarray(labels, np.int64), num_seeds, resamples, seed)


def distribution(task: str, labels: np.ndarray, probabilities: np.ndarray, draws: Draws) -> dict[str, np.ndarray]:
    """Per metric of `metrics.metric_names(task)` its value in every resample, the mean over the drawn seeds: float64 [resamples].

    labels int [N, L], probabilities finite [R, N, K]. A value is NaN where the metric is undefined: the AUC where a class is absent from
    the labels, or in a resample of a multi-label set where a label is on all or none of the images. ValueError where the draws are others'.
    """
    if draws.task != task or not np.array_equal(draws.labels, labels) or len(probabilities) != draws.num_seeds:
        raise ValueError("the draws are of another task, other labels or another number of seeds")
    measures = [(_of_labels if task == "multi-label" else _of_classes)(task, draws.labels, np.asarray(one)) for one in probabilities]
    found: dict[str, list[np.ndarray]] = {name: [] for name in metrics.metric_names(task)}
    for drawn, weights in draws.chunks():
        of_seeds = [measure(drawn) for measure in measures]
        for name, chunks in found.items():
            chunks.append(sum(weights[index] * values[name] for index, values in enumerate(of_seeds)))
    return {name: np.concatenate(chunks) for name, chunks in found.items()}


def resampled(draws: Draws, measures: Sequence[Measure]) -> dict[str, np.ndarray]:
    """The values of any measures in every resample, the mean over the drawn seeds for which they are defined: float64 [resamples, ...].

    A measure for each seed: how often each image was drawn float32 [N, b] -> values [b, ...] by name, NaN where undefined.
    """
    if len(measures) != draws.num_seeds:
        raise ValueError(f"{len(measures)} measures for draws of {draws.num_seeds} seeds")
    found: dict[str, list[np.ndarray]] = {}
    for drawn, weights in draws.chunks():
        of_seeds = [measure(drawn) for measure in measures]
        for name in of_seeds[0]:
            values = np.stack([of_seed[name] for of_seed in of_seeds])  # [R, b, ...]
            known = weights.reshape(*weights.shape, *(1,) * (values.ndim - 2)) * ~np.isnan(values)
            with np.errstate(invalid="ignore"):
                found.setdefault(name, []).append((known * np.nan_to_num(values)).sum(axis=0) / known.sum(axis=0))
    return {name: np.concatenate(chunks) for name, chunks in found.items()}


class _Area:
    """The area under the ROC curve, ties half, of many resamples at once: the share of pairs won (Mann and Whitney 1947).

    Images are put once on the `G` distinct scores of positive ones, so that a resample costs sums over its images and over those scores.
    """

    def __init__(self, positive: np.ndarray, scores: np.ndarray):
        ours, theirs = np.flatnonzero(positive), np.flatnonzero(~positive)
        levels, level = np.unique(scores[ours], return_inverse=True)
        self._positives = _sums(level, ours, shape=(len(levels), len(scores)))
        # A negative image counts from the first level above its score on; one that ties a level counts half there.
        from_level = np.concatenate([np.searchsorted(levels, scores[theirs], side=side) for side in ("left", "right")])
        self._passed = _sums(from_level, np.concatenate([theirs, theirs]), shape=(len(levels), len(scores)), weight=0.5)

    def __call__(self, drawn: np.ndarray) -> np.ndarray:
        """Counts [N, b] -> areas [b], NaN where a side was not drawn."""
        positives, below = self._positives @ drawn, self._passed @ drawn  # [G, b]
        np.cumsum(below, axis=0, out=below)  # halves of counts: exact up to 2^23
        pairs = np.einsum("gb,gb->b", positives, below, dtype=np.float64)
        num_positives = positives.sum(axis=0, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            return pairs / (num_positives * (len(drawn) - num_positives))


def _sums(rows: np.ndarray, columns: np.ndarray, *, shape: tuple[int, int], weight: float = 1.0) -> sparse.csr_array:
    """The matrix that adds up each row's images; rows beyond the last are left out."""
    kept = rows < shape[0]
    return sparse.coo_array((np.full(kept.sum(), weight, np.float32), (rows[kept], columns[kept])), shape=shape).tocsr()


def _of_classes(task: str, labels: np.ndarray, probabilities: np.ndarray) -> Measure:
    """The metrics of one seed of a single-label task as a function of counts [N, b]; see `metrics.compute` for what they are."""
    truth, num_classes = labels[:, 0], probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    cells = np.zeros((len(truth), num_classes**2), np.float32)
    cells[np.arange(len(truth)), truth * num_classes + predicted] = 1
    counts = np.bincount(truth, minlength=num_classes)  # the same in every resample, since images are drawn within their class
    present = counts > 0
    scored = [1] if task == "binary" else range(num_classes)
    areas = [_Area(truth == k, probabilities[:, k]) for k in scored] if present.all() else []
    grades = np.arange(num_classes)
    distances = (grades[:, None] - grades[None, :]) ** 2

    def measure(drawn: np.ndarray) -> dict[str, np.ndarray]:
        confusion = (drawn.T @ cells).astype(np.float64).reshape(-1, num_classes, num_classes)
        hits = np.diagonal(confusion, axis1=1, axis2=2)
        values = {
            "accuracy": hits.sum(axis=1) / len(truth),
            "balanced_accuracy": (hits[:, present] / counts[present]).mean(axis=1),
            "auc": np.mean([area(drawn) for area in areas], axis=0) if areas else np.full(drawn.shape[1], np.nan),
        }
        if task == "ordinal":
            expected = np.einsum("bi,bj->bij", confusion.sum(axis=2), confusion.sum(axis=1)) / len(truth)
            with np.errstate(invalid="ignore"):
                by_chance = (distances * expected).sum(axis=(1, 2))
                values["quadratic_weighted_kappa"] = 1 - (distances * confusion).sum(axis=(1, 2)) / by_chance
        return values

    return measure


def _of_labels(task: str, labels: np.ndarray, probabilities: np.ndarray) -> Measure:
    """The metrics of one seed of a multi-label task as a function of counts [N, b]."""
    positive = labels == 1
    right = (probabilities > 0.5) == positive
    sides = [(positive.astype(np.float32), (positive & right).astype(np.float32))]
    sides += [((~positive).astype(np.float32), (~positive & right).astype(np.float32))]
    areas = [_Area(positive[:, k], probabilities[:, k]) for k in range(labels.shape[1])]

    def measure(drawn: np.ndarray) -> dict[str, np.ndarray]:
        counts, hits = (np.stack([drawn.T @ side[part] for side in sides]).astype(np.float64) for part in range(2))  # [2, b, L]
        recalls = (hits / np.maximum(counts, 1)).sum(axis=0) / (counts > 0).sum(axis=0)
        return {
            "accuracy": hits.sum(axis=0).mean(axis=1) / len(labels),
            "balanced_accuracy": recalls.mean(axis=1),
            "auc": np.mean([area(drawn) for area in areas], axis=0),
        }

    return measure


def interval(estimate: float, values: np.ndarray, *, level: float = 0.95) -> Interval | None:
    """The percentile interval of resampled values [resamples]; resamples in which the metric is undefined are left out.

    None where it is undefined in most: what is left would be a choice of resamples, not the metric's spread.
    """
    defined = values[~np.isnan(values)]
    return Interval(estimate, *_ends(defined, level)) if 2 * len(defined) > len(values) else None


def difference(estimate: float, first: np.ndarray, second: np.ndarray, *, level: float = 0.95) -> Difference | None:
    """First minus second, of the same draws [resamples], so that seeds and images are paired; None where undefined in most of them.

    The p-value is twice the smaller share of resampled differences on either side of zero, those at zero counting for both, with one added
    to count and number (Davison and Hinkley 1997, 4.2.3): it is never below 2 / (resamples + 1).
    """
    gaps = first - second
    gaps = gaps[~np.isnan(gaps)]
    if 2 * len(gaps) <= len(first):
        return None
    low, high = _ends(gaps, level)
    sides = [(np.count_nonzero(side) + 1) / (len(gaps) + 1) for side in (gaps <= 0, gaps >= 0)]
    return Difference(estimate, low, high, min(1.0, 2 * min(sides)))


def _ends(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Holm 1979): under a level, so that no more than that share of such families errs at all."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, float)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected.tolist()


def wilcoxon(differences: Sequence[float]) -> float | None:
    """The two-sided p-value of the signed-rank test over data sets; None with fewer than FEWEST_SETS, which cannot tell anything at .05.

    Where no set differs at all, which the test leaves undefined, it is 1.
    """
    if len(differences) < FEWEST_SETS:
        return None
    if not np.any(differences):
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)
