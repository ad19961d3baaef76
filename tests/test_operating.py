"""Temperature scaling and operating points against scikit-learn, brute force and known answers."""

import json

import made_runs
import numpy as np
import pytest
from scipy import special
from sklearn import metrics as peer

from vitmed import config, metrics
from vitmed.runs import folder
from vitmed.study import calibration, operating

SEEDS = (4, 7, 9)


def made(task, *, num_images=300, skill=1.5, sharper=1.0, num_seeds=3, seed=0):
    """Labels and probabilities whose logits are made `sharper` than they should be."""
    labels = made_runs.labels_of(task, num_images=num_images, seed=seed)
    probabilities = made_runs.probabilities_of(task, labels, num_seeds=num_seeds, skill=skill, seed=seed)
    return labels, operating.temper(task, probabilities, 1 / sharper).astype(np.float32)


@pytest.mark.parametrize("task", metrics.TASKS)
def test_the_temperature_is_that_of_the_least_loss_and_undoes_a_known_one(task):
    labels, probabilities = made(task)
    (plain,) = (operating.best_temperature(task, labels, probabilities[0]),)
    losses = {t: metrics.log_loss(task, labels, operating.temper(task, probabilities[0], t)) for t in (plain, plain * 0.98, plain * 1.02)}
    assert losses[plain] < min(losses[plain * 0.98], losses[plain * 1.02])
    _, sharper = made(task, sharper=3.0)
    assert operating.best_temperature(task, labels, sharper[0]) == pytest.approx(3 * plain, rel=1e-3)
    np.testing.assert_allclose(operating.temper(task, sharper[0], 3.0), probabilities[0], atol=1e-4)


@pytest.mark.parametrize("task", metrics.TASKS)
def test_a_temperature_changes_no_decision_and_mends_the_calibration_error(task):
    labels, probabilities = made(task, num_images=1500, sharper=4.0)
    calibrated = operating.apply(operating.fit(task, labels, probabilities, seeds=SEEDS), probabilities).of_seeds
    for before, after in zip(probabilities, calibrated, strict=True):
        np.testing.assert_array_equal(metrics.decided(task, before), metrics.decided(task, after))
        errors = [calibration.expected_calibration_error(task, labels, one) for one in (before, after)]
        assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("task", metrics.TASKS)
def test_probabilities_of_0_and_1_are_taken(task):
    labels, probabilities = made(task)
    certain = np.round(probabilities[:1])
    assert set(np.unique(certain)) == {0.0, 1.0}
    record = operating.fit(task, labels, certain, seeds=(0,))
    found = operating.apply(record, certain)
    assert np.isfinite(found.of_seeds).all()
    assert 1 < record["of_seeds"][0]["temperature"] <= operating.HOTTEST
    if task != "multi-label":
        np.testing.assert_allclose(found.of_seeds.sum(axis=-1), 1)


def test_where_every_image_is_right_nothing_is_made_surer():
    labels = np.array([[0], [1], [1]])
    probabilities = np.array([[0.6, 0.4], [0.3, 0.7], [0.45, 0.55]])
    assert operating.best_temperature("binary", labels, probabilities) == 1
    assert operating.best_temperature("multi-label", np.array([[1, 0]]), np.array([[0.6, 0.4]])) == 1
    probabilities[2] = (0.55, 0.45)
    assert operating.best_temperature("binary", labels, probabilities) != 1


@pytest.mark.parametrize("digits", [None, 1], ids=["distinct", "ties"])
def test_thresholds_are_those_that_brute_force_finds(digits):
    """Every threshold that makes a difference is tried; scikit-learn's curve has the same best sum."""
    labels, probabilities = made("binary", num_images=120)
    positive, scores = (labels[:, 0] == 1)[30:], probabilities[0, 30:, 1].astype(float)
    few = ~positive | (np.cumsum(positive) % 3 == 0)  # sides of different size
    positive, scores = positive[few], scores[few]
    scores = scores if digits is None else np.round(scores, digits)
    found = operating.operating_points(positive, scores)
    tried = [(t, np.mean(scores[positive] >= t), np.mean(scores[~positive] < t)) for t in [*np.unique(scores), 1.1]]
    reached = next(one for one in tried if one[2] >= 0.95)
    assert (found["specificity_95"]["sensitivity"], found["specificity_95"]["specificity"]) == pytest.approx(reached[1:])
    best = max(sensitivity + specificity for _, sensitivity, specificity in tried)
    assert found["youden"]["sensitivity"] + found["youden"]["specificity"] == pytest.approx(best)
    alarms, hits, _ = peer.roc_curve(positive, scores)
    assert best == pytest.approx(1 + (hits - alarms).max())
    for point in found.values():  # what is said to be reached is what a threshold of that value reaches
        assert point["sensitivity"] == pytest.approx(np.mean(scores[positive] >= point["threshold"]))
        assert point["specificity"] == pytest.approx(np.mean(scores[~positive] < point["threshold"]))


def test_edges_of_thresholds():
    positive = np.array([False, True])
    for scores in ([1.0, 1.0], [0.5, 0.5]):  # nothing tells them apart: none is called positive, or all
        found = operating.operating_points(positive, np.array(scores))
        assert found["specificity_95"]["threshold"] > scores[0]
        assert (found["specificity_95"]["sensitivity"], found["specificity_95"]["specificity"]) == (0, 1)
        assert (found["youden"]["threshold"], found["youden"]["sensitivity"]) == (0, 1)
    for low in (0.3, np.nextafter(0.3, 1)):  # the half between neighbouring floats is the lower one for one of these
        neighbours = np.array([low, np.nextafter(low, 1)])
        found = operating.operating_points(positive, neighbours)["youden"]
        assert found == {"threshold": neighbours[1], "sensitivity": 1, "specificity": 1}
    assert operating.operating_points(np.array([True, True]), neighbours) == {"specificity_95": None, "youden": None}


@pytest.mark.parametrize("task", metrics.TASKS)
def test_what_is_fitted_is_what_decisions_reach_on_the_same_images(task):
    labels, probabilities = made(task)
    record = operating.fit(task, labels, probabilities, seeds=SEEDS)
    found = operating.apply(record, probabilities)
    classes = operating.scored(task, 3 if task != "binary" else 2)
    truth = metrics.of_class(task, labels, probabilities.shape[2])[:, classes]
    for fitted, calibrated, seed in [
        *zip(record["of_seeds"], found.of_seeds, SEEDS, strict=True),
        (record["ensemble"], found.ensemble, None),
    ]:
        for rule in operating.RULES:
            decided = operating.decide(record, calibrated, rule=rule, seed=seed)
            assert decided.shape == truth.shape
            for column, one in enumerate(fitted["classes"]):
                assert np.mean(decided[truth[:, column], column]) == pytest.approx(one[rule]["sensitivity"])
                assert np.mean(decided[~truth[:, column], column] == 0) == pytest.approx(one[rule]["specificity"])
                if rule == "specificity_95":
                    assert one[rule]["specificity"] >= 0.95


def test_the_ensemble_is_the_mean_of_the_calibrated_seeds_calibrated_again():
    labels, probabilities = made("multi-class")
    record = operating.fit("multi-class", labels, probabilities, seeds=SEEDS)
    tempered = [
        special.softmax(np.log(p.astype(float)) / f["temperature"], axis=1) for p, f in zip(probabilities, record["of_seeds"], strict=True)
    ]
    mean = np.mean(tempered, axis=0)
    temperature = operating.best_temperature("multi-class", labels, mean)
    assert record["ensemble"]["temperature"] == temperature
    assert temperature < 0.98  # averaged independent errors: too unsure
    expected = special.softmax(np.log(mean) / temperature, axis=1)
    np.testing.assert_allclose(operating.apply(record, probabilities).ensemble, expected, atol=1e-12)


def test_failed_seeds_are_null_and_leave_the_others_and_the_ensemble_as_they_are():
    labels, probabilities = made("binary")
    two = operating.fit("binary", labels, probabilities[[0, 2]], seeds=(4, 9))
    probabilities[1] = np.nan
    record = operating.fit("binary", labels, probabilities, seeds=SEEDS)
    assert record["of_seeds"] == [two["of_seeds"][0], None, two["of_seeds"][1]]
    assert record["ensemble"] == two["ensemble"]
    found = operating.apply(record, probabilities)
    assert np.isnan(found.of_seeds[1]).all()
    assert np.isfinite(found.ensemble).all()
    with pytest.raises(config.InputError, match="seed 7 of this run failed"):
        operating.decide(record, found.of_seeds[1], rule="youden", seed=7)
    nothing = operating.fit("binary", labels, probabilities[[1]], seeds=(7,))
    assert (nothing["of_seeds"], nothing["ensemble"]) == ([None], None)
    assert np.isnan(operating.apply(nothing, probabilities[[1]]).ensemble).all()


def test_a_class_that_validation_lacks_is_undecided():
    labels, probabilities = made("multi-class")
    kept = labels[:, 0] != 2
    record = operating.fit("multi-class", labels[kept], probabilities[:, kept], seeds=SEEDS)
    assert record["ensemble"]["classes"][2] == {"class": 2, "specificity_95": None, "youden": None}
    decided = operating.decide(record, operating.apply(record, probabilities).ensemble, rule="youden")
    assert (decided[:, 2] == operating.UNDECIDED).all()
    assert set(np.unique(decided[:, 0])) == {0, 1}


def test_what_does_not_fit_is_named():
    labels, probabilities = made("binary")
    record = operating.fit("binary", labels, probabilities, seeds=SEEDS)
    with pytest.raises(config.InputError, match="of 3 seeds and 2 classes, the probabilities are 2x300x2"):
        operating.apply(record, probabilities[:2])
    with pytest.raises(config.InputError, match="did you mean youden"):
        operating.decide(record, probabilities[0], rule="yuden")
    with pytest.raises(config.InputError, match="seed 1 is not of this run; it has 4, 7, 9"):
        operating.decide(record, probabilities[0], rule="youden", seed=1)
    with pytest.raises(ValueError, match="do not fit the task"):
        operating.fit("multi-label", labels, probabilities, seeds=SEEDS)


@pytest.fixture
def run(tmp_path):
    """A folder with validation predictions, and what is fitted on them."""
    labels, probabilities = made("ordinal")
    run_folder = folder.RunFolder(tmp_path)
    run_folder.write_predictions("val", labels=labels, probabilities=probabilities, seeds=SEEDS)
    return run_folder, operating.fit("ordinal", labels, probabilities, seeds=SEEDS)


def test_it_is_written_and_read_back_and_fitted_where_an_older_run_has_none(run):
    run_folder, record = run
    assert run_folder.read_calibration() is None
    assert operating.of_run(run_folder, task="ordinal", seeds=SEEDS) == record
    run_folder.write_calibration(record)
    written = run_folder.calibration.read_bytes()
    assert operating.of_run(run_folder, task="ordinal", seeds=SEEDS) == record
    run_folder.write_calibration(operating.fit("ordinal", *made("ordinal"), seeds=SEEDS))
    assert run_folder.calibration.read_bytes() == written
    other = folder.RunFolder(run_folder.path / "other", writes=False)
    other.write_calibration(record)
    assert not other.path.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema_version": 2}, "has schema_version 2, this vitmed reads up to 1; install a newer vitmed"),
        ({"of_seeds": [{"temperature": 0, "classes": []}]}, r"does not match the schema: \$.of_seeds\[0\]"),
        ({"of_seeds": [None]}, "is not of this run: it has not one entry for each seed and class"),
        ({"seeds": [0, 1, 2]}, "is not of this run: it is of task ordinal and seeds"),
        ({"ensemble": None}, "its ensemble is not that of its seeds"),
        ({"num_classes": 4}, "it has not one entry for each seed and class"),
        ("{", "calibration.json is broken"),
    ],
)
def test_a_broken_or_newer_file_is_named(run, change, says):
    run_folder, record = run
    run_folder.calibration.write_text(change if isinstance(change, str) else json.dumps(record | change))
    with pytest.raises(config.InputError, match=says) as error:
        operating.of_run(run_folder, task="ordinal", seeds=SEEDS)
    assert str(run_folder.calibration) in str(error.value)


def test_what_departs_from_the_schema_is_not_written(run):
    run_folder, record = run
    with pytest.raises(ValueError, match=r"does not match runs/calibration.schema.json"):
        run_folder.write_calibration({**record, "seeds": []})
    assert not run_folder.calibration.exists()
