"""The bootstrap of seeds and images, paired tests and corrections, against scipy, statsmodels' numbers and repeated images."""

import made_runs
import numpy as np
import pytest
from scipy import stats

from vitmed import metrics
from vitmed.study import statistics


def made(task, *, num_images=80, num_classes=4, num_seeds=3, skill=1.0, digits=None, seed=0):
    labels = made_runs.labels_of(task, num_images=num_images, num_classes=num_classes, seed=seed)
    probabilities = made_runs.probabilities_of(task, labels, num_seeds=num_seeds, skill=skill, num_classes=num_classes, seed=seed)
    return labels, probabilities if digits is None else np.round(probabilities, digits)


@pytest.mark.parametrize("digits", [None, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize("task", metrics.TASKS)
def test_a_resample_is_measured_as_its_repeated_images_are(task, digits):
    labels, probabilities = made(task, digits=digits)
    draws = statistics.draw(task, labels, num_seeds=3, resamples=20)
    found = statistics.distribution(task, labels, probabilities, draws)
    drawn, weights = next(draws.chunks())
    for row in range(20):
        again = np.repeat(np.arange(len(labels)), drawn[:, row].astype(int))
        measured = [metrics.compute(task, labels[again], one[again]).values for one in probabilities]
        for name in metrics.metric_names(task):
            values = np.array([np.nan if one[name] is None else one[name] for one in measured])
            np.testing.assert_allclose(found[name][row], (weights[:, row] * values).sum(), atol=1e-6)


def test_images_are_drawn_within_their_class_and_as_many_as_there_are():
    labels, _ = made("multi-class")
    drawn, _ = next(statistics.draw("multi-class", labels, num_seeds=2, resamples=50).chunks())
    for k in range(4):
        assert (drawn[labels[:, 0] == k].sum(axis=0) == (labels == k).sum()).all()
    assert len(np.unique(drawn, axis=1).T) == 50


def test_the_images_drawn_do_not_depend_on_the_number_of_seeds():
    labels, _ = made("binary")
    first, second = (next(statistics.draw("binary", labels, num_seeds=n, resamples=30).chunks())[0] for n in (1, 5))
    np.testing.assert_array_equal(first, second)


def test_chunks_cover_every_resample_and_differ(monkeypatch):
    labels, probabilities = made("binary")
    monkeypatch.setattr(statistics, "CHUNK_CELLS", 80 * 7)
    draws = statistics.draw("binary", labels, num_seeds=3, resamples=20)
    assert [drawn.shape[1] for drawn, _ in draws.chunks()] == [7, 7, 6]
    assert len(np.unique(np.concatenate([drawn for drawn, _ in draws.chunks()], axis=1), axis=1).T) == 20
    assert statistics.distribution("binary", labels, probabilities, draws)["auc"].shape == (20,)


def test_the_same_seed_gives_the_same_values():
    labels, probabilities = made("binary")
    first, second, other = (
        statistics.distribution("binary", labels, probabilities, statistics.draw("binary", labels, num_seeds=3, resamples=50, seed=seed))[
            "auc"
        ]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_one_seed_is_scipys_bootstrap_of_images():
    """Accuracy of one seed: the mean of right and wrong, here of one class, so that strata make no difference."""
    rng = np.random.default_rng(3)
    labels = np.zeros((200, 1), int)
    of_one = rng.random((1, 200, 1))
    probabilities = np.concatenate([of_one, 1 - of_one], axis=2)
    draws = statistics.draw("binary", labels, num_seeds=1, resamples=4000)
    found = statistics.interval(0.5, statistics.distribution("binary", labels, probabilities, draws)["accuracy"])
    right = (probabilities[0].argmax(axis=1) == 0).astype(float)
    peer = stats.bootstrap((right,), np.mean, n_resamples=4000, method="percentile", rng=rng).confidence_interval
    assert (found.low, found.high) == pytest.approx((peer.low, peer.high), abs=0.01)


def test_the_seeds_part_of_the_variance_is_unbiased():
    """With seeds that differ and images that do not (every image of a seed is right or wrong alike) the variance is s^2 / R."""
    labels = np.zeros((10, 1), int)
    right = np.array([1, 0, 1, 1], float)  # of each seed
    probabilities = np.stack([np.tile([share, 1 - share], (10, 1)) for share in right])
    draws = statistics.draw("binary", labels, num_seeds=4, resamples=40_000)
    values = statistics.distribution("binary", labels, probabilities, draws)["accuracy"]
    assert values.mean() == pytest.approx(0.75, abs=0.005)
    assert values.var() == pytest.approx(right.var(ddof=1) / 4, rel=0.03)


def simulated_truth_is_covered(rng, *, num_seeds, num_images=100):
    """One study of known truth: seeds differ by .05, images in how hard they are; does the 95 % interval hold the mean accuracy?"""
    hardness = rng.normal(0.8, 0.15, size=num_images)
    skill = rng.normal(0.0, 0.05, size=num_seeds)
    right = rng.random((num_seeds, num_images)) < np.clip(hardness + skill[:, None], 0, 1)
    labels = np.zeros((num_images, 1), int)
    probabilities = np.stack([right, ~right], axis=2).astype(float)
    draws = statistics.draw("binary", labels, num_seeds=num_seeds, resamples=300, seed=int(rng.integers(2**31)))
    found = statistics.interval(0.0, statistics.distribution("binary", labels, probabilities, draws)["accuracy"])
    return found.low <= TRUTH <= found.high


def expected_accuracy():
    rng = np.random.default_rng(1)
    return np.clip(rng.normal(0.8, 0.15, 10**6) + rng.normal(0.0, 0.05, 10**6), 0, 1).mean()


TRUTH = expected_accuracy()


@pytest.mark.parametrize("num_seeds", [3, 10])
def test_intervals_cover_the_truth(num_seeds):
    rng = np.random.default_rng(num_seeds)
    share = np.mean([simulated_truth_is_covered(rng, num_seeds=num_seeds) for _ in range(400)])
    assert 0.89 < share < 0.985


def test_pairing_narrows_the_interval_of_a_difference():
    labels, first = made("binary", num_images=150, num_seeds=3, skill=0.8)
    second = first + 0.02 * np.random.default_rng(1).normal(size=first.shape).astype(np.float32)
    paired, other = (statistics.draw("binary", labels, num_seeds=3, resamples=500, seed=seed) for seed in (0, 1))
    of_first, of_second = (statistics.distribution("binary", labels, one, paired)["auc"] for one in (first, second))
    unpaired = statistics.distribution("binary", labels, second, other)["auc"]
    together, apart = statistics.difference(0.0, of_first, of_second), statistics.difference(0.0, of_first, unpaired)
    assert together.high - together.low < 0.5 * (apart.high - apart.low)


def test_a_run_does_not_differ_from_itself():
    values = np.random.default_rng(0).random(200)
    assert statistics.difference(0.0, values, values) == statistics.Difference(0.0, 0.0, 0.0, 1.0)


def test_p_values_by_count_and_their_floor():
    zeros = np.zeros(99)
    assert statistics.difference(1.0, zeros + 1, zeros).p_value == pytest.approx(2 / 100)
    gaps = np.array([-1.0] * 9 + [1.0] * 90)
    assert statistics.difference(1.0, gaps, zeros).p_value == pytest.approx(2 * 10 / 100)
    assert statistics.difference(-1.0, -gaps, zeros).p_value == pytest.approx(2 * 10 / 100)


def test_p_values_are_uniform_where_nothing_differs():
    """Two runs of the same skill: no more than a share of about .05 of the p-values is below .05."""
    small = []
    for seed in range(150):
        labels, first = made("binary", num_images=60, num_seeds=4, seed=2 * seed)
        second = made_runs.probabilities_of("binary", labels, num_seeds=4, skill=1.0, seed=10_000 + seed)
        draws = statistics.draw("binary", labels, num_seeds=4, resamples=200, seed=seed)
        a, b = (statistics.distribution("binary", labels, one, draws)["accuracy"] for one in (first, second))
        small.append(statistics.difference(0.0, a, b).p_value < 0.05)
    assert np.mean(small) < 0.12


def test_a_metric_that_is_undefined_has_no_values():
    labels = np.array([[0], [1], [1]])
    probabilities = np.full((2, 3, 3), 1 / 3)  # class 2 never occurs
    found = statistics.distribution("multi-class", labels, probabilities, statistics.draw("multi-class", labels, num_seeds=2, resamples=9))
    assert np.isnan(found["auc"]).all()
    assert np.isfinite(found["balanced_accuracy"]).all()


def test_resamples_without_a_rare_label_are_left_out():
    labels = np.zeros((12, 2), int)
    labels[0, 0] = 1
    labels[:6, 1] = 1
    probabilities = np.random.default_rng(0).random((1, 12, 2))
    draws = statistics.draw("multi-label", labels, num_seeds=1, resamples=200)
    values = statistics.distribution("multi-label", labels, probabilities, draws)["auc"]
    assert 0.2 < np.isnan(values).mean() < 0.5  # (11 / 12) ** 12 = .35
    assert np.isfinite(statistics.interval(0.5, values).low)


def test_draws_of_others_are_refused():
    labels, probabilities = made("binary")
    draws = statistics.draw("binary", labels, num_seeds=2, resamples=5)
    with pytest.raises(ValueError, match="another number of seeds"):
        statistics.distribution("binary", labels, probabilities, draws)
    with pytest.raises(ValueError, match="at least one of each"):
        statistics.draw("binary", labels[:0], num_seeds=2)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),  # statsmodels 0.15.0, multipletests(method="holm")
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.2, 0.9, 0.5], [0.6, 1.0, 1.0]),
        ([0.01, 0.01], [0.02, 0.02]),
        ([], []),
    ],
)
def test_holm(p_values, adjusted):
    assert statistics.holm(p_values) == pytest.approx(adjusted)


def test_wilcoxon_is_scipys_from_six_sets_on():
    differences = [0.02, 0.05, -0.01, 0.08, 0.03, 0.04]
    assert statistics.wilcoxon(differences) == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert statistics.wilcoxon(differences[:5]) is None
    assert statistics.wilcoxon([0.0] * 6) == 1.0
