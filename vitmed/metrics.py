"""Every metric of the project, once, in numpy: what a set of probabilities is worth against the labels.

Fractions, never percent; a metric that is undefined is None and a warning says for which class, so that no zero or
NaN stands in for it. `N` examples, `L` labels per example (1 except in multi-label), `K` classes.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

TASKS = ("binary", "multi-class", "multi-label", "ordinal")
CLASS_METRICS = ("sensitivity", "specificity", "precision", "f1")  # of a class against the rest


@dataclasses.dataclass(frozen=True)
class Measured:
    """The metrics of one run: fractions, None where undefined, and a warning for each reason why."""

    values: dict[str, float | None]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class OfClasses:
    """The metrics of every class of one run: per name a fraction for each of the K classes, and how many examples each has."""

    values: dict[str, list[float | None]]
    counts: list[int]
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
    labels, probabilities = checked(task, labels, probabilities)
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


def per_class(task: str, labels: np.ndarray, probabilities: np.ndarray, *, class_names: Sequence[str] = ()) -> OfClasses:
    """Measure every class against the rest, of multi-label tasks every label: labels int [N, L], probabilities float [N, K].

    Sensitivity TP / (TP + FN), specificity TN / (TN + FP), precision TP / (TP + FP), F1 2 TP / (2 TP + FP + FN), of decisions by the
    highest probability, in multi-label by those above .5: as accuracy in `compute`. None, and a warning, where a denominator is 0 or
    probabilities are not finite. ValueError for arrays that do not fit the task.
    """
    labels, probabilities = checked(task, labels, probabilities)
    num_classes = probabilities.shape[1]
    if not len(labels) or not np.isfinite(probabilities).all():
        why = "the probabilities are not all finite" if len(labels) else "there are no examples"
        undefined = {name: [None] * num_classes for name in CLASS_METRICS}
        counts = of_class(task, labels, num_classes).sum(axis=0).tolist()
        return OfClasses(undefined, counts, (f"every metric of every class is undefined: {why}",))
    truth, chosen = of_class(task, labels, num_classes), decided(task, probabilities)
    positives, predicted = truth.sum(axis=0), chosen.sum(axis=0)
    rates = class_rates((truth & chosen).sum(axis=0), predicted=predicted, positives=positives, num_examples=len(labels))
    why = {
        "sensitivity": "no example of class {}",
        "specificity": "every example is of class {}",
        "precision": "no example is taken for class {}",
        "f1": "no example is of class {}, or taken for it",
    }
    undefined = {name: np.flatnonzero(np.isnan(values)) for name, values in rates.items()}
    warnings = tuple(
        f"{name} is undefined: {why[name].format(_named(classes, class_names=class_names))}"
        for name, classes in undefined.items()
        if classes.size
    )
    values = {name: [None if np.isnan(value) else float(value) for value in of_name] for name, of_name in rates.items()}
    return OfClasses(values, positives.tolist(), warnings)


def of_class(task: str, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Whether each example is of each class: labels int [N, L] -> bool [N, K]."""
    return np.asarray(labels) == (1 if task == "multi-label" else np.arange(num_classes))


def decided(task: str, probabilities: np.ndarray) -> np.ndarray:
    """Which class each example is taken for, in multi-label which labels: probabilities [N, K] -> bool [N, K]."""
    if task == "multi-label":
        return probabilities > 0.5
    return probabilities.argmax(axis=1)[:, None] == np.arange(probabilities.shape[1])


def class_rates(hits: np.ndarray, *, predicted: np.ndarray, positives: np.ndarray, num_examples: int) -> dict[str, np.ndarray]:
    """CLASS_METRICS from counts [..., K]: examples rightly taken for a class, all taken for it, all that are of it. NaN for 0 / 0."""
    hits, predicted, positives = (np.asarray(counts, np.float64) for counts in (hits, predicted, positives))
    negatives = num_examples - positives
    with np.errstate(invalid="ignore"):
        values = (hits / positives, (negatives - predicted + hits) / negatives, hits / predicted, 2 * hits / (predicted + positives))
    return dict(zip(CLASS_METRICS, values, strict=True))


def log_loss(task: str, labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean cross-entropy in nats of labels [N, L] under probabilities [N, K]; NaN where those are NaN or N is 0.

    Multi-label: binary cross-entropy, averaged over labels, then examples. Probabilities are clipped at float32's smallest
    normal number, so a saturated mistake costs 87 nats instead of infinity. ValueError for arrays that do not fit the task.
    """
    labels, probabilities = checked(task, labels, probabilities)
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


def checked(task: str, labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return labels as int64 and probabilities as float64 (which keeps float32 ties); ValueError where shapes or range do not fit."""
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
