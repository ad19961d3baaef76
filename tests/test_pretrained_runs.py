"""Whole runs from pretrained weights: what they start from, what they record and give out, and what they refuse before writing."""

import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from vitmed import cli, config, evaluate, experiment, main, models
from vitmed import start as starts
from vitmed.models import build, exported, weights
from vitmed.runs import folder
from vitmed.training import loop

ROOT = pathlib.Path(__file__).parent.parent
VIT2D, VIT3D = f"{ROOT}/configs/vit2d.py", f"{ROOT}/configs/vit3d.py"
SMALL = ["--config.train.epochs=1", "--config.train.batch_size=250", "--config.seeds=0,1"]
FACTS = {"image_size": [28, 28], "num_heads": 3, "pooling": "cls", "mean": [0.5], "std": [0.5], "seed": 0, "val_loss": 0.5}
MEAN, STD = (0.2, 0.1, 0.3), (0.3, 0.2, 0.1)


def tensors_of_a_micro_model(*, variant="vit_micro", seed=0):
    """Under timm's names: patch 4, image 28, three classes."""
    architecture = build.variant(variant)
    module = build.model(architecture, patch_size=(4, 4), num_classes=3)
    params = build.initialise(module, jax.random.key(seed), image_size=(28, 28), in_channels=3)
    sizes = {"architecture": architecture, "image_size": (28, 28), "patch_size": (4, 4), "mean": (0.5,), "std": (0.5,)}
    return safetensors.numpy.load(exported.pack(params, **sizes, seed=0, val_loss=0.0))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Weights as somebody else would give them out, with a sidecar that tells their preprocessing."""
    path = tmp_path_factory.mktemp("weights") / "micro.safetensors"
    safetensors.numpy.save_file(tensors_of_a_micro_model(), path)
    path.with_suffix(".json").write_text(json.dumps({"mean": MEAN, "std": STD}))
    return path


def call(command, *argv: object) -> int:
    return cli.run_cli(command.main, [str(argument) for argument in argv])


def arguments(file, *, patch="14", variant="vit_micro", spec=VIT2D, dataset="phantom2d"):
    return [f"--config={spec}:dataset={dataset},patch={patch},variant={variant},pretrained={file}", *SMALL]


@pytest.fixture(scope="module")
def finished(file, tmp_path_factory):
    """A finished run from those weights."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert call(main, *arguments(file), f"--workdir={workdir}") == 0
    return workdir


def predicted(workdir, tmp_path):
    assert call(evaluate, f"--workdir={workdir}", f"--out={tmp_path / 'out.json'}") == 0
    return json.loads((tmp_path / "out.json").read_text())["test"]


def test_a_run_records_what_it_started_from(finished, file):
    result = json.loads((finished / "result.json").read_text())
    assert result["pretrained"] == str(file)
    assert result["normalisation"] == {"mean": list(MEAN), "std": list(STD)}
    model = json.loads((finished / "model.json").read_text())
    assert model["weights"]["file"] == "micro.safetensors"
    assert model["weights"]["fresh"] == ["head.bias", "head.weight"]
    assert model["weights"]["resized"] == ["patch_embed 4x4 -> 14x14", "pos_embed 7x7 -> 2x2"]
    tensors = safetensors.numpy.load_file(finished / "weights" / "seed1.safetensors")
    assert result["num_params"] == result["num_trainable_params"] == sum(tensor.size for tensor in tensors.values())


def test_the_weights_a_run_gives_out_predict_what_it_predicted(finished):
    stored = folder.RunFolder(finished).read_predictions("test")
    planned = experiment.plan(config.load(f"{VIT2D}:dataset=phantom2d,patch=14,variant=vit_micro,pretrained="))
    images = np.repeat(planned.load().splits["test"].images / np.float32(255), 3, axis=-1)
    for index in range(2):
        path = str(finished / "weights" / f"seed{index}.safetensors")
        module, params = models.from_pretrained(path, image_size=(28, 28), patch_size=(14, 14))
        mean, std = models.preprocessing(path)
        logits = jax.jit(module.apply)({"params": params}, (images - np.float32(mean)) / np.float32(std))
        np.testing.assert_allclose(jax.nn.softmax(logits), stored.probabilities[index], atol=2e-5)


def test_a_run_is_taken_by_its_folder_at_another_patch_size_and_rank(finished, tmp_path, capsys):
    best = int(np.argmin(json.loads((finished / "result.json").read_text())["val"]["loss"]))
    assert weights.describe(str(finished)).path.name == f"seed{best}.safetensors"
    volumes = tmp_path / "volumes"
    spec = arguments(finished, patch="14x7x7", spec=VIT3D, dataset="phantom3d")
    assert call(main, *spec, f"--workdir={volumes}") == 0
    said = capsys.readouterr().err
    assert "resized: patch_embed 14x14 -> 7x7, pos_embed 2x2 -> 4x4; inflated: patch_embed (average), pos_embed (copy)" in said
    assert json.loads((volumes / "result.json").read_text())["normalisation"]["mean"] == list(MEAN)
    # And back to images: what was inflated is flattened again.
    module, params = models.from_pretrained(str(volumes), image_size=(28, 28), patch_size=(7, 7))
    assert module.apply({"params": params}, np.zeros((1, 28, 28, 3), np.float32)).shape == (1, 2)
    described = weights.describe(str(volumes))
    assert (described.kernel_size, described.grid) == ((14, 7, 7), (2, 4, 4))


def test_a_run_goes_on_and_is_evaluated_without_the_weights_it_started_from(file, finished, tmp_path, monkeypatch):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    copy.with_suffix(".json").write_text(file.with_suffix(".json").read_text())
    workdir = tmp_path / "run"
    more = [*arguments(copy), f"--workdir={workdir}", "--config.train.checkpoint_seconds=0"]
    monkeypatch.setattr(loop.outcome, "conclude", lambda *given, **named: (_ for _ in ()).throw(config.Stopped(15)))
    assert call(main, *more) == 75
    monkeypatch.undo()
    copy.unlink()
    assert call(main, *more) == 0
    assert predicted(workdir, tmp_path) == json.loads((workdir / "result.json").read_text())["test"]
    assert (workdir / "weights/seed0.safetensors").read_bytes() == (finished / "weights/seed0.safetensors").read_bytes()


def test_a_run_that_died_before_its_first_checkpoint_starts_from_the_weights_again(file, finished, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "advance", lambda *given, **named: (_ for _ in ()).throw(config.Stopped(15)))
        assert call(main, *arguments(file), f"--workdir={workdir}") == 75
    assert (workdir / "model.json").exists()
    assert not list((workdir / "checkpoints").glob("[0-9]*"))
    assert call(main, *arguments(file), f"--workdir={workdir}") == 0
    again, before = (safetensors.numpy.load_file(run / "weights/seed1.safetensors") for run in (workdir, finished))
    for name in before:
        np.testing.assert_array_equal(again[name], before[name])


def test_every_seed_starts_from_the_weights(file):
    planned = experiment.plan(config.load(f"{VIT2D}:dataset=phantom2d,patch=14,variant=vit_micro,pretrained={file}", {"seeds": "3,4"}))
    start = starts.of(planned, begun=False).trained
    from vitmed.training import programs

    recipe = experiment.recipe(planned, steps_per_epoch=1)
    state, best = programs.create(recipe, start)
    for tree in (state.params, best.params):
        jax.tree.map(lambda leaf, one: np.testing.assert_array_equal(leaf, np.stack([one, one])), tree, start)
    assert not np.any(state.params["head"]["kernel"])


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (exec, (f"open({self.target!r}, 'w')",))


def bad_weights(kind, folder_of_it):
    """A file of weights with one fault."""
    tensors = tensors_of_a_micro_model(variant="vit_mini" if kind == "variant" else "vit_micro")
    path = folder_of_it / "bad.safetensors"
    if kind == "nan":
        tensors["blocks.1.mlp.fc1.weight"][3, 4] = np.nan
    if kind == "rank":
        tensors["blocks.1.mlp.fc1.weight"] = tensors["blocks.1.mlp.fc1.weight"][None]
    if kind == "resnet":
        tensors = {"conv1.weight": np.ones((4, 3, 7, 7), np.float32), "fc.weight": np.ones((2, 4), np.float32)}
    safetensors.numpy.save_file(tensors, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    if kind == "pickle":
        import zipfile

        path = folder_of_it / "bad.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Evil(str(folder_of_it / "executed"))))
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", ["bad.safetensors"]),
        ("pickle", ["bad.pth", "exec"]),
        ("resnet", ["lacks patch_embed.proj.weight", "conv1.weight"]),
        ("rank", ["blocks.1.mlp.fc1.weight", "shape"]),
        ("nan", ["blocks.1.mlp.fc1.weight holds NaN"]),
        ("variant", ["width 64 and depth 4", "width 48 and depth 2", "take variant=vit_mini"]),
        ("missing file", ["missing.safetensors", "no such file"]),
        ("missing name", ["timm/vit_tiny_patch99"]),
    ],
)
def test_bad_weights_are_one_line_and_nothing_is_written(kind, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VITMED_WEIGHTS", str(tmp_path))
    given = {"missing file": f"{tmp_path}/missing.safetensors", "missing name": "timm/vit_tiny_patch99"}.get(kind)
    given = given or bad_weights(kind, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert call(main, *arguments(given), f"--workdir={tmp_path / 'run'}") == 2
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if "mean and std unknown" not in line]  # a made-up file's name tells nothing
    assert len(told) == 1, lines
    assert all(word in told[0] for word in words), told
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_is_a_file_of_vitmed_weights(file, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_vit.safetensors").write_bytes(file.read_bytes())
    monkeypatch.setenv("VITMED_WEIGHTS", str(tmp_path))
    assert call(main, *arguments("me/my_vit"), f"--workdir={tmp_path / 'run'}") == 0
    assert "mean and std unknown, 0.5 taken" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/result.json").read_text())["pretrained"] == "me/my_vit"


def test_gray_input_takes_the_mean_of_the_colours(file):
    overrides = {"model.in_channels": "1"}
    planned = experiment.plan(config.load(f"{VIT2D}:dataset=phantom2d,patch=14,variant=vit_micro,pretrained={file}", overrides))
    assert planned.network.mean == pytest.approx((0.2,))
    assert planned.network.std == pytest.approx((0.2,))


def test_the_defaults_are_the_variants_augreg_weights():
    for name, word in (("vit_ti", "tiny"), ("vit_s", "small"), ("vit_b", "base"), ("vit_l", "large")):
        for spec in (VIT2D, VIT3D):
            there = config.load(f"{spec}:variant={name}").model.pretrained
            assert there == f"timm/vit_{word}_patch16_224.augreg_in21k_ft_in1k"
            assert config.load(f"{spec}:variant={name},pretrained=").model.pretrained == ""
    assert config.load(f"{VIT2D}:variant=vit_micro").model.pretrained == ""


def test_a_broken_model_json_is_said(finished, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for text in ("{", "{}", (copy / "model.json").read_text().replace('"width": 48', '"width": "48"')):
        (copy / "model.json").write_text(text)
        assert call(evaluate, f"--workdir={copy}") == 2
        assert "model.json" in capsys.readouterr().err


def test_no_torch_is_imported_by_reading_weights(file):
    code = (
        f"import sys; from vitmed import models; models.from_pretrained({str(file)!r}, image_size=(28, 28), patch_size=(7, 7), num_heads=3)"
    )
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("left", "says"),
    [("result.json", "no folder of a finished run"), ("weights", "all its seeds failed")],
)
def test_a_run_that_gives_out_nothing_is_no_weights(left, says, finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / left).unlink() if left == "result.json" else shutil.rmtree(copy / left)
    assert call(main, *arguments(copy), f"--workdir={tmp_path / 'run'}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "run").exists()


def test_without_a_checkpoint_the_weights_are_not_looked_for(file, finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "checkpoints")
    settings = json.loads((copy / "config.json").read_text())
    settings["model"]["pretrained"] = str(tmp_path / "gone.safetensors")
    (copy / "config.json").write_text(json.dumps(settings))
    assert call(evaluate, f"--workdir={copy}") == 2
    assert capsys.readouterr().err == f"vitmed: {copy}: no checkpoint; train it first with vitmed.main\n"


@pytest.mark.parametrize("changed", [{"std": [0.0]}, {"val_loss": float("nan")}, {"pooling": "best"}])
def test_what_a_run_cannot_have_said_is_refused(changed, tmp_path):
    packed = safetensors.numpy.save(tensors_of_a_micro_model(), {"vitmed": json.dumps(FACTS | changed)})
    (tmp_path / "odd.safetensors").write_bytes(packed)
    with pytest.raises(config.InputError, match="metadata are broken"):
        weights.describe(str(tmp_path / "odd.safetensors"))
