"""Every class by itself against scikit-learn, and its intervals against repeated images."""

import made_runs
import numpy as np
import pytest
from sklearn import metrics as peer

from vitmed import metrics
from vitmed.study import calibration, classes, operating, statistics


def made(task, *, num_classes=4, num_seeds=3, skill=1.0):
    labels = made_runs.labels_of(task, num_images=80, num_classes=num_classes)
    return labels, made_runs.probabilities_of(task, labels, num_seeds=num_seeds, skill=skill, num_classes=num_classes)


@pytest.mark.parametrize("task", metrics.TASKS)
def test_every_class_is_measured_as_scikit_learn_does(task):
    labels, probabilities = made(task)
    found = metrics.per_class(task, labels, probabilities[0])
    if task == "multi-label":
        truth, chosen = labels, probabilities[0] > 0.5
    else:
        truth, chosen = labels[:, 0], probabilities[0].argmax(axis=1)
    precision, recall, f1, support = peer.precision_recall_fscore_support(truth, chosen, average=None)
    confusion = peer.multilabel_confusion_matrix(truth, chosen)
    specificity = confusion[:, 0, 0] / confusion[:, 0].sum(axis=1)
    for name, expected in (("precision", precision), ("sensitivity", recall), ("f1", f1), ("specificity", specificity)):
        assert found.values[name] == pytest.approx(expected.tolist()), name
    assert found.counts == support.tolist()
    assert found.warnings == ()


def test_what_is_undefined_is_none_and_named():
    labels, probabilities = np.array([[0], [0]]), np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
    found = metrics.per_class("multi-class", labels, probabilities, class_names=("a", "b", "c"))
    assert found.counts == [2, 0, 0]
    assert found.values == {
        "sensitivity": [0.5, None, None],
        "specificity": [None, 0.5, 1.0],
        "precision": [1.0, 0.0, None],
        "f1": [pytest.approx(2 / 3), 0.0, None],
    }
    assert found.warnings == (
        "sensitivity is undefined: no example of class 1 (b), 2 (c)",
        "specificity is undefined: every example is of class 0 (a)",
        "precision is undefined: no example is taken for class 2 (c)",
        "f1 is undefined: no example is of class 2 (c), or taken for it",
    )
    for given, why in ((labels[:0], "there are no examples"), (labels, "not all finite")):
        found = metrics.per_class("multi-class", given, probabilities[: len(given)] * np.nan)
        assert set(map(tuple, found.values.values())) == {(None, None, None)}
        assert why in found.warnings[0]


@pytest.mark.parametrize("task", metrics.TASKS)
def test_a_resample_is_measured_as_its_repeated_images_are(task):
    """Metrics of classes and calibration error, of drawn seeds for which they are defined."""
    labels, probabilities = made(task, skill=0.2)
    probabilities[0, :, 2:] /= 1e3  # one seed hardly ever takes an image for classes 2 and 3
    draws = statistics.draw(task, labels, num_seeds=3, resamples=20)

    def measure(of_seed):
        of_classes, error = classes.measure(task, labels, of_seed), calibration.resampled_error(task, labels, of_seed)
        return lambda drawn: of_classes(drawn) | {"error": error(drawn)}

    found = statistics.resampled(draws, [measure(of_seed) for of_seed in probabilities])
    drawn, weights = next(draws.chunks())
    assert found["precision"].shape == (20, probabilities.shape[2])
    for row in range(20):
        again = np.repeat(np.arange(len(labels)), drawn[:, row].astype(int))
        measured = [metrics.per_class(task, labels[again], one[again]).values for one in probabilities]
        errors = [calibration.expected_calibration_error(task, labels[again], one[again]) for one in probabilities]
        np.testing.assert_allclose(found["error"][row], np.dot(weights[:, row], errors), atol=1e-6)
        for name in metrics.CLASS_METRICS:
            for k in range(probabilities.shape[2]):
                known = [(w, one[name][k]) for w, one in zip(weights[:, row], measured, strict=True) if w and one[name][k] is not None]
                expected = np.average([v for _, v in known], weights=[w for w, _ in known]) if known else np.nan
                np.testing.assert_allclose(found[name][row, k], expected, atol=1e-6)


def test_the_mean_is_over_the_seeds_for_which_a_metric_is_defined():
    labels, probabilities = made("binary", num_seeds=3)
    probabilities[0] = probabilities[1]
    probabilities[2] = (1.0, 0.0)  # takes nothing for class 1: precision undefined
    _, positive = classes.resampled("binary", labels, probabilities, resamples=200)
    alone = metrics.per_class("binary", labels, probabilities[1]).values["precision"][1]
    assert positive.per_seed["precision"] == [alone, alone, None]
    assert positive.intervals["precision"].estimate == alone
    assert positive.intervals["precision"].low < alone < positive.intervals["precision"].high
    assert positive.per_seed["sensitivity"][2] == 0
    _, none = classes.resampled("binary", labels, probabilities[2:], resamples=200)
    assert none.intervals["precision"] is None
    assert none.intervals["sensitivity"] == statistics.Interval(0, 0, 0)


def test_intervals_of_one_seed_hold_the_binomial_ones():
    """Sensitivity over the images of one class, drawn among themselves: Wald's interval at this size."""
    labels = np.repeat([0, 1], 500)[:, None]
    right = np.arange(1000) % 10 < 8
    scores = np.where(right == (labels[:, 0] == 1), 0.9, 0.1)
    _, positive = classes.resampled("binary", labels, np.stack([1 - scores, scores], axis=1)[None])
    found = positive.intervals["sensitivity"]
    reach = 1.96 * np.sqrt(0.8 * 0.2 / 500)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.8, 0.8 - reach, 0.8 + reach), abs=0.004)


def test_thresholds_trade_sensitivity_for_specificity_between_splits():
    """What a decision at 95 % specificity reaches on other images of the same kind is near what it reached on validation."""
    task = "binary"
    val, test = (made_runs.labels_of(task, num_images=2000, seed=seed) for seed in (1, 2))
    of_val, of_test = (made_runs.probabilities_of(task, one, num_seeds=2, skill=2.0, seed=seed) for seed, one in ((3, val), (4, test)))
    record = operating.fit(task, val, of_val, seeds=(0, 1))
    decided = operating.decide(record, operating.apply(record, of_test).ensemble, rule="specificity_95")[:, 0]
    assert np.mean(decided[test[:, 0] == 0] == 0) == pytest.approx(0.95, abs=0.02)
