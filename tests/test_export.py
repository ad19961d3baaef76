"""Networks given away: programs and weights that say what the run said, in the words of the card that lies beside them."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import made_runs
import numpy as np
import pytest

from vitmed import cli, export, main, metrics
from vitmed import config as config_lib
from vitmed.data import sources
from vitmed.models import attention, build, exported, inputs, snippets, stablehlo
from vitmed.runs import files, folder
from vitmed.study import card, collection, statistics

ROOT = pathlib.Path(__file__).parent.parent
QUICKSTART = f"{ROOT}/configs/quickstart.py"
SMALL = ["--config.model.variant=vit_micro", "--config.train.epochs=2", "--config.train.batch_size=250"]
PEER = ROOT / ".peer" / "bin" / "python"


def call(command, *argv: object) -> int:
    """Run a CLI in this process; its exit status."""
    return cli.run_cli(command.main, [str(argument) for argument in argv])


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> pathlib.Path:
    """A finished run of two seeds on images, as small as it gets."""
    workdir = tmp_path_factory.mktemp("images") / "run"
    assert call(main, f"--config={QUICKSTART}:patch=7", f"--workdir={workdir}", *SMALL) == 0
    return workdir


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> pathlib.Path:
    """A finished run on volumes that it resizes and inverts, in one channel."""
    workdir = tmp_path_factory.mktemp("volumes") / "run"
    fields = ["--config.seeds=3", "--config.data.resize=14", "--config.data.invert=true", "--config.model.in_channels=1"]
    assert call(main, f"--config={QUICKSTART}:dataset=phantom3d,patch=7", f"--workdir={workdir}", *SMALL, *fields) == 0
    return workdir


@pytest.fixture
def copied(images, tmp_path):
    """A copy of the run on images, to be damaged."""
    return pathlib.Path(shutil.copytree(images, tmp_path / "copy"))


def code_of(out: pathlib.Path) -> str:
    """The Python that a card shows."""
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize(
    ("which", "name", "seed"), [pytest.param("images", "phantom2d", 1, marks=pytest.mark.slow), ("volumes", "phantom3d", 3)]
)
def test_a_program_says_what_the_run_said_at_any_batch_size(which, name, seed, request, tmp_path, capsys):
    run = request.getfixturevalue(which)
    assert call(export, f"--workdir={run}", "--format=stablehlo", f"--out={tmp_path / 'out'}") == 0
    assert "differs from the run's predictions by at most" in capsys.readouterr().out
    program = jax.export.deserialize(bytearray((tmp_path / "out" / f"seed{seed}.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    stored = sources.load(name, size=28).splits["test"].images
    predictions = folder.RunFolder(run).read_predictions("test")
    expected = predictions.probabilities[predictions.seeds.tolist().index(seed)]
    found = [np.asarray(program.call(part)) for part in (stored[:1], stored[1:])]
    assert {one.dtype for one in found} == {np.dtype("float32")}
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-6)


def test_the_card_loads_a_program_with_jax_and_numpy_alone(volumes, tmp_path):
    assert call(export, f"--workdir={volumes}", "--format=stablehlo", f"--out={tmp_path / 'out'}") == 0
    stored = sources.load("phantom3d", size=28).splits["test"].images[:3]
    np.save(tmp_path / "images.npy", stored)
    code = code_of(tmp_path / "out") + (
        "import sys\n"
        f"np.save({str(tmp_path / 'found.npy')!r}, probabilities(np.load({str(tmp_path / 'images.npy')!r})))\n"
        "assert not {'vitmed', 'flax', 'torch', 'safetensors'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", check=True, capture_output=True)
    expected = folder.RunFolder(volumes).read_predictions("test").probabilities[0, :3]
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-6)


def test_weights_are_the_runs_own(images, tmp_path):
    assert call(export, f"--workdir={images}", "--format=safetensors", f"--out={tmp_path / 'new' / 'out'}") == 0
    out = tmp_path / "new" / "out"
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "seed0.safetensors", "seed1.safetensors"]
    for seed in (0, 1):
        assert (out / f"seed{seed}.safetensors").read_bytes() == folder.RunFolder(images).weights(seed).read_bytes()


def test_the_card_loads_weights_of_volumes_with_vitmed(volumes, tmp_path, monkeypatch):
    assert call(export, f"--workdir={volumes}", "--format=safetensors", f"--out={tmp_path / 'out'}", "--seed=3") == 0
    monkeypatch.chdir(tmp_path / "out")
    space = {}
    exec(code_of(tmp_path / "out"), space)
    found = space["probabilities"](sources.load("phantom3d", size=28).splits["test"].images[:3])
    expected = folder.RunFolder(volumes).read_predictions("test").probabilities[0, :3]
    np.testing.assert_allclose(found, expected, atol=1e-6)


# --- forms --------------------------------------------------------------------------------------------------------------------------

PLAIN = build.VARIANTS["vit_micro"]
FORMS = {
    "plain": {},
    "mean": {"pooling": "mean", "final_norm": False, "fc_norm": True},
    "registers": {"num_registers": 4, "layer_scale": True, "prefix_positions": False},
    "swiglu": {"swiglu": True, "mlp_width": 100},
    "map": {"pooling": "map", "class_token": False},
    "distilled": {"pooling": "distilled", "num_registers": 1},
}


def form_of(name, *, image=28, patch=7, kernel=None, dtype="float32", **fields):
    """A form of network, with random parameters and what it says of images: (form, file of weights, function of uint8 images)."""
    form = snippets.Form(
        architecture=dataclasses.replace(PLAIN, **FORMS[name]),
        image_size=(image, image),
        patch_size=(patch, patch),
        kernel_size=(kernel or patch,) * 2,
        **{"stored": (28, 28, 1), "in_channels": 3, "num_classes": 3, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
        | {"multi_label": False, "inverted": False}
        | fields,
    )
    sizes = {"patch_size": form.patch_size, "kernel_size": form.kernel_size}
    attend = stablehlo.attend((image // patch) ** 2)
    module = build.model(form.architecture, **sizes, num_classes=3, dtype=dtype, attention=attend)
    init = functools.partial(build.initialise, module, image_size=form.image_size, in_channels=form.in_channels)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), jax.eval_shape(init, jax.random.key(0)))
    preprocess = {"in_channels": form.in_channels, "mean": form.mean, "std": form.std, "image_size": form.image_size}
    function = stablehlo.program(
        module,
        params,
        prepare=functools.partial(inputs.prepare, **preprocess),
        probabilities=jax.nn.sigmoid if form.multi_label else jax.nn.softmax,
        inverted=form.inverted,
    )
    facts = {"image_size": form.image_size, "mean": form.mean, "std": form.std, "seed": 0, "val_loss": 1.0}
    return form, exported.pack(params, architecture=form.architecture, **sizes, **facts), function


def pixels(count, *shape):
    return np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("registers", {}), ("map", {}), ("distilled", {}), ("plain", {"kernel": 8, "patch": 4}), ("mean", {"patch": 1})],
    ids=["registers", "map", "distilled", "overlapping kernels", "many tokens"],
)
def test_every_form_is_exported_for_any_batch(name, fields):
    form, _, function = form_of(name, **fields)
    program = stablehlo.unpack(stablehlo.pack(function, image_size=(28, 28), num_channels=1))
    stored = pixels(3, *form.stored)
    found = np.concatenate([np.asarray(program(part)) for part in np.split(stored, [1])])
    np.testing.assert_allclose(found, function(stored), atol=1e-6)
    assert np.ptp(found, axis=0).max() > 1e-3


def test_a_program_of_bfloat16_is_float32_outside():
    form, _, function = form_of("plain", dtype="bfloat16")
    program = stablehlo.unpack(stablehlo.pack(function, image_size=(28, 28), num_channels=1))
    found = program(pixels(2, *form.stored))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, function(pixels(2, *form.stored)), atol=1e-2)


def test_many_tokens_are_attended_in_blocks_and_say_the_same():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 600, 3, 8))
    blocks = stablehlo.attend(600)
    assert blocks is not attention.plain
    np.testing.assert_allclose(blocks(q, k, v), attention.plain(q, k, v), atol=1e-5)


def test_what_does_not_go_into_a_file_is_refused():
    stablehlo.require_size(300_000_000)
    with pytest.raises(config_lib.InputError, match="take safetensors"):
        stablehlo.require_size(1_136_000_000)


CHECK = """
import pathlib, sys
import numpy as np
import torch

library = torch.library.Library("torchvision", "FRAGMENT" if torch.cuda.is_available() else "DEF")
if not torch.cuda.is_available():  # torchvision, which timm imports, asks for two operators that it has beside a CUDA torch alone
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

for case in sorted(pathlib.Path(".").glob("*/snippet.py")):
    space = {}
    exec(case.read_text().replace('"weights.safetensors"', repr(str(case.with_name("weights.safetensors")))), space)
    found = space["probabilities"](np.load(case.with_name("images.npy")))
    difference = np.abs(found - np.load(case.with_name("expected.npy"))).max()
    print("agrees to", difference)
    assert difference < 1e-4, case
"""


@pytest.mark.skipif(not PEER.exists(), reason="no .peer: an environment with torch, timm and safetensors, as .peer/bin/python")
def test_timm_loads_what_the_card_says_and_agrees(images, tmp_path):
    assert call(export, f"--workdir={images}", "--format=safetensors", f"--out={tmp_path / 'out'}", "--seed=0") == 0
    cases = {name: form_of(name) for name in FORMS if name != "plain"}
    cases["resized_inverted"] = form_of("plain", image=42, inverted=True, stored=(28, 28, 3))
    cases["smaller_multi_label"] = form_of("plain", image=14, in_channels=1, mean=(0.5,), std=(0.2,), multi_label=True)
    for name, (form, weights, function) in cases.items():
        case, stored = tmp_path / "cases" / name, pixels(4, *form.stored)
        case.mkdir(parents=True)
        (case / "weights.safetensors").write_bytes(weights)
        (case / "snippet.py").write_text(snippets.weights(form, "weights.safetensors"))
        np.save(case / "images.npy", stored)
        np.save(case / "expected.npy", function(stored))
    case = tmp_path / "cases" / "run"
    case.mkdir()
    (case / "weights.safetensors").write_bytes((tmp_path / "out" / "seed0.safetensors").read_bytes())
    (case / "snippet.py").write_text(code_of(tmp_path / "out").replace("seed0.safetensors", "weights.safetensors"))
    np.save(case / "images.npy", sources.load("phantom2d", size=28).splits["test"].images)
    np.save(case / "expected.npy", folder.RunFolder(images).read_predictions("test").probabilities[0])
    done = subprocess.run([PEER, "-c", CHECK], cwd=tmp_path / "cases", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("agrees to") == len(cases) + 1


# --- what is refused, and what fails ------------------------------------------------------------------------------------------------


def refused(capsys, tmp_path, *argv: object) -> str:
    """The one line that a wrong call gives; nothing may have been written."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert call(export, *argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--format": "onnx"}, ["--format=onnx", "stablehlo, safetensors"]),
        ({"--format": "stablehl"}, ["did you mean stablehlo"]),
        ({"--seed": "7"}, ["--seed=7", "is none of the run's", "0, 1"]),
        ({"--seed": "one"}, ["--seed=one", "whole number"]),
        ({"--workdir": "/no/such/run"}, ["/no/such/run", "holds no run"]),
        ({"--workdir": ""}, ["--workdir="]),
        ({"--out": ""}, ["--out="]),
        ({"--out": "/proc/vitmed/out"}, ["/proc/vitmed"]),
        ({"--data_root": "/no/such/data"}, []),  # phantoms are generated: no file is looked for
        ({"--config.train.epochs": "3"}, ["takes no overrides"]),
        ({"--sed": "1"}, ["--sed", "--seed"]),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(changes, words, images, capsys, tmp_path):
    flags = {"--workdir": images, "--format": "safetensors", "--out": tmp_path / "out"} | changes
    argv = [f"{name}={value}" for name, value in flags.items()]
    if not words:
        assert call(export, *argv) == 0
        return
    line = refused(capsys, tmp_path, *argv)
    assert all(word in line for word in words), line


def test_a_folder_that_exists_is_refused_unless_it_is_empty(images, capsys, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    argv = [f"--workdir={images}", "--format=safetensors"]
    assert "not empty" in refused(capsys, tmp_path, *argv, f"--out={tmp_path / 'full'}")
    assert "is a file" in refused(capsys, tmp_path, *argv, f"--out={tmp_path / 'file'}")
    (tmp_path / "empty").mkdir()
    assert call(export, *argv, f"--out={tmp_path / 'empty'}") == 0
    assert (tmp_path / "empty" / "README.md").exists()


def test_what_is_no_whole_finished_run_is_refused(copied, capsys, tmp_path):
    run, out = folder.RunFolder(copied), tmp_path / "out"
    for kind in export.FORMATS:
        argv = [f"--workdir={copied}", f"--format={kind}", f"--out={out}"]
        one, two = run.weights(0).read_bytes(), run.weights(1).read_bytes()
        run.weights(1).write_bytes(one)  # whole, but of the other seed
        assert "gives other probabilities than predictions/test.npz" in refused(capsys, tmp_path, *argv)
        run.weights(1).write_bytes(two[: len(two) // 2])
        assert "seed1.safetensors" in refused(capsys, tmp_path, *argv)
        run.weights(1).unlink()
        assert "seed1.safetensors is missing" in refused(capsys, tmp_path, *argv)
        run.weights(1).write_bytes(two)
    result = run.result.read_text()
    run.result.write_text(result.replace('"data_md5": null', '"data_md5": "0123"'))
    assert "trained on other data" in refused(capsys, tmp_path, *argv)
    run.result.unlink()
    assert "not finished" in refused(capsys, tmp_path, *argv)


def test_a_failed_seed_is_left_out_and_said(copied, capsys, tmp_path):
    run = folder.RunFolder(copied)
    run.result.write_text(json.dumps(json.loads(run.result.read_text()) | {"failed_seeds": [1]}))
    run.weights(1).unlink()
    argv = [f"--workdir={copied}", "--format=safetensors"]
    assert "--seed=1: has failed; choose one of 0" in refused(capsys, tmp_path, *argv, f"--out={tmp_path / 'a'}", "--seed=1")
    assert call(export, *argv, f"--out={tmp_path / 'a'}") == 1
    assert "failed seeds 1 are left out" in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["README.md", "seed0.safetensors"]
    assert call(export, *argv, f"--out={tmp_path / 'b'}", "--seed=0") == 0


def test_a_full_disk_leaves_nothing_behind(images, tmp_path, monkeypatch, capsys):
    write = files.write_whole

    def full(path, data, **kwargs):
        if pathlib.Path(path).name == "README.md":
            raise config_lib.MachineError(f"{path} could not be written: No space left on device")
        write(path, data, **kwargs)

    monkeypatch.setattr(files, "write_whole", full)
    assert call(export, f"--workdir={images}", "--format=safetensors", f"--out={tmp_path / 'out'}") == 1
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_torch_is_imported(images, tmp_path):
    code = (
        "import sys; from vitmed import cli, export\n"
        f"status = cli.run_cli(export.main, ['--workdir={images}', '--format=stablehlo', '--out={tmp_path / 'out'}', '--seed=0'])\n"
        "assert status == 0 and 'torch' not in sys.modules and 'jax' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_help_shows_flags_and_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        export.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--data_root" in said
    assert "python -m vitmed.export --workdir=" in said


# --- the card -----------------------------------------------------------------------------------------------------------------------


def about_of(name, config, **changes):
    description = sources.describe(name, 28)
    fields = {
        "source": export.data_source(description),
        "licence": description.licence,
        "synthetic": description.synthetic,
        "class_names": description.class_names,
        "num_examples": description.num_examples,
        "stored": (*description.image_size, description.num_channels),
        "config": config,
        "kind": "",
        "files": {"seed0.stablehlo": 0},
        "agreement": {0: "agrees"},
        "loading": "",
        "version": "1",
    }
    return card.About(**fields | changes)


def test_the_card_says_data_licence_recipe_and_intervals(tmp_path):
    labels = made_runs.labels_of("multi-class", num_images=90)
    made_runs.write(tmp_path / "run", dataset="dermamnist", task="multi-class", labels=labels, skill=2.0)
    run = collection.read(tmp_path / "run")
    text = card.render(run, about_of("dermamnist", run.config))
    for said in ("**Not for clinical use.**", "**Non-commercial.**", "CC BY-NC 4.0", "https://medmnist.com", "mean of 3 seeds"):
        assert said in text
    assert "| patch size | 7 × 7 (17 tokens) |" in text
    assert "| `train.learning_rate` | 0.0001 |" in text
    draws = statistics.draw("multi-class", run.labels, num_seeds=3)
    values = statistics.distribution("multi-class", run.labels, run.probabilities, draws)["auc"]
    mean = np.mean([metrics.compute("multi-class", run.labels, one).values["auc"] for one in run.probabilities])
    low, high = np.percentile(values, [2.5, 97.5])
    assert rf"{mean:.3f} \[{low:.3f}, {high:.3f}\]" in text
    assert "Synthetic" not in text


def test_the_card_of_one_seed_says_so_and_phantoms_are_synthetic(images, tmp_path):
    assert call(export, f"--workdir={images}", "--format=safetensors", f"--out={tmp_path / 'out'}", "--seed=1") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| seed 1 |" in text
    assert "mean of" not in text
    assert "**Synthetic data.**" in text
    assert "Non-commercial" not in text


def test_values_in_the_card_are_escaped_and_paths_cut_off(tmp_path):
    labels = made_runs.labels_of("binary", num_images=40)
    made_runs.write(tmp_path / "run", labels=labels, seeds=(0,))
    run = collection.read(tmp_path / "run")
    config = run.config | {"model.pretrained": "/home/someone/secret/w.safetensors"}
    text = card.render(run, about_of("breastmnist", config, class_names=("a|b\n# c", "<img src=x> [d](e) *f*"), licence=""))
    assert r"0: a\|b \# c, 1: \<img src=x\> \[d\](e) \*f\*" in text
    assert "someone" not in text
    assert r"w.safetensors" in text
    assert "not stated" in text


def test_an_undefined_metric_is_said_to_be_undefined(tmp_path):
    labels = np.zeros((30, 1), np.int64)
    made_runs.write(tmp_path / "run", labels=labels, seeds=(0, 1))
    run = collection.read(tmp_path / "run")
    assert "| undefined |" in card.render(run, about_of("breastmnist", run.config))
