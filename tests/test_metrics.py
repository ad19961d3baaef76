"""The metrics against scikit-learn, MedMNIST's own evaluator and cases worked by hand."""

import math

import numpy as np
import pytest
from sklearn import metrics as peer

from vitmed import metrics

MEDMNIST_TASKS = {
    "binary": "binary-class",
    "multi-class": "multi-class",
    "ordinal": "ordinal-regression",
    "multi-label": "multi-label, binary-class",
}


def draw(task, *, seed, num_examples=300, num_classes=5, digits=None):
    """Random labels [N, L] and probabilities [N, K] float32 that know a little; `digits` rounds them, which makes ties."""
    rng = np.random.default_rng(seed)
    if task == "multi-label":
        labels = rng.integers(0, 2, (num_examples, num_classes))
        probabilities = 1 / (1 + np.exp(-rng.normal(labels - 0.5, 1)))
    else:
        num_classes = 2 if task == "binary" else num_classes
        labels = rng.choice(num_classes, (num_examples, 1), p=np.arange(1, num_classes + 1) / math.comb(num_classes + 1, 2))
        logits = rng.normal(size=(num_examples, num_classes)) + np.eye(num_classes)[labels[:, 0]]
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, (probabilities if digits is None else probabilities.round(digits)).astype(np.float32)


def peers(task, labels, probabilities):
    """The same metrics by scikit-learn."""
    if task == "multi-label":
        columns = range(labels.shape[1])
        right = probabilities > 0.5
        return {
            "accuracy": np.mean([peer.accuracy_score(labels[:, k], right[:, k]) for k in columns]),
            "balanced_accuracy": np.mean([peer.balanced_accuracy_score(labels[:, k], right[:, k]) for k in columns]),
            "auc": peer.roc_auc_score(labels, probabilities, average="macro"),
        }
    flat, predicted = labels[:, 0], probabilities.argmax(axis=1)
    one_hot = flat[:, None] == np.arange(probabilities.shape[1])
    expected = {
        "accuracy": peer.accuracy_score(flat, predicted),
        "balanced_accuracy": peer.balanced_accuracy_score(flat, predicted),
        "auc": peer.roc_auc_score(flat, probabilities[:, 1]) if task == "binary" else peer.roc_auc_score(one_hot, probabilities),
    }
    if task == "ordinal":
        grades = range(probabilities.shape[1])
        expected["quadratic_weighted_kappa"] = peer.cohen_kappa_score(flat, predicted, labels=grades, weights="quadratic")
    return expected


@pytest.mark.parametrize("digits", [None, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize("task", metrics.TASKS)
def test_equals_scikit_learn_and_medmnist(task, digits, evaluator):
    for seed in range(5):
        labels, probabilities = draw(task, seed=seed, digits=digits)
        measured = metrics.compute(task, labels, probabilities)
        assert measured.warnings == ()
        assert tuple(measured.values) == metrics.metric_names(task)
        assert measured.values == pytest.approx(peers(task, labels, probabilities), abs=1e-6)
        assert all(type(value) is float for value in measured.values.values())
        name = MEDMNIST_TASKS[task]
        assert measured.values["auc"] == pytest.approx(evaluator.getAUC(labels, probabilities, name), abs=1e-6)
        if task != "binary" or digits is None:  # the evaluator's threshold is the argmax only where a row sums to one
            assert measured.values["accuracy"] == pytest.approx(evaluator.getACC(labels, probabilities, name), abs=1e-6)


def test_multi_class_auc_is_scikit_learns_one_vs_rest():
    labels, probabilities = draw("multi-class", seed=7)
    exact = probabilities.astype(np.float64)
    exact /= exact.sum(axis=1, keepdims=True)
    expected = peer.roc_auc_score(labels[:, 0], exact, multi_class="ovr", average="macro")
    assert metrics.compute("multi-class", labels, exact).values["auc"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("task", metrics.TASKS)
def test_log_loss_equals_scikit_learn(task):
    labels, probabilities = draw(task, seed=3)
    if task == "multi-label":
        expected = np.mean([peer.log_loss(labels[:, k], probabilities[:, k].astype(np.float64)) for k in range(labels.shape[1])])
    else:
        exact = probabilities.astype(np.float64)
        expected = peer.log_loss(labels[:, 0], exact / exact.sum(axis=1, keepdims=True))
    assert metrics.log_loss(task, labels, probabilities) == pytest.approx(expected, abs=1e-6)


def test_log_loss_by_hand_and_at_saturation():
    assert metrics.log_loss("binary", np.array([[1], [0]]), np.array([[0.75, 0.25], [0.5, 0.5]])) == pytest.approx(math.log(8) / 2)
    assert metrics.log_loss("multi-label", np.array([[1, 0]]), np.array([[0.5, 0.75]])) == pytest.approx(math.log(8) / 2)
    wrong = metrics.log_loss("binary", np.array([[1]]), np.array([[1.0, 0.0]], np.float32))
    assert wrong == pytest.approx(126 * math.log(2))  # float32's smallest normal number is 2**-126
    assert metrics.log_loss("multi-label", np.array([[0]]), np.array([[1.0]], np.float32)) == wrong
    assert math.isnan(metrics.log_loss("binary", np.array([[1]]), np.array([[np.nan, np.nan]])))
    assert math.isnan(metrics.log_loss("binary", np.empty((0, 1), int), np.empty((0, 2))))


def test_auc_by_hand():
    area = metrics.area_under_curve
    positive = np.array([False, False, True, True])
    assert area(positive, np.array([0.1, 0.2, 0.3, 0.4])) == 1
    assert area(positive, np.array([0.4, 0.3, 0.2, 0.1])) == 0
    assert area(positive, np.full(4, 0.5)) == 0.5
    assert area(positive, np.array([0.1, 0.4, 0.35, 0.8])) == 0.75
    assert area(positive, np.array([0.1, 0.5, 0.5, 0.8])) == 3.5 / 4  # one of four pairs is tied
    assert area(positive, np.array([-0.0, 0.0, 0.0, 1.0])) == 3 / 4  # the two zeros are one value
    assert area(~positive & positive, np.arange(4.0)) is None


def test_auc_equals_the_count_over_all_pairs_and_sees_only_the_order():
    rng = np.random.default_rng(0)
    for num_levels in (2, 5, 1000):
        positive, scores = rng.random(200) < 0.3, rng.integers(0, num_levels, 200).astype(np.float32)
        pairs = np.sign(scores[positive][:, None] - scores[~positive][None, :])
        assert metrics.area_under_curve(positive, scores) == pytest.approx((pairs / 2 + 0.5).mean(), abs=1e-12)
        assert metrics.area_under_curve(positive, scores) == metrics.area_under_curve(positive, scores**3 - 5)
        assert metrics.area_under_curve(positive, scores) == pytest.approx(1 - metrics.area_under_curve(~positive, scores), abs=1e-12)


def test_accuracies_by_hand_and_ties_go_to_the_lowest_class():
    labels = np.array([[0], [0], [0], [1]])
    probabilities = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.5, 0.5]])  # predicted 0 0 1 0
    values = metrics.compute("binary", labels, probabilities).values
    assert values["accuracy"] == 0.5
    assert values["balanced_accuracy"] == (2 / 3 + 0) / 2
    assert values["auc"] == (1 + 0.5 + 0) / 3


def test_multi_label_by_hand_and_the_threshold_is_strict():
    labels = np.array([[1, 0], [0, 0], [0, 1], [0, 1]])
    probabilities = np.array([[0.5, 0.1], [0.2, 0.6], [0.1, 0.7], [0.3, 0.2]])  # set: none, label 1, label 1, none
    values = metrics.compute("multi-label", labels, probabilities).values
    assert values["accuracy"] == (3 / 4 + 2 / 4) / 2
    assert values["balanced_accuracy"] == ((0 + 1) / 2 + (1 / 2 + 1 / 2) / 2) / 2
    assert values["auc"] == pytest.approx((1 + 3 / 4) / 2)


def test_kappa_by_hand():
    labels = np.array([[0], [1], [2]])
    assert metrics.compute("ordinal", labels, np.eye(3)).values["quadratic_weighted_kappa"] == 1
    assert metrics.compute("ordinal", labels, np.eye(3)[::-1]).values["quadratic_weighted_kappa"] == pytest.approx(-1)
    always_one = np.tile([0.0, 1.0, 0.0], (3, 1))
    assert metrics.compute("ordinal", labels, always_one).values["quadratic_weighted_kappa"] == pytest.approx(0)


@pytest.mark.parametrize("task", ["multi-class", "ordinal"])
def test_an_absent_class_leaves_auc_undefined_and_is_named(task):
    labels, probabilities = draw(task, seed=1)
    kept = labels[:, 0] != 3
    labels, probabilities = labels[kept], probabilities[kept]
    measured = metrics.compute(task, labels, probabilities, class_names=("a", "b", "c", "melanoma", "e"))
    assert measured.values["auc"] is None
    assert len(measured.warnings) == 1
    assert "auc is undefined" in measured.warnings[0]
    assert "class 3 (melanoma)" in measured.warnings[0]
    predicted = probabilities.argmax(axis=1)
    recalls = [np.mean(predicted[labels[:, 0] == k] == k) for k in (0, 1, 2, 4)]
    assert measured.values["balanced_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-12)
    assert measured.values["accuracy"] == pytest.approx(peer.accuracy_score(labels[:, 0], predicted), abs=1e-12)


def test_a_single_class():
    labels = np.ones((4, 1), int)
    measured = metrics.compute("binary", labels, np.tile([0.3, 0.7], (4, 1)))
    assert measured.values == {"accuracy": 1.0, "balanced_accuracy": 1.0, "auc": None}
    assert measured.warnings == ("auc is undefined and balanced_accuracy leaves classes out: no example of class 0",)
    measured = metrics.compute("ordinal", 2 * labels, np.tile([0.1, 0.2, 0.7], (4, 1)), class_names=("none", "mild", "severe"))
    assert measured.values == {"accuracy": 1.0, "balanced_accuracy": 1.0, "auc": None, "quadratic_weighted_kappa": None}
    assert "class 0 (none), 1 (mild)" in measured.warnings[0]
    assert measured.warnings[1].endswith("every prediction is class 2 (severe)")


def test_one_sided_labels_are_named():
    labels = np.array([[0, 1, 1], [0, 0, 1]])
    measured = metrics.compute("multi-label", labels, np.array([[0.1, 0.9, 0.9], [0.6, 0.2, 0.4]]), class_names=("mass", "node", "clear"))
    assert measured.values["auc"] is None
    assert measured.values["balanced_accuracy"] == (1 / 2 + 1 + 1 / 2) / 3
    assert "label 0 (mass) is never set" in measured.warnings[0]
    assert "label 2 (clear) is always set" in measured.warnings[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("task", metrics.TASKS)
def test_a_failed_seed_has_no_metrics(task, bad):
    labels, probabilities = draw(task, seed=2)
    probabilities[17, 1] = bad
    measured = metrics.compute(task, labels, probabilities)
    assert measured.values == dict.fromkeys(metrics.metric_names(task))
    assert len(measured.warnings) == 1


def test_no_examples_have_no_metrics():
    measured = metrics.compute("multi-class", np.empty((0, 1), int), np.empty((0, 4)))
    assert set(measured.values.values()) == {None}
    assert "no examples" in measured.warnings[0]


@pytest.mark.parametrize(
    ("task", "labels", "probabilities", "says"),
    [
        ("regression", (3, 1), (3, 2), "multi-label"),
        ("binary", (3,), (3, 2), "expected labels"),
        ("binary", (3, 1), (4, 2), "expected labels"),
        ("binary", (3, 1), (3, 3), "do not fit"),
        ("multi-class", (3, 2), (3, 4), "do not fit"),
        ("multi-label", (3, 2), (3, 3), "do not fit"),
    ],
)
def test_arrays_that_do_not_fit(task, labels, probabilities, says):
    with pytest.raises(ValueError, match=says):
        metrics.compute(task, np.zeros(labels, int), np.zeros(probabilities))


@pytest.mark.parametrize(("task", "label"), [("binary", 2), ("multi-class", -1), ("multi-label", 2)])
def test_labels_out_of_range(task, label):
    labels, probabilities = draw(task, seed=0)
    labels[5, 0] = label
    with pytest.raises(ValueError, match=str(label)):
        metrics.compute(task, labels, probabilities)


def test_mean_and_sd():
    assert metrics.mean_and_sd([0.5, None, 0.7, 0.9, float("nan")]) == (pytest.approx(0.7), pytest.approx(0.2))
    assert metrics.mean_and_sd([0.5, None]) == (0.5, None)
    assert metrics.mean_and_sd([None]) == (None, None)
    assert metrics.mean_and_sd([]) == (None, None)
