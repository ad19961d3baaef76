"""Every metric of the project, once, in numpy: what a set of probabilities is worth against the labels.

Fractions, never percent; a metric that is undefined is None and a warning says for which class, so that no zero or
NaN stands in for it. `N` examples, `L` labels per example (1 except in multi-label), `K` classes.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

TASKS = ("binary", "multi-class", "multi-label", "ordinal")


@dataclasses.dataclass(frozen=True)
class Measured:
    """The metrics of one run: fractions, None where undefined, and a warning for each reason why."""

    values: dict[str, float | None]
    warnings: tuple[str, ...]


def metric_names(task: str) -> tuple[str, ...]:
    """Return the names that `compute` fills for a task; ValueError for an unknown task."""
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; allowed: {', '.join(TASKS)}")
    names = ("accuracy", "balanced_accuracy", "auc")
    return (*names, "quadratic_weighted_kappa") if task == "ordinal" else names


def compute(task: str, labels: np.ndarray, probabilities: np.ndarray, *, class_names: Sequence[str] = ()) -> Measured:
    """Measure one run: labels int [N, L] against probabilities float [N, K]; K = L sigmoids for multi-label, else softmax.

    AUC: binary of class 1, multi-class and ordinal the macro mean of one-vs-rest, multi-label the mean over labels (as
    MedMNIST's evaluator, whose threshold is "greater than 0.5"). Balanced accuracy: mean recall of the classes that occur,
    in multi-label per label and then averaged. Kappa: quadratic weights over all K grades (Cohen 1968). Ties of the argmax
    go to the lowest class. Probabilities that are not finite (a failed seed) leave everything None. ValueError for arrays
    that do not fit the task.
    """
    names = metric_names(task)
    labels, probabilities = _checked(task, labels, probabilities)
    if not len(labels):
        return Measured(dict.fromkeys(names), ("every metric is undefined: there are no examples",))
    if not np.isfinite(probabilities).all():
        return Measured(dict.fromkeys(names), ("every metric is undefined: the probabilities are not all finite",))
    warnings: list[str] = []
    if task == "multi-label":
        values = _multi_label(labels, probabilities, warnings=warnings, class_names=class_names)
    else:
        values = _single_label(task, labels[:, 0], probabilities=probabilities, warnings=warnings, class_names=class_names)
    return Measured(values, tuple(warnings))


def log_loss(task: str, labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean cross-entropy in nats of labels [N, L] under probabilities [N, K]; NaN where those are NaN or N is 0.

    Multi-label: binary cross-entropy, averaged over labels, then examples. Probabilities are clipped at float32's smallest
    normal number, so a saturated mistake costs 87 nats instead of infinity. ValueError for arrays that do not fit the task.
    """
    labels, probabilities = _checked(task, labels, probabilities)
    if not len(labels):
        return float("nan")
    if task == "multi-label":
        of_truth = np.where(labels == 1, probabilities, 1.0 - probabilities)
    else:
        of_truth = np.take_along_axis(probabilities, labels, axis=1)
    return float(-np.log(np.maximum(of_truth, np.finfo(np.float32).tiny)).mean())


def mean_and_sd(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Return mean and sample standard deviation (n - 1) of the entries that are not None or NaN; None where undefined."""
    known = np.array([value for value in values if value is not None and not np.isnan(value)], np.float64)
    mean = float(known.mean()) if known.size else None
    return mean, float(known.std(ddof=1)) if known.size > 1 else None


def area_under_curve(positive: np.ndarray, scores: np.ndarray) -> float | None:
    """Return the area under the ROC curve of scores [N] for positive (bool [N]); None if all or none are positive.

    The share of (positive, negative) pairs in the right order, ties half (Mann and Whitney 1947): exact, O(N log N).
    """
    distinct, group = np.unique(scores, return_inverse=True)
    positives = np.bincount(group, weights=positive, minlength=distinct.size)
    negatives = np.bincount(group, minlength=distinct.size) - positives
    pairs = positives.sum() * negatives.sum()
    if not pairs:
        return None
    negatives_below = np.cumsum(negatives) - negatives
    return float((positives * (negatives_below + negatives / 2)).sum() / pairs)


def _checked(task: str, labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return labels as int64 and probabilities as float64 (which keeps float32 ties) after checking their shapes and range."""
    metric_names(task)
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    if labels.ndim != 2 or probabilities.ndim != 2 or len(labels) != len(probabilities):
        raise ValueError(f"expected labels [N, L] and probabilities [N, K], got {labels.shape} and {probabilities.shape}")
    fits = {"binary": labels.shape[1] == 1 and probabilities.shape[1] == 2, "multi-label": labels.shape == probabilities.shape}
    if not fits.get(task, labels.shape[1] == 1 and probabilities.shape[1] >= 2):
        raise ValueError(f"labels {labels.shape} and probabilities {probabilities.shape} do not fit the task {task!r}")
    highest = 1 if task == "multi-label" else probabilities.shape[1] - 1
    if labels.size and not (labels.min() >= 0 and labels.max() <= highest):
        raise ValueError(f"labels of the task {task!r} run from 0 to {highest} here, got {labels.min()} to {labels.max()}")
    return labels.astype(np.int64), probabilities.astype(np.float64)


def _named(indices: np.ndarray, *, class_names: Sequence[str]) -> str:
    """Spell classes for a message: '2 (melanoma), 4 (nevus)'."""
    return ", ".join(f"{i} ({class_names[i]})" if i < len(class_names) else str(i) for i in indices.tolist())


def _single_label(
    task: str, labels: np.ndarray, *, probabilities: np.ndarray, warnings: list[str], class_names: Sequence[str]
) -> dict[str, float | None]:
    """Measure labels [N] against probabilities [N, K] and add to `warnings` what is undefined."""
    num_classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    confusion = np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)
    counts = confusion.sum(axis=1)
    present = counts > 0
    auc = None
    if present.all():
        scored = [1] if task == "binary" else range(num_classes)
        auc = float(np.mean([area_under_curve(labels == k, probabilities[:, k]) for k in scored]))
    else:
        absent = _named(np.flatnonzero(~present), class_names=class_names)
        warnings.append(f"auc is undefined and balanced_accuracy leaves classes out: no example of class {absent}")
    values = {
        "accuracy": float(confusion.trace() / len(labels)),
        "balanced_accuracy": float((confusion.diagonal()[present] / counts[present]).mean()),
        "auc": auc,
    }
    if task == "ordinal":
        values["quadratic_weighted_kappa"] = _quadratic_weighted_kappa(confusion)
        if values["quadratic_weighted_kappa"] is None:
            only = _named(labels[:1], class_names=class_names)
            warnings.append(f"quadratic_weighted_kappa is undefined: every label and every prediction is class {only}")
    return values


def _quadratic_weighted_kappa(confusion: np.ndarray) -> float | None:
    """Return 1 - observed / expected squared distance of a confusion matrix [K, K]; None where no distance is expected."""
    grades = np.arange(len(confusion))
    weights = (grades[:, None] - grades[None, :]) ** 2
    expected = np.outer(confusion.sum(axis=1), confusion.sum(axis=0)) / confusion.sum()
    by_chance = (weights * expected).sum()
    return float(1 - (weights * confusion).sum() / by_chance) if by_chance else None


def _multi_label(
    labels: np.ndarray, probabilities: np.ndarray, *, warnings: list[str], class_names: Sequence[str]
) -> dict[str, float | None]:
    """Measure labels [N, L] of 0 and 1 against sigmoids [N, L], each label by itself, and average over labels."""
    positive = labels == 1
    right = (probabilities > 0.5) == positive
    counts = np.stack([positive.sum(axis=0), (~positive).sum(axis=0)])  # [2, L]
    hits = np.stack([(right & positive).sum(axis=0), (right & ~positive).sum(axis=0)])
    recalls = hits / np.maximum(counts, 1)  # 0 where a side is empty, which the division below does not count
    areas = [area_under_curve(positive[:, k], probabilities[:, k]) for k in range(labels.shape[1])]
    for side, word in enumerate(("never", "always")):
        if not counts[side].all():
            which = _named(np.flatnonzero(counts[side] == 0), class_names=class_names)
            warnings.append(f"auc is undefined and balanced_accuracy is one-sided: label {which} is {word} set")
    return {
        "accuracy": float(right.mean()),
        "balanced_accuracy": float((recalls.sum(axis=0) / (counts > 0).sum(axis=0)).mean()),
        "auc": None if None in areas else float(np.mean(areas)),
    }
