"""Runs read back from folders, sorted into series, made into ensembles and compared."""

import dataclasses
import json
import shutil

import made_runs
import numpy as np
import pytest
from scipy import stats

from vitmed import config as config_lib
from vitmed import metrics
from vitmed.study import analysis, collection, comparisons, figures, results, series, statistics, subjects, summary

RESAMPLES = 200


def study(root, **options):
    runs, faults = series.collect([root])
    return analysis.analyse(runs, faults=faults, **({"resamples": RESAMPLES} | options))


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    """One data set at four patch sizes, better the smaller the patch."""
    root = tmp_path_factory.mktemp("patches")
    for patch, skill in (("28", 0.3), ("14", 0.6), ("7", 1.2), ("4", 2.5)):
        made_runs.write(root / f"p{patch}", patch=patch, skill=skill)
    return root


def test_runs_come_back_from_the_coarsest_patch_to_the_finest(patches):
    runs, faults = series.collect([patches])
    assert faults == []
    assert [run.patch for run in runs] == ["28", "14", "7", "4"]
    assert [run.name for run in runs] == ["patch 28", "patch 14", "patch 7", "patch 4"]
    assert runs[0].of_seeds("test", "auc") == runs[0].result["test"]["auc"]


def test_a_folder_given_twice_is_read_once(patches):
    runs, faults = series.collect([patches, patches / "p7"])
    assert (len(runs), faults) == (4, [])


def test_failed_seeds_are_left_out(tmp_path):
    made_runs.write(tmp_path / "a", seeds=(3, 4, 5), failed=(4,))
    (run,), faults = series.collect([tmp_path])
    assert faults == [f"{tmp_path / 'a'}: left out: failed seeds 4"]
    assert run.seeds == (3, 5)
    assert np.isfinite(run.probabilities).all()
    assert run.of_seeds("test", "auc") == [run.result["test"]["auc"][0], run.result["test"]["auc"][2]]


def spoil(path, kind):
    """Damage a run's folder; what is said of it."""
    result = path / "result.json"
    if kind == "half-written":
        result.unlink()
        return "not finished"
    if kind == "newer":
        result.write_text(json.dumps(json.loads(result.read_text()) | {"schema_version": 99}))
        return "schema_version 99"
    if kind == "truncated":
        file = path / "predictions" / "test.npz"
        file.write_bytes(file.read_bytes()[:-40])
        return "is broken"
    if kind == "no predictions":
        (path / "predictions" / "test.npz").unlink()
        return "no predictions"
    if kind == "no config":
        (path / "config.json").unlink()
        return "no config.json"
    if kind == "other config":
        config = path / "config.json"
        config.write_text(config.read_text().replace("0.05", "0.07"))
        return "not of the run that config.json describes"
    if kind == "failed":
        result.unlink()
        (path / "failure.json").write_text(json.dumps({"ended": "exit status 1", "said": "the disk is full"}))
        return "failed: exit status 1: the disk is full; mend that and run it again"
    if kind == "only failed":
        shutil.rmtree(path)
        path.mkdir()
        (path / "failure.json").write_text(json.dumps({"ended": "killed by SIGKILL", "said": None}))
        return "failed: killed by SIGKILL"
    if kind == "labels":
        file = dict(np.load(path / "predictions" / "test.npz"))
        np.savez(path / "predictions" / "test.npz", **(file | {"labels": file["labels"] + 1}))
        return "labels from 1 to 2, its task has 0 to 1"
    raise AssertionError(kind)


SPOILT = ["half-written", "newer", "truncated", "no predictions", "no config", "other config", "failed", "only failed", "labels"]


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_folder_is_named_and_the_rest_is_read(tmp_path, kind):
    for patch in ("28", "7"):
        made_runs.write(tmp_path / f"p{patch}", patch=patch)
    said = spoil(tmp_path / "p7", kind)
    runs, (fault,) = series.collect([tmp_path])
    assert [run.patch for run in runs] == ["28"]
    assert fault.startswith(f"{tmp_path / 'p7'}: ")
    assert said in fault
    assert len(fault.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"epoch": 1, "val": {"loss": [1, 1, 1]}}\n', "metrics.jsonl line 1 has no train_loss of 3 seeds"),
        ('{"epoch": 1\n', "metrics.jsonl line 1 is broken"),
        ("\0", "metrics.jsonl line 1 is broken"),
    ],
)
def test_without_its_curves_a_run_is_still_read(tmp_path, content, says):
    made_runs.write(tmp_path / "p7", patch="7")
    (tmp_path / "p7" / "metrics.jsonl").write_text(content)
    (run,), (fault,) = series.collect([tmp_path])
    assert fault.startswith(f"{tmp_path / 'p7'}: learning curves left out: {says}")
    assert len(run.epochs) == 0
    one = analysis.analyse([run], resamples=100).data_sets[0]
    assert figures.learning_curves(one)


def test_nothing_finished_is_an_input_error(tmp_path):
    with pytest.raises(config_lib.InputError, match="no finished run there; train some"):
        series.collect([tmp_path])
    with pytest.raises(config_lib.InputError, match="no such folder"):
        series.collect([tmp_path / "absent"])
    made_runs.write(tmp_path / "a")
    (tmp_path / "a" / "result.json").unlink()
    with pytest.raises(config_lib.InputError, match="not finished"):
        series.collect([tmp_path])


def test_other_labels_and_twins_are_left_out(tmp_path):
    labels = made_runs.labels_of("binary")
    for patch in ("28", "14"):
        made_runs.write(tmp_path / f"p{patch}", patch=patch, labels=labels)
    made_runs.write(tmp_path / "other", patch="7", labels=1 - labels)
    made_runs.write(tmp_path / "twin", patch="14", seeds=(5,), labels=labels)
    runs, faults = series.collect([tmp_path])
    assert [run.path.name for run in runs] == ["p28", "p14"]
    assert "other data" in faults[0]
    assert "has the same settings and 3 seeds; seeds of several runs are not pooled" in faults[1]


def test_series_are_named_by_the_settings_that_are_odd(tmp_path):
    for patch in ("28", "7"):
        made_runs.write(tmp_path / f"plain{patch}", patch=patch)
    made_runs.write(tmp_path / "slow", patch="7", train__learning_rate=3e-5)
    runs, _ = series.collect([tmp_path])
    assert [(run.series, run.patch) for run in runs] == [("", "28"), ("", "7"), ("learning rate 3e-05", "7")]


def test_a_model_folder_of_others_is_no_run(tmp_path):
    made_runs.write(tmp_path / "a")
    (tmp_path / "dinov2").mkdir()
    (tmp_path / "dinov2" / "config.json").write_text('{"model_type": "dinov2"}')
    assert series.collect([tmp_path])[1] == []


@pytest.mark.parametrize("folders", [("a", "b"), ("b", "a")])
def test_of_equally_many_the_recipes_own_setting_is_the_plain_one(tmp_path, folders):
    """Whatever the folders are called."""
    made_runs.write(tmp_path / folders[0], patch="7")
    made_runs.write(tmp_path / folders[1], patch="7", train__batch_size=16)
    runs, _ = series.collect([tmp_path])
    assert [run.series for run in runs] == ["", "batch size 16"]


def test_a_setting_that_an_older_run_lacks_is_the_recipes(tmp_path):
    made_runs.write(tmp_path / "old", patch="28")
    made_runs.write(tmp_path / "new", patch="7")
    runs, _ = collection.read_all([tmp_path])
    older = {name: value for name, value in runs[0].config.items() if name != "model.position_resize"}
    assert [run.series for run in series.named([dataclasses.replace(runs[0], config=older), runs[1]])] == ["", ""]


def test_names_that_would_be_the_same_are_written_in_full(tmp_path):
    for place in ("one", "other"):
        made_runs.write(tmp_path / place, patch="7", model__pretrained=f"{place}/weights.npz")
    made_runs.write(tmp_path / "plain", patch="7")
    runs, faults = series.collect([tmp_path])
    assert faults == []
    assert [run.series for run in runs[1:]] == ["model.pretrained 'one/weights.npz'", "model.pretrained 'other/weights.npz'"]


def test_the_recipe_itself_is_the_plain_one_however_many_others_there_are(tmp_path):
    made_runs.write(tmp_path / "recipe", patch="7")
    for patch in ("28", "14", "7"):
        made_runs.write(tmp_path / f"head{patch}", patch=patch, train__tune="head", train__learning_rate=1e-3)
    (one,) = study(tmp_path).data_sets
    assert [run.subject.run.path.name for run in one.plain.runs] == ["recipe"]
    assert one.series[1].name == "learning rate 0.001, tune head"
    assert {each.second.run.path.name for each in one.series[1].against_plain} == {"recipe"}


def test_where_no_run_is_plain_nothing_is_held_against_one(tmp_path):
    for field, value in (("model__pooling", "mean"), ("train__learning_rate", 3e-5), ("train__batch_size", 16)):
        made_runs.write(tmp_path / field, patch="28", **{field: value})
    (one,) = study(tmp_path).data_sets
    assert one.plain is None
    assert not any(each.against_plain for each in one.series)
    assert any("No run has all the usual settings" in sentence for sentence in summary.of_data_set(one))


def test_an_ensemble_is_the_mean_probability_of_each_seed(patches):
    """Recomputed from the saved files in plain numpy."""
    (one,) = study(patches).data_sets
    made = {member.subject.patch: member for member in one.series[0].ensembles}
    assert list(made) == ["28+14+7+4"]
    files = [np.load(patches / f"p{patch}" / "predictions" / "test.npz") for patch in (28, 14, 7, 4)]
    mean = sum(file["probabilities"].astype(float) for file in files) / 4
    truth = files[0]["labels"][:, 0]
    accuracies = [(of_seed.argmax(axis=1) == truth).mean() for of_seed in mean]
    assert made["28+14+7+4"].per_seed["accuracy"] == pytest.approx(accuracies, abs=1e-12)
    positive, negative = mean[:, truth == 1, 1], mean[:, truth == 0, 1]
    areas = [np.mean((p[:, None] > n) + 0.5 * (p[:, None] == n)) for p, n in zip(positive, negative, strict=True)]
    assert made["28+14+7+4"].per_seed["auc"] == pytest.approx(areas, abs=1e-12)


def test_ensembles_take_the_papers_patches_that_are_there_or_those_asked_for(tmp_path):
    for patch in ("28", "4", "2"):
        made_runs.write(tmp_path / f"p{patch}", patch=patch)
    members = subjects.of_runs(series.collect([tmp_path])[0])
    assert [one.patch for one in subjects.ensembles(members)] == ["4+2", "28+4+2"]
    assert [one.patch for one in subjects.ensembles(members, [("28", "2"), ("4", "1")])] == ["28+2"]


def test_an_ensemble_takes_the_common_seeds(tmp_path):
    made_runs.write(tmp_path / "a", patch="28", seeds=(0, 1, 2))
    made_runs.write(tmp_path / "b", patch="7", seeds=(2, 1, 7))
    members = subjects.of_runs(series.collect([tmp_path])[0])
    made = subjects.ensemble(members)
    assert made.seeds == (1, 2)
    expected = (members[0].probabilities[1].astype(float) + members[1].probabilities[1]) / 2  # seed 1 of each
    np.testing.assert_allclose(made.probabilities[0], expected, rtol=1e-12)


def test_an_ensemble_over_data_sets_is_refused(tmp_path):
    made_runs.write(tmp_path / "a")
    made_runs.write(tmp_path / "b", dataset="pneumoniamnist")
    members = subjects.of_runs(series.collect([tmp_path])[0])
    with pytest.raises(config_lib.InputError, match=r"pneumoniamnist.*different ones; take one data set"):
        subjects.ensemble(members)


def test_gains_are_differences_of_means_with_holms_correction(patches):
    (one,) = study(patches).data_sets
    plain = one.series[0]
    gains = [gain for gain in plain.gains if gain.metric == "balanced_accuracy"]
    assert [(gain.first.patch, gain.second.patch) for gain in gains] == [("14", "28"), ("7", "28"), ("4", "28")]
    means = {member.subject.patch: np.mean(member.per_seed["balanced_accuracy"]) for member in plain.runs}
    assert [gain.difference.estimate for gain in gains] == pytest.approx([means[p] - means["28"] for p in ("14", "7", "4")])
    assert all(gain.difference.low <= gain.difference.estimate <= gain.difference.high for gain in gains)
    p_values = [gain.difference.p_value for gain in gains]
    assert [gain.adjusted for gain in gains][p_values.index(min(p_values))] == pytest.approx(min(1.0, 3 * min(p_values)))
    assert gains[-1].difference.low > 0  # patch 4 is far better by construction


def test_the_papers_contrast_or_the_nearest_to_it(patches, tmp_path):
    (one,) = study(patches).data_sets
    contrast = one.series[0].contrast
    assert {(asked.first.patch, asked.second.patch) for asked in contrast.comparisons} == {("4", "28")}
    assert contrast.note == "patch 2, the paper's small patch, was not run; 4 is the smallest that was"
    for patch in ("28", "14", "1"):
        made_runs.write(tmp_path / f"p{patch}", dataset="fracturemnist3d", task="multi-class", patch=patch, rank=3)
    (volumes,) = study(tmp_path).data_sets
    contrast = volumes.series[0].contrast
    assert {(asked.first.patch, asked.second.patch) for asked in contrast.comparisons} == {("1", "14")}
    assert contrast.note == ""


def test_without_the_large_patch_there_is_no_contrast(tmp_path):
    made_runs.write(tmp_path / "a", patch="7")
    (one,) = study(tmp_path).data_sets
    assert one.series[0].contrast == comparisons.Contrast((), "patch 28, which the paper's contrast starts from, was not run")


def test_another_series_is_held_against_the_plain_one(tmp_path):
    for patch in ("28", "7"):
        made_runs.write(tmp_path / f"plain{patch}", patch=patch, skill=3.0)
    made_runs.write(tmp_path / "odd", patch="7", skill=0.1, model__pooling="mean")
    (one,) = study(tmp_path).data_sets
    asked = next(asked for asked in one.series[1].against_plain if asked.metric == "balanced_accuracy")
    assert (asked.first.name, asked.second.name) == ("patch 7, pooling mean", "patch 7")
    assert asked.difference.high < 0


def test_slices_are_held_against_patches_that_are_trained_alike(tmp_path):
    lora, one, three = {"train__tune": "lora"}, {"model__views": "axial"}, {"model__views": "axial,coronal,sagittal"}
    for name, patch, skill, fields in (
        ("plain", "1x14x14", 2.0, {}),
        ("lora", "1x14x14", 0.3, lora),
        ("slices", "1x14x14", 2.0, lora | one),
        ("three", "1x14x14", 3.0, lora | three),
        ("as many tokens", "4x7x7", 0.3, lora),  # 113, of slices 140
        ("few tokens", "14", 0.3, lora),
        ("plain slices", "1x14x14", 2.0, one),
        ("head", "1x14x14", 2.0, {"train__tune": "head"} | one),
        ("more patches", "1x28x28", 2.0, {}),
        ("and more", "28", 2.0, {}),
        ("and more of them", "7", 2.0, {}),
    ):
        made_runs.write(tmp_path / name, dataset="fracturemnist3d", rank=3, patch=patch, skill=skill, **fields)
    (found,) = study(tmp_path).data_sets

    def pairs(asked):
        return {(one.first.run.path.name, one.second.run.path.name) for one in asked if one.metric == "balanced_accuracy"}

    against_patches = {("slices", "lora"), ("slices", "as many tokens"), ("three", "lora")}
    assert pairs(found.against_patches) == against_patches
    assert pairs(found.other_views) == {("three", "slices")}
    asked = [each for each in found.against_patches if each.metric == "balanced_accuracy"]
    assert all(each.difference.low > 0 for each in asked)
    assert [each.adjusted for each in asked] == pytest.approx(list(statistics.holm([each.difference.p_value for each in asked])))
    rows = [(row[0].text, row[2].text) for row in results.differences(found).rows]
    assert len({(frozenset(pair.split(" - ")), metric) for pair, metric in rows}) == len(rows)  # also not the other way round
    assert ("plain slices", "plain") in pairs(each for one in found.series for each in one.against_plain)
    said = [sentence for sentence in summary.of_data_set(found) if "rained alike" in sentence]
    assert len(said) == 4
    start = "Trained alike, patch 1x14x14, views axial, tune lora against patch 1x14x14, tune lora: balanced accuracy +"
    assert sum(sentence.startswith(start) for sentence in said) == 1


def test_the_learning_rate_is_chosen_on_validation_loss(tmp_path):
    for rate, skill in ((1e-5, 0.5), (3e-5, 3.0), (1e-4, 1.5)):  # made runs of more skill have less validation loss
        for patch in ("28", "7"):
            made_runs.write(tmp_path / f"{rate}-{patch}", patch=patch, skill=skill, train__learning_rate=rate)
    (one,) = study(tmp_path).data_sets
    chosen = next(each for each in one.series if each.name == subjects.CHOSEN)
    assert [(run.subject.patch, run.subject.run.config["train.learning_rate"]) for run in chosen.runs] == [("28", 3e-5), ("7", 3e-5)]


def test_a_chosen_run_is_not_held_against_itself(tmp_path):
    for rate, skill in ((1e-4, 3.0), (1e-5, 0.5)):
        made_runs.write(tmp_path / f"{rate}", patch="7", skill=skill, train__learning_rate=rate)
    (one,) = study(tmp_path).data_sets
    assert one.series[0].runs[0].subject.run.config["train.learning_rate"] == 1e-4
    chosen = next(each for each in one.series if each.name == subjects.CHOSEN)
    assert chosen.runs[0].subject.runs == one.series[0].runs[0].subject.runs
    assert chosen.against_plain == ()


def test_rates_are_chosen_within_each_group_of_other_settings(tmp_path):
    for pooling, best in (("auto", 1e-5), ("mean", 1e-4)):
        for rate in (1e-5, 1e-4):
            for patch in ("28", "7"):
                path = tmp_path / f"{pooling}{rate}{patch}"
                made_runs.write(path, patch=patch, skill=3.0 if rate == best else 0.5, train__learning_rate=rate, model__pooling=pooling)
    runs, _ = series.collect([tmp_path])
    chosen = [(one.series, one.patch, one.run.config["train.learning_rate"]) for one in subjects.chosen_rates(subjects.of_runs(runs))]
    other = f"{subjects.CHOSEN}, pooling mean"
    assert chosen == [(subjects.CHOSEN, "28", 1e-5), (subjects.CHOSEN, "7", 1e-5), (other, "28", 1e-4), (other, "7", 1e-4)]


def test_a_rate_at_which_seeds_fail_is_not_chosen(tmp_path):
    made_runs.write(tmp_path / "a", patch="7", skill=3.0, train__learning_rate=1e-4, failed=(1,))
    made_runs.write(tmp_path / "b", patch="7", skill=0.5, train__learning_rate=1e-5)
    (chosen,) = subjects.chosen_rates(subjects.of_runs(series.collect([tmp_path])[0]))
    assert chosen.run.config["train.learning_rate"] == 1e-5


def test_chosen_runs_come_from_the_coarsest_patch_to_the_finest(tmp_path):
    """Also where the plain series, at 1e-4, begins with a finer one than another rate's."""
    for patch, *rates in (("28", 3e-5, 1e-5), ("14", 1e-4, 3e-5), ("7", 1e-4, 1e-5), ("4", 1e-4, 1e-5)):
        for rate in rates:
            made_runs.write(tmp_path / f"{patch}-{rate}", patch=patch, train__learning_rate=rate)
    runs, _ = series.collect([tmp_path])
    assert [run.patch for run in runs][:3] == ["14", "7", "4"]
    assert [one.patch for one in subjects.chosen_rates(subjects.of_runs(runs))] == ["28", "14", "7", "4"]


def test_a_set_at_two_sizes_counts_once(tmp_path):
    for size in (28, 64):
        for patch in ("28", "7"):
            made_runs.write(tmp_path / f"{size}-{patch}", patch=patch, data__size=size)
    found = study(tmp_path).across
    assert {tuple(one.contrasts) for one in found} == {("breastmnist",)}
    assert "breastmnist (patch 7 against 28)" in summary.across(found[0])


@pytest.mark.parametrize(
    ("adjusted", "words"), [(0.01, "patch 4 is better here"), (0.2, "not told apart once corrected"), (None, "better")]
)
def test_words_heed_holms_correction(patches, adjusted, words):
    (one,) = study(patches).data_sets
    clear = dataclasses.replace(one.series[0].gains[-1], adjusted=adjusted)
    assert clear.difference.low > 0
    assert words in summary.verdict(clear)


def test_where_rates_do_not_vary_none_is_chosen(patches):
    assert subjects.chosen_rates(subjects.of_runs(series.collect([patches])[0])) == []


@pytest.mark.parametrize(("num_sets", "tells"), [(5, False), (6, True)])
def test_wilcoxon_needs_six_data_sets(tmp_path, num_sets, tells):
    names = ("breastmnist", "pneumoniamnist", "bloodmnist", "dermamnist", "octmnist", "pathmnist")[:num_sets]
    for name in names:
        made_runs.write(tmp_path / f"{name}28", dataset=name, patch="28", skill=0.2)
        made_runs.write(tmp_path / f"{name}2", dataset=name, patch="2", skill=2.0)
    found = next(one for one in study(tmp_path, resamples=100).across if one.metric == "balanced_accuracy")
    assert set(found.contrasts) == set(names)
    expected = stats.wilcoxon([asked.difference.estimate for asked in found.contrasts.values()]).pvalue if tells else None
    assert found.p_value == (pytest.approx(expected) if tells else None)


@pytest.mark.parametrize("task", metrics.TASKS)
def test_every_task_is_measured(tmp_path, task):
    for patch in ("28", "7"):
        made_runs.write(tmp_path / patch, patch=patch, task=task, labels=made_runs.labels_of(task))
    (one,) = study(tmp_path).data_sets
    for member in one.series[0].members:
        for name in metrics.metric_names(task):
            interval = member.intervals[name]
            assert interval.low <= interval.estimate <= interval.high
            assert interval.estimate == pytest.approx(np.mean(member.per_seed[name]))
