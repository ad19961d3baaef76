"""Tasks as they run: on this machine, with real processes; how points stand meanwhile; and what a task does with what others have."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import made_runs
import pytest

from launch import local, manifest, status, sweep, task
from vitmed import apart, cli, config
from vitmed.runs import folder, guard, heartbeat
from vitmed.study import points as study_points

ROOT = pathlib.Path(__file__).parent.parent
# Two points that train, as others' tests do, so that their programs are compiled; and one whose data are missing until a file is there.
CONFIG = """
import pathlib
from vitmed import config
MENDED = pathlib.Path(__file__).with_name("mended")
def get_config(arg=""):
    given = config.arguments(arg, dataset="phantom2d", patch=(14,), data="")
    cfg = config.load({quickstart!r})
    cfg.data.update(name="phantom2d")
    if given["data"] == "missing":
        cfg.data.update({{"verify": False}} if MENDED.exists() else {{"name": "breastmnist", "root": "/no/such/folder"}})
    cfg.model.update(variant="vit_micro", patch_size=given["patch"])
    cfg.train.update(epochs=2, batch_size=250)
    return cfg
def sweep():
    return [{{"dataset": "phantom2d", "patch": 14}}, {{"dataset": "phantom2d", "patch": 28}}, {{"patch": 28, "data": "missing"}}]
"""
GOOD, WITHOUT_DATA = ("phantom2d-patch14", "phantom2d-patch28"), "patch28-datamissing"


@pytest.fixture
def own(tmp_path):
    """A config file and an empty folder's path beside it."""
    file = tmp_path / "own.py"
    file.write_text(CONFIG.format(quickstart=f"{ROOT}/configs/quickstart.py"))
    return file, tmp_path / "root"


def command(own, *argv):
    return [sys.executable, "-m", "launch.sweep", f"--config={own[0]}", f"--workdir={own[1]}", "--to=local", *argv]


def call(main, *argv):
    return cli.run_cli(main, [str(argument) for argument in argv])


def test_a_sweep_on_this_machine_ends_in_a_report_and_its_failed_point_is_run_again_alone(own, capfd):
    file, root = own
    argv = [f"--config={file}", f"--workdir={root}", "--to=local", "--at_once=2"]
    assert call(sweep.main, *argv, "--pack=0") == 1
    errors = capfd.readouterr().err
    assert all((root / name / "result.json").exists() for name in GOOD)
    assert (root / WITHOUT_DATA / "failure.json").exists()
    number = json.loads((root / "manifest.json").read_text())["tasks"].index([WITHOUT_DATA])
    assert errors.splitlines()[-1].startswith(f"vitmed: task {number}: exit status 1; ")
    assert "/no/such/folder" in (root / f"launch/local/task{number}.log").read_text()
    assert "Traceback" not in errors
    assert (root / "report/index.html").exists()

    before = {path: path.stat().st_mtime_ns for name in GOOD for path in (root / name).rglob("*")}
    assert call(sweep.main, *argv) == 1
    errors = capfd.readouterr().err
    assert "nothing to submit: 2 of 3 points done, 1 failed" in errors
    assert f"{WITHOUT_DATA}: exit status 2: data.root='/no/such/folder'" in errors

    file.with_name("mended").touch()
    assert call(sweep.main, *argv, "--retry") == 0
    assert "tasks done: 1" in capfd.readouterr().out
    assert (root / WITHOUT_DATA / "result.json").exists()
    assert not (root / WITHOUT_DATA / "failure.json").exists()
    assert {path: path.stat().st_mtime_ns for name in GOOD for path in (root / name).rglob("*")} == before


@pytest.mark.parametrize(
    ("signum", "ended"),
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_the_tasks_and_what_they_have_done_is_kept(signum, ended, own, capfd):
    if signum == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("prctl is Linux's")
    root = own[1]
    argv = ["--at_once=2", "--points=dataset=phantom2d", "--pack=0", "--config.train.epochs=4000"]
    with subprocess.Popen(command(own, *argv), stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        deadline = time.monotonic() + 120
        while sum(bool(file.stat().st_size) for file in root.rglob("metrics.jsonl")) < len(GOOD):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        points = [int(re.match(r"process (\d+) ", (root / name / guard.LOCK_NAME).read_text()).group(1)) for name in GOOD]
        assert call(sweep.main, f"--workdir={root}", "--status") == 0
        process.send_signal(signum)
        try:
            process.communicate(timeout=120)
            while any(guard.holder(root / name) for name in GOOD):  # of a parent that was killed: a moment later
                assert time.monotonic() < deadline + 60
                time.sleep(0.05)
        finally:
            for point in points:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(point, signal.SIGKILL)
    assert process.returncode == ended
    said = capfd.readouterr().out
    assert said.count("running: process ") == 2
    assert "0 of 2 points done, 2 running" in said
    for number in (0, 1):
        assert "saved; run it again to go on" in (root / f"launch/local/task{number}.log").read_text()
    states = status.of_all(manifest.read(root / "manifest.json"), root)
    assert {(state.word, state.note.partition(",")[0]) for state in states.values()} == {("waiting", "begun")}
    assert not (root / "report").exists()


# --- how points stand -----------------------------------------------------------------------------------------------------------


def test_the_status_is_read_from_the_folders_alone(tmp_path, capsys, monkeypatch):
    names = ("done", "seeds", "running", "failed", "broken", "waiting")
    points = tuple(manifest.Point(name, f"dataset={name}", 100.0, 2.0) for name in names)
    manifest.write(manifest.Manifest(f"{ROOT}/configs/vit2d.py", {}, points, tuple((name,) for name in names)), tmp_path)
    made_runs.write(tmp_path / "done")
    made_runs.write(tmp_path / "seeds", failed=(1,))
    folder.RunFolder(tmp_path / "running").create({"seeds": 1})
    folder.RunFolder(tmp_path / "running").write_failure({"ended": "exit status 1", "said": "an earlier time"})
    folder.RunFolder(tmp_path / "failed").write_failure({"ended": "exit status 2", "said": "no\ndata"})
    folder.RunFolder(tmp_path / "broken").create({"seeds": 1})
    (tmp_path / "broken/result.json").write_text("{")
    monkeypatch.setenv("PATH", str(tmp_path))  # no launcher's command is there
    monkeypatch.setenv("COLUMNS", "200")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with guard.lock(tmp_path / "running"):
        assert call(sweep.main, f"--workdir={tmp_path}", "--status") == 0
    out = capsys.readouterr().out
    rows = {line.split("│")[2].strip(): line.split("│")[4].strip() for line in out.splitlines() if line.startswith("│")}
    assert rows["done"] == "done"
    assert rows["seeds"] == "done: failed seeds 1"
    assert rows["running"].startswith(f"running: process {os.getpid()} on ")
    assert rows["failed"] == "failed: exit status 2: no data"
    assert rows["broken"].startswith("failed:")
    assert "broken/result.jsonisbroken" in re.sub(r"[│\s]", "", out)  # however the table folds it
    assert rows["waiting"] == "waiting"
    # The two that are done took 10 s each and 2 s of compilation, and so will the two that are left.
    assert out.splitlines()[-1] == "2 of 6 points done, 1 running, 2 failed, 1 waiting; at most 24 s of one device's time left"
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != guard.LOCK_NAME}
    changed = {path for path in after if before.get(path) != after[path]}
    assert changed <= {tmp_path / "running"}  # where this test has made the lock


def test_a_status_without_a_sweep_is_one_line(tmp_path, capsys):
    assert call(sweep.main, f"--workdir={tmp_path / 'no'}", "--status") == 2
    assert "holds no sweep: there is no manifest.json in it" in capsys.readouterr().err


def test_who_holds_a_folder_is_told_by_its_heartbeat_where_there_are_no_locks(tmp_path, monkeypatch):
    (tmp_path / guard.LOCK_NAME).touch()
    (tmp_path / heartbeat.NAME).write_text(f"{heartbeat.signature()}\nword\n")

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")

    assert guard.holder(tmp_path) is None  # there are locks, and nobody has this one
    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert guard.holder(tmp_path).startswith(f"process {os.getpid()} on ")
    long_ago = time.time() - 2 * heartbeat.STALE_SECONDS
    os.utime(tmp_path / heartbeat.NAME, (long_ago, long_ago))
    assert guard.holder(tmp_path) is None
    assert guard.holder(tmp_path / "no such folder") is None


def test_who_asks_for_a_folders_holder_stands_in_nobodys_way(tmp_path):
    with guard.lock(tmp_path):
        pass
    with open(tmp_path / guard.LOCK_NAME) as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as one who asks does, for an instant
        assert guard.holder(tmp_path) is None  # several may ask
        letting_go = threading.Timer(guard.ASKING_SECONDS / 3, fcntl.flock, (file, fcntl.LOCK_UN))
        letting_go.start()
        with guard.lock(tmp_path):
            pass
        letting_go.join()


# --- a task ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(own):
    """The manifest of the three points in one task, and its folder."""
    file, root = own
    names = (*GOOD, WITHOUT_DATA)
    arguments = {point.name: point.argument for point in study_points.of_sweep(config.load_module(str(file)))}
    points = tuple(manifest.Point(name, arguments[name], 1.0, 1.0) for name in names)
    manifest.write(manifest.Manifest(str(file), {}, points, (names, ())), root)
    return root


def test_a_point_whose_argument_was_edited_is_not_trained_as_another(written, run_apart, capsys):
    file = written / "manifest.json"
    file.write_text(edited(file, GOOD[0]))
    assert run_task(written, 0) == 2
    assert f"point {GOOD[0]} is 'patch=3' in the manifest" in capsys.readouterr().err
    assert run_apart == []


def edited(file, name):
    """The manifest with another argument for a point."""
    said = json.loads(file.read_text())
    next(point for point in said["points"] if point["name"] == name)["argument"] = "patch=3"
    return json.dumps(said)


def run_task(root, number):
    return call(task.main, f"--manifest={root}/manifest.json", f"--workdir={root}", f"--task={number}")


@pytest.fixture
def run_apart(monkeypatch):
    """Runs no point, but keeps what would be run, and says that it ended with 1."""
    ran = []
    monkeypatch.setattr(apart, "run", lambda command, **_: (ran.append(command[-1].rpartition("/")[2]), (1, "broken"))[1])
    return ran


def test_a_task_runs_neither_what_has_failed_before_nor_what_others_hold(written, run_apart, capsys):
    held, failed, left = GOOD[0], GOOD[1], WITHOUT_DATA
    folder.RunFolder(written / failed).write_failure({"ended": "exit status 1", "said": None})
    (written / held).mkdir()
    with guard.lock(written / held):
        assert run_task(written, 0) == 1
    assert run_apart == [left]
    errors = capsys.readouterr().err
    assert f"{held}: {written / held} is in use by process {os.getpid()}" in errors
    assert "left to it" in errors
    assert f"{failed} has failed before and is left as it is; launch.sweep --retry runs it again" in errors
    assert not (written / held / "failure.json").exists()
    assert json.loads((written / left / "failure.json").read_text()) == {"ended": "exit status 1", "said": "broken"}


def test_a_folder_that_is_taken_while_the_point_begins_is_no_failure(written, monkeypatch, capsys):
    (written / GOOD[0]).mkdir()
    with contextlib.ExitStack() as stack:

        def run(command, **_):
            stack.enter_context(guard.lock(written / GOOD[0]))
            return 1, "in use"

        monkeypatch.setattr(apart, "run", run)
        point = manifest.read(written / "manifest.json")
        assert task.run(point, GOOD[:1], written) == 1
    assert "left to it" in capsys.readouterr().err
    assert not (written / GOOD[0] / "failure.json").exists()


def test_a_task_that_was_left_by_its_points_is_done(written, run_apart):
    assert run_task(written, 1) == 0
    assert run_apart == []


@pytest.mark.parametrize("number", ["2", "-1", "one", "", "٣"])
def test_a_task_that_is_not_there_is_one_line(number, written, capsys):
    assert run_task(written, number) == 2
    assert "must be from 0 to 1, or all" in capsys.readouterr().err


def test_a_task_without_a_manifest_is_one_line(tmp_path, capsys):
    assert run_task(tmp_path, 0) == 2
    assert f"--manifest={tmp_path}/manifest.json: no such file" in capsys.readouterr().err


# --- GPUs -----------------------------------------------------------------------------------------------------------------------


def test_each_gpu_has_one_task_at_a_time(tmp_path):
    script = f"echo $CUDA_VISIBLE_DEVICES begins >> {tmp_path}/said; sleep 0.3; echo $CUDA_VISIBLE_DEVICES ends >> {tmp_path}/said"
    commands = {number: ["sh", "-c", script] for number in range(5)}
    commands[3] = ["sh", "-c", "exit 7"]
    assert local.run(commands, ["3", "5"], tmp_path) == {"task 3": "exit status 7"}
    said = (tmp_path / "said").read_text().split()
    pairs = list(zip(said[::2], said[1::2], strict=True))
    for gpu in ("3", "5"):
        assert [word for name, word in pairs if name == gpu] == ["begins", "ends"] * 2
    assert pairs[1][1] == "begins"  # side by side


def test_gpus_are_those_that_this_process_may_use(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\necho '  MIG 1g'\necho 'GPU 1: NVIDIA H100'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert local.gpus() == ["4", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.gpus() == []


def test_more_tasks_at_once_than_gpus_are_refused(own, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    argv = [f"--config={own[0]}", f"--workdir={own[1]}", "--to=local"]
    assert call(sweep.main, *argv, "--at_once=3") == 2
    assert "--at_once=3: must be at most 2, the GPUs of this machine" in capsys.readouterr().err
    assert call(sweep.main, *argv, "--at_once=0") == 2
    assert "--at_once=0: must be at least 1" in capsys.readouterr().err
    assert not own[1].exists()
