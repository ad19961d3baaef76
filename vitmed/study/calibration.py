"""Whether probabilities mean what they say. `N` images, `L` labels per image (1 except in multi-label), `K` classes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Reliability(NamedTuple):
    """Of every bin of confidence that holds predictions: their mean confidence, the share that is right, and how many they are."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def brier_score(task: str, labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean squared error of probabilities [N, K] for labels int [N, L] (Brier 1950).

    Summed over the classes, from 0 to 2; of binary tasks of class 1 and of multi-label of each label and averaged, from 0 to 1.
    """
    if task == "multi-label":
        return float(np.mean((probabilities.astype(np.float64) - labels) ** 2))
    squared = (probabilities.astype(np.float64) - (labels == np.arange(probabilities.shape[1]))) ** 2
    return float(squared[:, 1].mean() if task == "binary" else squared.sum(axis=1).mean())


def reliability(task: str, labels: np.ndarray, probabilities: np.ndarray, *, bins: int = 15) -> Reliability:
    """Confidence against accuracy in bins of equal width; of multi-label tasks every label's probability is a prediction of its own.

    The confidence is the highest probability, of multi-label tasks that of the side that is predicted: both as in Guo et al. (2017).
    """
    confidence, right, place = (values.ravel() for values in _binned(task, labels, probabilities, bins))
    count = np.bincount(place, minlength=bins)
    held = count > 0
    means = [np.bincount(place, weights=values, minlength=bins)[held] / count[held] for values in (confidence, right)]
    return Reliability(*means, count[held])


def _binned(task: str, labels: np.ndarray, probabilities: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every prediction its confidence, whether it is right, and its bin: each [N, L] in multi-label, else [N, 1]."""
    if task == "multi-label":
        confidence = np.maximum(probabilities, 1 - probabilities)
        right = (probabilities > 0.5) == (labels == 1)
    else:
        confidence = probabilities.max(axis=1, keepdims=True)
        right = probabilities.argmax(axis=1)[:, None] == labels
    # Bins are open below and closed above, as in Guo et al.
    return confidence, right, np.clip(np.ceil(confidence.astype(np.float64) * bins).astype(int) - 1, 0, bins - 1)


def expected_calibration_error(task: str, labels: np.ndarray, probabilities: np.ndarray, *, bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over the predictions, by bins of equal width (Guo et al. 2017)."""
    found = reliability(task, labels, probabilities, bins=bins)
    return float(np.average(np.abs(found.confidence - found.accuracy), weights=found.count))


def resampled_error(task: str, labels: np.ndarray, probabilities: np.ndarray, *, bins: int = 15) -> Callable[[np.ndarray], np.ndarray]:
    """The expected calibration error as a function of how often each image is drawn: float32 [N, b] -> float64 [b]."""
    confidence, right, place = _binned(task, labels, probabilities, bins)
    gaps = np.zeros((len(labels), bins), np.float32)  # an image's confidence beyond what is right, by bin
    np.add.at(gaps, (np.arange(len(labels))[:, None], place), confidence - right)
    return lambda drawn: np.abs(drawn.T @ gaps).sum(axis=1, dtype=np.float64) / confidence.size
