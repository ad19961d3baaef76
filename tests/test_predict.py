"""Files predicted by runs that are finished: the run's own numbers again, whatever else lies in the folder, and nothing half written."""

import csv
import dataclasses
import json
import pathlib
import shutil
import weakref

import numpy as np
import pytest
from PIL import Image

from vitmed import cli, evaluate, experiment, external, inference, main, predict
from vitmed import config as config_lib
from vitmed.data import listing, preparation, sources, streaming
from vitmed.runs import folder, guard
from vitmed.study import operating
from vitmed.training import augment

ROOT = pathlib.Path(__file__).parent.parent
QUICKSTART = f"{ROOT}/configs/quickstart.py"
SMALL = ["--config.model.variant=vit_micro", "--config.train.epochs=1", "--config.train.batch_size=300"]


def call(command, *argv: object) -> int:
    """Run a CLI in this process; its exit status."""
    return cli.run_cli(command.main, [str(argument) for argument in argv])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A finished run of two seeds on images."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    assert call(main, f"--config={QUICKSTART}:patch=14", f"--workdir={workdir}", *SMALL) == 0
    return workdir


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> pathlib.Path:
    """Another, of one seed and another patch size, on images that it inverts."""
    workdir = tmp_path_factory.mktemp("other") / "other"
    fields = ["--config.data.invert=true", "--config.seeds=5"]
    assert call(main, f"--config={QUICKSTART}:patch=7x28", f"--workdir={workdir}", *SMALL, *fields) == 0
    return workdir


@pytest.fixture(scope="module")
def test_split():
    return sources.load("phantom2d", size=28).splits["test"]


def save(images, path, names=None):
    """Write images uint8 [N, H, W, 1] as PNG files into a folder."""
    path.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(path / (names[index] if names else f"{index:03d}.png"))
    return path


def read(path):
    """The rows of a predictions.csv."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def probabilities(rows):
    return np.array([[float(row["probability_blob"]), float(row["probability_specks"])] for row in rows])


def test_the_predictions_are_the_runs_own(run, test_split, tmp_path):
    images = save(test_split.images[:40], tmp_path / "images")
    assert call(predict, f"--workdir={run}", f"--input={images}", f"--out={tmp_path / 'out.csv'}", "--batch_size=16") == 0
    stored = folder.RunFolder(run).read_predictions("test").probabilities[:, :40].astype(np.float64)
    rows = read(tmp_path / "out.csv")
    assert [row["path"] for row in rows] == [str(images / f"{index:03d}.png") for index in range(40)]
    np.testing.assert_allclose(probabilities(rows), stored.mean(axis=0), atol=2e-6)
    spread = np.abs(stored[0] - stored[1])[:, 1] / np.sqrt(2)
    np.testing.assert_allclose([float(row["sd_specks"]) for row in rows], spread, atol=2e-6)
    assert [row["label"] for row in rows] == [("blob", "specks")[each] for each in stored.mean(axis=0).argmax(axis=1)]
    assert {row["error"] for row in rows} == {""}
    record = folder.RunFolder(run).read_calibration()
    calibrated = operating.apply(record, stored).ensemble
    np.testing.assert_allclose([float(row["calibrated_specks"]) for row in rows], calibrated[:, 1], atol=4e-6)
    for column, rule in predict.POSITIVE.items():
        threshold = record["ensemble"]["classes"][0][rule]["threshold"]
        clear = np.abs(calibrated[:, 1] - threshold) > 1e-5
        decided = np.array([int(row[column]) for row in rows])
        assert (decided == (calibrated[:, 1] >= threshold))[clear].all()


def test_an_ensemble_counts_every_member_alike_and_draws_one_heat_of_several_grids(run, other, test_split, tmp_path):
    images = save(test_split.images[:3], tmp_path / "images")
    argv = [f"--workdir={run}", f"--workdir={other}", f"--input={images}", "--explain=gradient"]
    assert call(predict, *argv, f"--out={tmp_path / 'both.csv'}") == 0
    stored = np.concatenate([folder.RunFolder(path).read_predictions("test").probabilities[:, :3] for path in (run, other)])
    rows = read(tmp_path / "both.csv")
    np.testing.assert_allclose(probabilities(rows), stored.mean(axis=0), atol=2e-6)
    np.testing.assert_allclose([float(row["sd_blob"]) for row in rows], stored[..., 0].std(axis=0, ddof=1), atol=2e-6)
    runs = [inference.open_run(path) for path in (run, other)]
    ensemble = inference.Ensemble(runs, batch_size=3, method="gradient")
    files = list(streaming.stream(listing.find(images, 2), ensemble.hows, ensemble.shapes, ahead=3))
    assert not any(name.startswith(("calibrated", "positive")) for name in rows[0])  # no one fitted them to both
    (first, *_), places = ensemble.heat(files, stored.mean(axis=0).argmax(axis=1)), [(np.arange(28) + 0.5) / 28] * 2
    assert [heat.shape for heat in first] == [(2, 2), (4, 1)]
    of_runs = [np.kron(heat, np.ones(shape)) / heat.mean() for heat, shape in zip(first, ((14, 14), (7, 28)), strict=True)]
    np.testing.assert_allclose(ensemble.spread(first, files[0], places), (2 * of_runs[0] + of_runs[1]) / 3, rtol=1e-4)
    assert [row["heatmap"] for row in rows] == [f"{number:06d}_{number - 1:03d}.png" for number in (1, 2, 3)]


def test_files_that_cannot_be_read_are_named_and_the_others_predicted(run, test_split, tmp_path, capsys):
    images = save(test_split.images[:5], tmp_path / "images", [f"{letter}.png" for letter in "acegi"])
    (images / "b.png").write_bytes(b"no picture")
    (images / "f.png").write_bytes((images / "a.png").read_bytes()[:80])
    assert (
        call(predict, f"--workdir={run}", f"--input={images}", f"--out={tmp_path / 'out.csv'}", "--batch_size=2", "--explain=rollout") == 1
    )
    said = capsys.readouterr()
    assert "5 of 7 files predicted" in said.out
    lines = said.err.splitlines()
    assert sum("b.png" in line for line in lines) == sum("f.png" in line for line in lines) == 1
    assert any("2 of 7 files could not be read" in line for line in lines)
    rows = read(tmp_path / "out.csv")
    assert [pathlib.Path(row["path"]).stem for row in rows] == list("abcefgi")
    assert [bool(row["error"]) for row in rows] == [False, True, False, False, True, False, False]
    good = [row for row in rows if not row["error"]]
    stored = folder.RunFolder(run).read_predictions("test").probabilities[:, :5].mean(axis=0)
    np.testing.assert_allclose(probabilities(good), stored, atol=2e-6)
    assert all(row["probability_blob"] == row["label"] == row["heatmap"] == "" for row in rows if row["error"])
    assert {file.name for file in (tmp_path / "out_heatmaps").iterdir()} == {row["heatmap"] for row in good}


def test_test_time_augmentation_is_the_mean_over_the_flips_that_training_drew(run, test_split, tmp_path, capsys):
    whole = folder.RunFolder(run).read_predictions("test").probabilities[:, :8].mean(axis=0)
    images, turned = save(test_split.images[:8], tmp_path / "images"), save(test_split.images[:8, :, ::-1], tmp_path / "turned")
    assert call(predict, f"--workdir={run}", f"--input={turned}", f"--out={tmp_path / 'turned.csv'}", "--batch_size=8") == 0
    assert call(predict, f"--workdir={run}", f"--input={images}", f"--out={tmp_path / 'tta.csv'}", "--batch_size=8", "--tta=flips") == 0
    parts = probabilities(read(tmp_path / "turned.csv"))
    assert np.abs(parts - whole).max() > 1e-4
    np.testing.assert_allclose(probabilities(read(tmp_path / "tta.csv")), (whole + parts) / 2, atol=4e-6)


def test_views_are_what_the_augmentation_draws_and_each_comes_once():
    images = np.random.default_rng(0).normal(size=(2, 3, 3, 1)).astype(np.float32)
    everything = [np.rot90(each, turn, axes=(1, 2)) for each in (images, images[:, ::-1]) for turn in range(4)]
    cases = [
        ("none", augment.Augmentation(flip_w=0.5, quarter_turns=True), [images]),
        ("flips", augment.Augmentation(flip_w=0.5), [images, images[:, :, ::-1]]),
        ("flips", augment.Augmentation(flip_h=0.1, quarter_turns=True), [images, images[:, ::-1]]),
        ("flips", augment.Augmentation(flip_h=0.1, flip_w=1.0), [images, images[:, ::-1], images[:, :, ::-1], images[:, ::-1, ::-1]]),
        ("all", augment.Augmentation(flip_w=0.5), [images, images[:, :, ::-1]]),
        ("all", augment.Augmentation(quarter_turns=True), everything[:4]),
        ("all", augment.Augmentation(flip_w=0.5, quarter_turns=True), everything),
        ("all", augment.Augmentation(flip_h=0.5, flip_w=0.5, quarter_turns=True), everything),
    ]
    for kind, augmentation, expected in cases:
        made = [np.asarray(view(images)) for view in augment.views(augmentation, kind)]
        np.testing.assert_array_equal(made[0], images)
        assert {each.tobytes() for each in made} == {np.ascontiguousarray(each).tobytes() for each in expected}
        assert len(made) == len(expected)
    for kind in ("flips", "all"):
        with pytest.raises(config_lib.InputError, match="trained without flips"):
            augment.views(augment.Augmentation(rotation_degrees=10), kind)


def test_a_long_list_is_never_in_memory_as_a_whole(run, test_split, tmp_path, monkeypatch):
    save(test_split.images[:2], tmp_path)
    (tmp_path / "list.csv").write_text("path,note\n" + "000.png,a\n001.png,b\n" * 600)
    alive, most = weakref.WeakSet(), [0]
    finished = preparation.finished

    class Counted(np.ndarray):
        """An array that weak references can be made to and counted by."""

        __hash__ = object.__hash__

    def count(*arguments):
        made = finished(*arguments).view(Counted)
        alive.add(made)
        most[0] = max(most[0], len(alive))
        return made

    monkeypatch.setattr(preparation, "finished", count)
    out = tmp_path / "out.csv"
    assert call(predict, f"--workdir={run}", f"--input={tmp_path / 'list.csv'}", f"--out={out}", "--batch_size=16") == 0
    rows = read(out)
    assert len(rows) == 1200
    assert [row["path"] for row in rows[:2]] == ["000.png", "001.png"]
    assert len({row["probability_blob"] for row in rows}) == 2
    assert 16 <= most[0] <= 16 * 4 + 8, most


def test_what_breaks_off_leaves_no_file(run, test_split, tmp_path, monkeypatch):
    images, calls = save(test_split.images[:8], tmp_path / "images"), []
    before = sorted(tmp_path.rglob("*"))
    whole = inference.Ensemble.probabilities

    def broken(self, files):
        calls.append(len(files))
        if len(calls) == 2:
            raise config_lib.MachineError("the device is lost")
        return whole(self, files)

    argv = [f"--workdir={run}", f"--input={images}", f"--out={tmp_path / 'out.csv'}", "--batch_size=2"]
    monkeypatch.setattr(inference.Ensemble, "probabilities", broken)
    assert call(predict, *argv) == 1
    assert calls == [2, 2]
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    monkeypatch.setattr(guard.Signals, "check", lambda self: (_ for _ in ()).throw(config_lib.Stopped(15)))
    assert call(predict, *argv) == 75
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--input=nowhere"], "nowhere: no such file or folder"),
        (["--input="], "--input=: must be a file, a folder or a CSV"),
        (["--input={tmp}/empty"], "no image or volume in this folder"),
        (["--input={tmp}/list.csv"], "no column path"),
        (["--out={tmp}/none/out.csv"], "not a file in an existing folder"),
        (["--out={tmp}"], "not a file in an existing folder"),
        (["--explain=gradcam"], "--explain=gradcam: unknown; did you mean gradient"),
        (["--tta=turns"], "--tta=turns: unknown"),
        (["--batch_size=0"], "--batch_size=0: must be auto, or positive"),
        (["--batch_size=many"], "--batch_size=many: not a whole number"),
        (["--workdir={tmp}/empty"], "holds no run"),
        (["--workdir={tmp}/others"], "its classes is ('blob', 'dots'), that of"),
        (["--config.seeds=1"], "takes no overrides"),
        (["--explain=rollout", "--out={tmp}/full.csv"], "is not empty"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(run, tmp_path, capsys, argv, words):
    save(np.zeros((1, 28, 28, 1), np.uint8), tmp_path / "images")
    for name in ("empty", "full_heatmaps/old"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "list.csv").write_text("file\nimages/000.png\n")
    if "others" in argv[0]:
        shutil.copytree(run, tmp_path / "others")
        record = json.loads((tmp_path / "others/model.json").read_text())
        record["data"]["class_names"] = ["blob", "dots"]
        (tmp_path / "others/model.json").write_text(json.dumps(record))
    before = sorted(tmp_path.rglob("*"))
    usual = [f"--workdir={run}", f"--input={tmp_path}/images", f"--out={tmp_path}/out.csv"]
    assert call(predict, *usual, *(each.format(tmp=tmp_path) for each in argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert sorted(tmp_path.rglob("*")) == before


# --- external validation --------------------------------------------------------------------------------------------------------


def labelled(path, images, names):
    save(images, path)
    lines = [f"{index:03d}.png,{name}" for index, name in enumerate(names)]
    (path / "labels.csv").write_text("\n".join(["path,label", *lines]))
    return f"folder:{path}"


def test_the_same_images_from_a_folder_give_the_same_metrics(run, test_split, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = np.array(["blob", "specks"])[test_split.labels[:, 0]]
    dataset = labelled(tmp_path / "all", test_split.images, names)
    assert call(evaluate, f"--workdir={run}", f"--dataset={dataset}", f"--out={tmp_path / 'out.json'}") == 0
    assert "external validation: trained on phantom2d" in " ".join(capsys.readouterr().out.split())
    said, own = json.loads((tmp_path / "out.json").read_text()), folder.RunFolder(run).read_result()
    assert (said["dataset"], said["external"], said["trained_on"]) == (dataset, True, "phantom2d")
    assert said["test"].keys() == own["test"].keys()
    for name, values in own["test"].items():
        np.testing.assert_allclose(said["test"][name], values, rtol=1e-6)
    # A set without one of the classes: what its images are called counts, not which number the name would have there.
    ill = test_split.labels[:, 0] == 1
    dataset = labelled(tmp_path / "some", test_split.images[ill], names[ill])
    assert call(evaluate, f"--workdir={run}", f"--dataset={dataset}", f"--out={tmp_path / 'some.json'}") == 0
    stored = folder.RunFolder(run).read_predictions("test").probabilities[:, ill]
    np.testing.assert_allclose(json.loads((tmp_path / "some.json").read_text())["test"]["accuracy"], (stored[..., 1] > 0.5).mean(axis=1))


def test_a_set_of_another_task_or_classes_is_no_external_validation(run, tmp_path, capsys):
    images = np.zeros((2, 28, 28, 1), np.uint8)
    cases = [
        (labelled(tmp_path / "a", images, ["blob", "cyst"]), "its classes cyst are none of the run's, which are blob, specks"),
        ("bloodmnist", "its task is multi-class, that of the run is binary"),
        ("phantom3d", "its rank is 3, that of the run is 2"),
        ("pneumoniamnist", "its classes normal, pneumonia are none of the run's"),
        ("phantom4d", "is unknown"),
    ]
    for dataset, words in cases:
        assert call(evaluate, f"--workdir={run}", f"--dataset={dataset}", f"--out={tmp_path / 'out.json'}") == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_labels_of_a_named_set_are_those_of_the_runs_classes_whatever_their_order(test_split):
    planned = experiment.plan(config_lib.load(f"{QUICKSTART}:patch=14"))
    turned = dataclasses.replace(planned, description=dataclasses.replace(planned.description, class_names=("specks", "cyst", "blob")))
    found = external.load("phantom2d", turned, root="")
    np.testing.assert_array_equal(found.splits["test"].labels, 2 - 2 * test_split.labels)
    assert found.description.class_names == ("specks", "cyst", "blob")
