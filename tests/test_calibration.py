"""Calibration against scikit-learn and by hand."""

import made_runs
import numpy as np
import pytest
from sklearn import metrics as peer

from vitmed.study import calibration


def test_brier_score_equals_scikit_learns():
    labels = made_runs.labels_of("multi-class", num_images=90, num_classes=4)
    probabilities = made_runs.probabilities_of("multi-class", labels, num_seeds=1, skill=1.0, num_classes=4)[0].astype(float)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    expected = peer.brier_score_loss(labels[:, 0], probabilities, labels=range(4), scale_by_half=False)
    assert calibration.brier_score("multi-class", labels, probabilities) == pytest.approx(expected)
    assert calibration.brier_score("ordinal", labels, probabilities) == pytest.approx(expected)
    labels = made_runs.labels_of("binary", num_images=90)
    probabilities = made_runs.probabilities_of("binary", labels, num_seeds=1, skill=1.0)[0]
    expected = peer.brier_score_loss(labels[:, 0], probabilities[:, 1])
    assert calibration.brier_score("binary", labels, probabilities) == pytest.approx(expected)
    labels = made_runs.labels_of("multi-label")
    probabilities = made_runs.probabilities_of("multi-label", labels, num_seeds=1, skill=1.0)[0]
    expected = np.mean([peer.brier_score_loss(labels[:, k], probabilities[:, k]) for k in range(3)])
    assert calibration.brier_score("multi-label", labels, probabilities) == pytest.approx(expected)


def test_calibration_error_by_hand():
    """Two bins: .6 and .8 (one of two right) in (.5, .75] and (.75, 1], with 4 bins."""
    probabilities = np.array([[0.4, 0.6], [0.4, 0.6], [0.2, 0.8], [0.2, 0.8]])
    labels = np.array([[1], [0], [1], [1]])
    found = calibration.reliability("binary", labels, probabilities, bins=4)
    assert found.count.tolist() == [2, 2]
    assert found.confidence == pytest.approx([0.6, 0.8])
    assert found.accuracy == pytest.approx([0.5, 1.0])
    assert calibration.expected_calibration_error("binary", labels, probabilities, bins=4) == pytest.approx((0.1 + 0.2) / 2)


def test_edges_belong_to_the_bin_below():
    probabilities = np.array([[0.5, 0.5], [0.0, 1.0]])
    found = calibration.reliability("binary", np.array([[0], [1]]), probabilities, bins=2)
    assert found.count.tolist() == [1, 1]
    assert found.confidence.tolist() == [0.5, 1.0]


def test_perfect_and_overconfident():
    labels = np.arange(3)[:, None]
    assert calibration.expected_calibration_error("multi-class", labels, np.eye(3)) == 0
    assert calibration.expected_calibration_error("multi-class", (labels + 1) % 3, np.eye(3)) == 1


def test_labels_of_many_are_predictions_of_their_own():
    labels = np.array([[1, 0], [0, 0]])
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1]])
    found = calibration.reliability("multi-label", labels, probabilities, bins=10)
    assert found.count.tolist() == [4]
    assert found.confidence == pytest.approx([0.9])
    assert found.accuracy == pytest.approx([0.75])
