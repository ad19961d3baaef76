"""The commands as users type them: what they leave on disk, what they say, and the exit status of every kind of mistake."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from vitmed import cli, evaluate, main, metrics
from vitmed.runs import folder, guard
from vitmed.study import operating

ROOT = pathlib.Path(__file__).parent.parent
QUICKSTART = f"{ROOT}/configs/quickstart.py"
SMALL = ["--config.model.variant=vit_micro", "--config.train.epochs=2", "--config.train.batch_size=250"]


def call(command, *argv: object) -> int:
    """Run a CLI in this process; its exit status."""
    return cli.run_cli(command.main, [str(argument) for argument in argv])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A finished small run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert call(main, f"--config={QUICKSTART}:patch=14", f"--workdir={workdir}", *SMALL) == 0
    return workdir


OURS = f"--xla_backend_extra_options={cli.SHARED_CALLS}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, OURS),
        ("--xla_dump_to=/tmp", f"--xla_dump_to=/tmp {OURS}"),
        ("--xla_backend_extra_options=other", f"--xla_backend_extra_options=other {OURS}"),
        (OURS, OURS),
        ("/home/me/flags", "/home/me/flags"),
    ],
    ids=["nothing", "others", "its own options", "the same", "a file"],
)
def test_a_command_adds_its_flag_to_the_users_own(monkeypatch, given, expected):
    monkeypatch.delenv("XLA_FLAGS") if given is None else monkeypatch.setenv("XLA_FLAGS", given)
    assert cli.run_cli(lambda argv: 3 if os.environ["XLA_FLAGS"] == expected else 4, []) == 3


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what the CPU's compiler does")
def test_what_a_program_calls_twice_is_compiled_as_one():
    once = jax.jit(lambda x: jnp.sin(x) * 2)
    text = jax.jit(lambda x: once(once(x))).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile().as_text()
    assert text.count(" fusion(") == 2  # else both calls would be one fusion


def test_a_run_leaves_what_the_contract_names(finished):
    names = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file() and "checkpoints" not in file.parts}
    files = {"config.json", "model.json", "metrics.jsonl", "calibration.json", "result.json"}
    files |= {f"predictions/{split}.npz" for split in ("val", "test")} | {f"weights/seed{seed}.safetensors" for seed in (0, 1)}
    assert names - {".lock"} == files
    result = json.loads((finished / "result.json").read_text())
    jsonschema.validate(result, json.loads((ROOT / "vitmed/runs/result.schema.json").read_text()))
    assert (result["dataset"], result["task"], result["image_size"], result["patch_size"]) == ("phantom2d", "binary", [28, 28], [14, 14])
    assert (result["seeds"], result["failed_seeds"], result["num_tokens"], result["pretrained"]) == ([0, 1], [], 5, None)
    stored = folder.RunFolder(finished).read_predictions("test")
    assert stored.labels.shape == (200, 1)
    assert stored.probabilities.shape == (2, 200, 2)
    assert stored.probabilities.dtype == np.float32
    rows = folder.RunFolder(finished).read_metrics()
    assert [row["epoch"] for row in rows] == [1, 2]
    for seed in range(2):
        again = metrics.compute("binary", stored.labels, stored.probabilities[seed]).values
        assert again == {name: result["test"][name][seed] for name in again}
    val = folder.RunFolder(finished).read_predictions("val")
    fitted = operating.fit("binary", val.labels, val.probabilities, seeds=[0, 1])
    assert operating.of_run(folder.RunFolder(finished), task="binary", seeds=[0, 1]) == fitted
    assert folder.RunFolder(finished).read_calibration() == fitted


def test_running_a_finished_run_again_prints_and_changes_nothing(finished, capsys):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    assert call(main, f"--config={QUICKSTART}:patch=14", f"--workdir={finished}", *SMALL, "--config.data.root=/tmp") == 0
    assert "balanced accuracy" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()} == before


def test_evaluate_gives_exactly_the_numbers_of_the_run(finished, tmp_path, capsys):
    before = sorted(finished.rglob("*"))
    assert call(evaluate, f"--workdir={finished}", f"--out={tmp_path / 'out.json'}") == 0
    out, result = json.loads((tmp_path / "out.json").read_text()), json.loads((finished / "result.json").read_text())
    assert out["test"] == result["test"]
    stored = folder.RunFolder(finished).read_predictions("test")
    for k, of_class in enumerate(out["per_class"]):
        assert (of_class["class"], of_class["num_images"]) == (k, int((stored.labels == k).sum()))
        for name in metrics.CLASS_METRICS:
            expected = [metrics.per_class("binary", stored.labels, one).values[name][k] for one in stored.probabilities]
            assert of_class[name] == expected
            known = [value for value in expected if value is not None]
            assert not known or of_class[f"{name}_interval"][0] <= np.mean(known) <= of_class[f"{name}_interval"][1]
    said = capsys.readouterr().out
    assert out["per_class"][1]["name"] in said
    assert "sensitivity" in said
    assert call(evaluate, f"--workdir={finished}", "--split=val", f"--out={tmp_path / 'val.json'}") == 0
    assert json.loads((tmp_path / "val.json").read_text())["val"] == result["val"]
    assert call(evaluate, f"--workdir={finished}", "--split=train") == 0
    assert "balanced_accuracy" in capsys.readouterr().out
    assert sorted(finished.rglob("*")) == before


def test_an_ensemble_averages_probabilities_seed_by_seed(finished, tmp_path):
    other = tmp_path / "other"
    assert call(main, f"--config={QUICKSTART}:patch=28", f"--workdir={other}", *SMALL) == 0
    assert call(evaluate, f"--workdir={finished}", f"--workdir={other}", f"--out={tmp_path / 'both.json'}") == 0
    both = json.loads((tmp_path / "both.json").read_text())["test"]
    one, two = (folder.RunFolder(path).read_predictions("test") for path in (finished, other))
    for seed in range(2):
        mean = (one.probabilities[seed].astype(np.float64) + two.probabilities[seed]) / 2
        assert both["accuracy"][seed] == (mean.argmax(1) == one.labels[:, 0]).mean()
        np.testing.assert_allclose(both["loss"][seed], -np.log(mean[np.arange(200), one.labels[:, 0]]).mean(), rtol=1e-9)


def test_an_ensemble_of_what_does_not_belong_together_is_refused(finished, tmp_path, capsys):
    def like_it(folder_name: str, section: str, **changes: object) -> pathlib.Path:
        """A copy of the run whose config says something else: what belongs together is seen before anything is restored."""
        copy = pathlib.Path(shutil.copytree(finished, tmp_path / folder_name))
        config = json.loads((copy / "config.json").read_text())
        (config[section] if section else config).update(changes)
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    volumes, seeds = like_it("volumes", "data", name="phantom3d"), like_it("seeds", "", seeds=[7])
    for other, words in ((volumes, "data set is phantom3d"), (seeds, "seeds is (7,)")):
        assert call(evaluate, f"--workdir={finished}", f"--workdir={other}") == 2
        assert words in capsys.readouterr().err


def refused(capsys, tmp_path, *argv: object, command=main) -> str:
    """The one line that a wrong call gives; nothing may have been written."""
    before = sorted(tmp_path.rglob("*"))
    assert call(command, *argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert sorted(tmp_path.rglob("*")) == before
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--config", "--help"]),
        (["--config=nothing.py"], ["nothing.py", "no such file"]),
        (["--config=configs/vit2d.py:dataset=brestmnist"], ["brestmnist", "breastmnist"]),
        (["--config=configs/vit2d.py:dataset=organmnist3d"], ["3D", "2D", "vit3d.py"]),
        (["--config=configs/vit3d.py:dataset=breastmnist"], ["3D", "2D", "vit2d.py"]),
        (["--config=configs/vit2d.py:patch=5"], ["5", "28", "1, 2, 4, 7, 14, 28"]),
        (["--config=configs/vit2d.py", "--config.train.epoch=3"], ["train.epoch", "train.epochs"]),
        (["--config=configs/vit2d.py", "--config.train.epochs=three"], ["train.epochs=three", "whole number"]),
        (["--config=configs/vit2d.py", "--confg=3"], ["--confg", "--config"]),
        (["--config=configs/vit2d.py:pretrained=", "--config.data.root=/no/such/folder"], ["/no/such/folder"]),
        (["--config=configs/quickstart.py", "--config.mesh.data=64"], ["mesh.data=64", "1"]),
        (["--config=configs/vit2d.py", "--sweep", "--config.model.pretrained=", "--config.train.epochs=0"], ["train.epochs=0"]),
        (["--config=configs/vit2d.py:pacth=7", "--sweep"], ["'pacth'", "patch"]),
        (["--config=configs/folds2d.py", "--sweep"], ["folder:", "names no folder"]),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(argv, words, capsys, tmp_path):
    line = refused(capsys, tmp_path, *argv, f"--workdir={tmp_path / 'run'}")
    assert all(word in line for word in words), line


def test_a_folder_of_another_run_is_refused_naming_what_differs(finished, capsys):
    line = refused(capsys, finished.parent, f"--config={QUICKSTART}:patch=7", f"--workdir={finished}", *SMALL, "--config.seeds=5")
    assert "model.patch_size is [14] there, [7] here" in line
    assert "seeds is [0, 1] there, [5] here" in line
    assert "another --workdir" in line


def test_a_file_where_the_folder_should_be_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "is a file" in refused(capsys, tmp_path, f"--config={QUICKSTART}", f"--workdir={workdir}")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("workdir", ["/proc/vitmed/run", "/sys/vitmed"])
def test_an_unwritable_folder_is_refused(workdir, capsys, tmp_path):
    line = refused(capsys, tmp_path, f"--config={QUICKSTART}", f"--workdir={workdir}", *SMALL)
    assert workdir in line


def test_an_empty_workdir_is_refused(capsys, tmp_path):
    for extra in ([], ["--sweep"]):
        assert "--workdir=" in refused(capsys, tmp_path, f"--config={QUICKSTART}", "--workdir=", *extra)


def test_a_folder_that_lost_its_config_is_refused(finished, capsys, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    line = refused(capsys, tmp_path, f"--config={QUICKSTART}:patch=7", f"--workdir={tmp_path / 'run'}", *SMALL)
    assert "there is no config.json" in line


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("cfg.seeds = 0", "seeds"),
        ("cfg.train.epochs = '5'", "train.epochs"),
        ("cfg.augment.zoom = 1", "augment.zoom"),
        ("del cfg.train['beta1']", "train.beta1"),
        ("cfg = None", "NoneType"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_a_config_file_with_a_fault_is_refused(body, words, capsys, tmp_path):
    file = tmp_path / "own.py"
    load = f"    cfg = config.load({QUICKSTART!r}); cfg.unlock(); cfg = type(cfg)(cfg.to_dict(), type_safe=False)\n"
    file.write_text(f"from vitmed import config\ndef get_config(arg=''):\n{load}    {body}\n    return cfg\n")
    assert words in refused(capsys, tmp_path, f"--config={file}", f"--workdir={tmp_path / 'run'}")


def test_evaluate_refuses_what_it_cannot_measure(finished, capsys, tmp_path):
    for argv, words in (
        ([f"--workdir={tmp_path}/nothing"], "holds no run"),
        ([f"--workdir={finished}", "--split=tset"], "did you mean test"),
        ([f"--workdir={finished}", f"--out={tmp_path}/no/such/out.json"], "--out="),
        ([f"--workdir={finished}", "--config.train.epochs=3"], "takes no overrides"),
        ([], "--workdir"),
    ):
        assert words in refused(capsys, tmp_path, *argv, command=evaluate)


def test_a_folder_in_use_is_refused_with_status_one(tmp_path, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with guard.lock(workdir):
        assert call(main, f"--config={QUICKSTART}:patch=14", f"--workdir={workdir}", *SMALL) == 1
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    assert not (workdir / "checkpoints").exists()


@pytest.mark.parametrize("command", ["main", "evaluate", "predict"])
def test_help_shows_own_flags_and_examples(command):
    done = subprocess.run([sys.executable, "-m", f"vitmed.{command}", "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "--workdir" in done.stdout
    assert f"python -m vitmed.{command} --" in done.stdout


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_the_state_and_the_same_command_goes_on(signum, status, tmp_path):
    workdir = tmp_path / "run"
    epochs = "--config.train.epochs=400"
    command = [sys.executable, "-m", "vitmed.main", f"--config={QUICKSTART}:patch=14", f"--workdir={workdir}", *SMALL, epochs]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        deadline = time.monotonic() + 120
        while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert "saved; run it again to go on" in errors
    assert not (workdir / "result.json").exists()
    before = folder.RunFolder(workdir).read_metrics()
    assert 0 < len(before) < 400
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        while len(folder.RunFolder(workdir).read_metrics()) <= len(before):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signum)
        process.communicate(timeout=120)
    rows = folder.RunFolder(workdir).read_metrics()
    assert rows[: len(before)] == before
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))


def test_a_seed_that_diverges_ends_in_status_one_with_its_name(tmp_path, capsys):
    workdir = tmp_path / "run"
    argv = [f"--config={QUICKSTART}:patch=14", f"--workdir={workdir}", *SMALL, "--config.train.learning_rate=1e15"]
    assert call(main, *argv) == 1
    errors = capsys.readouterr().err
    assert "seed 0: loss or gradient not finite at step" in errors
    assert "failed seeds 0, 1" in errors
    result = json.loads((workdir / "result.json").read_text())
    assert result["failed_seeds"] == [0, 1]
    assert result["test"]["balanced_accuracy"] == [None, None]
    assert call(main, *argv) == 1  # finished with named failures, also when asked again


@pytest.fixture
def two_points(tmp_path) -> str:
    """A config whose sweep has two points, one of which cannot be trained."""
    file = tmp_path / "two.py"
    file.write_text(
        "from vitmed import config\n"
        "def get_config(arg=''):\n"
        "    given = config.arguments(arg, dataset='phantom2d', patch=(14,), rate=1e-3)\n"
        f"    cfg = config.load({QUICKSTART!r})\n"
        "    cfg.model.update(variant='vit_micro', patch_size=given['patch'])\n"
        "    cfg.train.update(epochs=2, batch_size=250, learning_rate=given['rate'])\n"
        "    return cfg\n"
        "def sweep():\n"
        "    return [{'dataset': 'phantom2d', 'patch': 14, 'rate': 1e15}, {'dataset': 'phantom2d', 'patch': 28, 'rate': 1e-3}]\n"
    )
    return str(file)


def test_a_sweep_runs_every_point_and_names_the_failed(two_points, tmp_path, capfd):
    root = tmp_path / "sweep"
    assert call(main, f"--config={two_points}", "--sweep", f"--workdir={root}") == 1
    out, errors = capfd.readouterr()
    assert "phantom2d (synthetic)" in out
    assert f"vitmed: phantom2d-patch14-rate{1e15}: failed seeds 0, 1\nvitmed: 1 of 2 points failed, or have failed seeds\n" in errors
    results = {path.name: json.loads((path / "result.json").read_text()) for path in root.iterdir()}
    assert results["phantom2d-patch28-rate0.001"]["failed_seeds"] == []
    assert results[f"phantom2d-patch14-rate{1e15}"]["failed_seeds"] == [0, 1]
    written = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert call(main, f"--config={two_points}", "--sweep", f"--workdir={root}") == 1
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == written


def test_a_sweep_refuses_to_override_what_it_varies(tmp_path, capsys):
    line = refused(capsys, tmp_path, f"--config={QUICKSTART}", "--sweep", f"--workdir={tmp_path / 's'}", "--config.model.patch_size=14")
    assert "model.patch_size: the sweep sets it" in line


def test_a_signal_stops_a_sweep_and_its_point(two_points, tmp_path):
    root = tmp_path / "sweep"
    command = [sys.executable, "-m", "vitmed.main", f"--config={two_points}", "--sweep", f"--workdir={root}", "--config.train.epochs=4000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        deadline = time.monotonic() + 120
        while not any(file.stat().st_size for file in root.rglob("metrics.jsonl")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "saved; run it again to go on" in errors
    assert [path.name for path in root.iterdir()] == [f"phantom2d-patch14-rate{1e15}"]
    with guard.lock(next(root.iterdir())):  # the point's process is gone as well
        pass


def test_torch_is_never_imported(tmp_path):
    code = (
        "import sys; from vitmed import cli, main; "
        f"cli.run_cli(main.main, ['--config={QUICKSTART}:patch=28', '--workdir={tmp_path}/run', *{SMALL!r}]); "
        "sys.exit(', '.join({'torch', 'tensorflow', 'tensorboardX', 'wandb', 'mlflow', 'matplotlib'} & sys.modules.keys()) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert (tmp_path / "run" / "result.json").exists()
