"""Folds of a cross-validation become one run of a report, and a sweep's arguments hold for all its points."""

import types

import made_runs
import numpy as np
import pytest

from vitmed import config, metrics, report
from vitmed.runs import folder
from vitmed.study import operating, points, series

FOLDS = 3


def write(root, *, folds=range(FOLDS), failed=(), other=None):
    """Runs of the folds, each with test images of its own; those of fold `other` were made of other files."""
    written = []
    for fold in folds:
        labels = made_runs.labels_of("binary", num_images=40 + fold, seed=fold)
        options = {"data__folds": FOLDS, "data__fold": fold, "skill": 1.0 + fold, "failed": failed if fold == 1 else ()}
        path = root / f"fold{fold}"
        written.append(made_runs.write(path, dataset="folder:scans", labels=labels, **options))
        rows = {"train": [], "test": []}
        for part in range(FOLDS):
            names = [f"{'other' if fold == other else 'file'}{part}-{index}" for index in range(40 + part)]
            rows["test" if part == fold else "train"] += [{"path": name, "label": "a", "group": ""} for name in names]
        folder.RunFolder(path).write_examples(rows)
        losses = made_runs.probabilities_of("binary", labels, num_seeds=3, skill=1.0, seed=fold)
        folder.RunFolder(path).write_calibration(operating.fit("binary", labels, losses, seeds=(0, 1, 2)))
    return written


def test_folds_are_pooled_into_all_images(tmp_path):
    written = write(tmp_path)
    runs, faults = series.collect([tmp_path])
    assert not faults
    assert [run.dataset for run in runs] == ["folder:scans"]
    labels = np.concatenate([labels for labels, _ in written])
    probabilities = np.concatenate([probabilities for _, probabilities in written], axis=1)
    np.testing.assert_array_equal(runs[0].labels, labels)
    np.testing.assert_array_equal(runs[0].probabilities, probabilities)
    expected = [metrics.compute("binary", labels, of_seed).values["balanced_accuracy"] for of_seed in probabilities]
    assert runs[0].of_seeds("test", "balanced_accuracy") == pytest.approx(expected)
    assert not runs[0].departures
    assert runs[0].calibration is None  # each fold has temperatures of its own
    of_folds = [folder.RunFolder(tmp_path / f"fold{fold}").read_result() for fold in range(FOLDS)]
    assert runs[0].result["train_seconds"] == sum(one["train_seconds"] for one in of_folds)
    counts = [len(labels) for labels, _ in written]
    losses = np.average([one["test"]["loss"] for one in of_folds], axis=0, weights=counts)
    assert runs[0].of_seeds("test", "loss") == pytest.approx(losses.tolist())


def test_a_seed_that_failed_in_one_fold_is_left_out_of_all_and_the_report_is_made(tmp_path):
    written = write(tmp_path / "runs", failed=(1,))
    runs, faults = series.collect([tmp_path / "runs"])
    assert runs[0].seeds == (0, 2)
    np.testing.assert_array_equal(runs[0].probabilities[1], np.concatenate([probabilities[2] for _, probabilities in written]))
    assert any("failed seeds 1" in fault for fault in faults)
    assert report.main([f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path / 'report'}", "--resamples=100"]) == 1


def test_folds_of_different_files_are_not_pooled(tmp_path):
    write(tmp_path, other=2)
    made_runs.write(tmp_path / "other", patch="14")
    runs, faults = series.collect([tmp_path])
    assert [run.dataset for run in runs] == ["breastmnist"]
    assert len([fault for fault in faults if "different examples" in fault]) == FOLDS


def test_a_missing_fold_is_named(tmp_path):
    write(tmp_path, folds=(0, 2))
    made_runs.write(tmp_path / "other", patch="14")
    runs, faults = series.collect([tmp_path])
    assert [run.dataset for run in runs] == ["breastmnist"]
    assert len(faults) == 2
    assert all("folds 0, 2 of 3 are there" in fault for fault in faults)


SWEEP = [{"dataset": name, "patch": patch} for name in ("a", "b") for patch in (14, 7)]


def of_sweep(argument, sweep=lambda: SWEEP):
    return points.of_sweep(types.SimpleNamespace(__file__="own.py", sweep=sweep), argument)


def test_arguments_hold_for_all_points():
    assert [point.argument for point in of_sweep("dataset=folder:/data/ct,size=64")] == [
        "dataset=folder:/data/ct,patch=14,size=64",
        "dataset=folder:/data/ct,patch=7,size=64",
    ]
    assert [point.name for point in of_sweep("dataset=folder:/data/ct")] == ["folder_data_ct-patch14", "folder_data_ct-patch7"]
    assert len(of_sweep("")) == 4
    given = of_sweep("folds=2", lambda arg: [{"fold": fold} for fold in range(int(arg.partition("=")[2]))])
    assert [point.argument for point in given] == ["fold=0,folds=2", "fold=1,folds=2"]
    with pytest.raises(config.InputError, match="key=value"):
        of_sweep("patch")


def test_the_folds_config_has_a_point_for_each():
    made = points.of_sweep(config.load_module("configs/folds3d.py"), "dataset=folder:scans,patch=14,folds=4")
    loaded = [config.load(f"configs/folds3d.py:{point.argument}") for point in made]
    assert [(one.data.folds, one.data.fold, one.data.name, one.data.rank) for one in loaded] == [
        (4, fold, "folder:scans", 3) for fold in range(4)
    ]
    assert len(points.of_sweep(config.load_module("configs/folds2d.py"), "dataset=folder:scans")) == 5
