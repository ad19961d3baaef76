"""A sweep as users call it: what it runs, skips, records and says; with real processes, of which the main sweep is shared by the tests."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from vitmed import cli, main, sweep
from vitmed.runs import folder, guard, machine

ROOT = pathlib.Path(__file__).parent.parent
CPU = machine.Device("cpu", "cpu (made up)", 1, 16 * 10**9)
# Two points that train, one whose data are missing and one that is killed as by the kernel, unless a file says that it is mended.
CONFIG = """
import os, pathlib, signal
from vitmed import cli, config
MENDED = pathlib.Path(__file__).with_name("mended")
def get_config(arg=""):
    given = config.arguments(arg, dataset="phantom2d", patch=(14,), fault="")
    cfg = config.load({quickstart!r})
    cfg.data.update(name=given["dataset"])
    cfg.model.update(variant="vit_micro", patch_size=given["patch"])
    cfg.train.update(epochs=2, batch_size=250)
    if given["fault"] == "data" and not MENDED.exists():
        cfg.data.root = "/no/such/folder"
    if given["fault"] == "killed" and cli.LAST_WORDS in os.environ and not MENDED.exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return cfg
def sweep():
    return [
        {{"dataset": "phantom2d", "patch": 14, "fault": "killed"}},
        {{"dataset": "breastmnist", "patch": 28, "fault": "data"}},
        {{"dataset": "phantom2d", "patch": 14, "fault": "none"}},
    ]
"""
KILLED, WITHOUT_DATA, GOOD = "phantom2d-patch14-faultkilled", "breastmnist-patch28-faultdata", "phantom2d-patch14-faultnone"


def call(*argv: object) -> int:
    return cli.run_cli(main.main, [str(argument) for argument in argv])


def command(own, *argv):
    return [sys.executable, "-m", "vitmed.main", f"--config={own}", *argv]


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    """Ask no process for the device."""
    monkeypatch.setattr(machine, "device_apart", lambda: CPU)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The config and the folder of the sweep after its first run, with that run's exit status and what it said."""
    own = tmp_path_factory.mktemp("sweep") / "own.py"
    own.write_text(CONFIG.format(quickstart=f"{ROOT}/configs/quickstart.py"))
    root = own.with_name("root")
    done = subprocess.run(command(own, "--sweep", f"--workdir={root}"), capture_output=True, text=True, cwd=ROOT, check=False)
    return own, root, done


def test_points_that_fail_stop_no_other_and_are_reported_at_the_end(swept):
    _, root, done = swept
    assert done.returncode == 1, done.stderr
    assert (root / GOOD / "result.json").exists()
    last = done.stderr.splitlines()[-3:]
    assert last[0] == f"vitmed: {KILLED}: killed by SIGKILL, perhaps for want of memory"
    assert last[1].startswith(f"vitmed: {WITHOUT_DATA}: exit status 2: data.root='/no/such/folder'")
    assert last[2] == "vitmed: 2 of 3 points failed, or have failed seeds"
    assert "phantom2d (synthetic)" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_failure_is_recorded_in_the_points_folder(swept):
    _, root, _ = swept
    record = folder.RunFolder(root / WITHOUT_DATA).read_failure()
    assert record["ended"] == "exit status 2"
    assert "/no/such/folder" in record["said"]
    assert folder.RunFolder(root / KILLED).read_failure()["said"] is None
    assert folder.RunFolder(root / GOOD).read_failure() is None
    assert sorted(path.name for path in root.iterdir()) == sorted([KILLED, WITHOUT_DATA, GOOD])


def test_progress_is_told_after_every_point(swept):
    lines = [line for line in swept[2].stderr.splitlines() if "points done" in line]
    assert lines == [
        "vitmed: 0 of 3 points done, 1 failed",  # nothing is known of the time yet
        "vitmed: 0 of 3 points done, 2 failed",
        "vitmed: 1 of 3 points done, 2 failed",
    ]


def test_the_list_tells_cost_and_state_and_runs_nothing(swept, capsys):
    own, root, _ = swept
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert call(f"--config={own}", "--list", f"--workdir={root}") == 0
    out = capsys.readouterr().out
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("│") and line.split()[1] != "│"}
    assert "finished" in rows[GOOD]
    assert "failed: killed by" in rows[KILLED]
    assert " 5 " in rows[GOOD]
    assert " GB" in rows[GOOD]
    assert "cpu (made up) has 16.0 GB" in out
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert call(f"--config={own}", "--list", "--points=fault=killed|data") == 0
    out = capsys.readouterr().out
    assert KILLED in out
    assert GOOD not in out
    assert "failed:" not in out  # without --workdir nothing is known of states


def test_a_rerun_skips_the_finished_and_tries_the_failed_again(swept, capfd):
    """Last of those that share the sweep: it changes it."""
    own, root, _ = swept
    own.with_name("mended").touch()
    finished = {path: path.stat().st_mtime_ns for path in (root / GOOD).rglob("*")}
    try:
        assert call(f"--config={own}", "--sweep", "--points=dataset=phantom2d", f"--workdir={root}") == 0
    finally:
        own.with_name("mended").unlink()
    errors = capfd.readouterr().err
    assert errors.startswith("vitmed: 1 of 2 points done, about ")
    assert " s left\n" in errors
    assert errors.endswith("vitmed: 2 of 2 points done\n")
    assert f"vitmed: {KILLED}, 1 of 2\n" in errors
    assert {path: path.stat().st_mtime_ns for path in (root / GOOD).rglob("*")} == finished
    assert (root / KILLED / "result.json").exists()
    assert not (root / KILLED / "failure.json").exists()
    assert (root / WITHOUT_DATA / "failure.json").exists()  # it was not asked for


def refused(capsys, root, *argv) -> str:
    assert call(*argv, f"--workdir={root}") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert not root.exists()
    return lines[0]


WHOLE = ["--config.train.remat=none", "--config.train.micro_batch_size=8"]  # the whole batch at once, and all of it kept


def test_what_cannot_fit_is_refused_before_anything_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("VITMED_WEIGHTS", "/no/such/folder")  # the refusal comes before weights are looked for
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [f"--config={ROOT}/configs/vit3d.py", *WHOLE]
    line = refused(capsys, tmp_path / "root", *arguments, "--sweep", "--points=dataset=organmnist3d|vesselmnist3d")
    words = ["organmnist3d-patch1: at least 26.6 GB", "vesselmnist3d-patch1: at least 26.7 GB", "cpu (made up) has 16.0 GB"]
    words += ["--points='dataset=organmnist3d|vesselmnist3d,patch=28|14|7|4|2' leaves out what cannot fit"]
    assert all(word in line for word in words), line
    assert call(*arguments, "--list") == 0
    assert capsys.readouterr().out.count("cannot fit") == 6
    assert call(f"--config={ROOT}/configs/vit3d.py", "--list") == 0  # an image at a time
    assert "cannot fit" not in capsys.readouterr().out


def test_a_single_run_that_cannot_fit_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "device", lambda: CPU)
    config = f"--config={ROOT}/configs/vit3d.py:dataset=phantom3d,patch=1,pretrained="
    line = refused(capsys, tmp_path / "run", config, *WHOLE)
    assert "phantom3d patch 1: at least 26.6 GB of memory are needed" in line


def test_what_points_are_named_after_cannot_be_overridden_though_all_have_it(capsys, tmp_path):
    line = refused(capsys, tmp_path / "root", f"--config={ROOT}/configs/tokens2d.py", "--list", "--config.data.name=bloodmnist")
    assert "data.name: the sweep sets it" in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--points=patch=7"], ["--points=patch=7", "--sweep or --list"]),
        (["--sweep", "--points=patch=5"], ["patch=5", "choose one of 28, 14, 7, 4"]),
        (["--sweep", "--points=pacth=7"], ["pacth", "did you mean patch"]),
        (["--list", "--config.model.patch_size=7"], ["model.patch_size: the sweep sets it"]),
        (["--sweep", "--points=patch=7", "--config.model.patch_size=7"], ["model.patch_size: the sweep sets it"]),
        (["--list", "--config.train.epochs=0"], ["train.epochs=0"]),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(argv, words, capsys, tmp_path):
    line = refused(capsys, tmp_path / "root", f"--config={ROOT}/configs/quickstart.py", *argv)
    assert all(word in line for word in words), line


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert sweep._record(folder.RunFolder(tmp_path / "file"), 1, "no space") == "exit status 1: no space"
    assert "cannot be made" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_point_ends_with_a_sweep_that_is_killed(tmp_path, swept):
    own, root = swept[0], tmp_path / "root"
    argv = ["--sweep", "--points=fault=none", f"--workdir={root}", "--config.train.epochs=4000"]
    with subprocess.Popen(command(own, *argv), stderr=subprocess.PIPE, cwd=ROOT) as process:
        deadline = time.monotonic() + 120
        while not any(file.stat().st_size for file in root.rglob("metrics.jsonl")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        point = int(re.match(r"process (\d+) ", (root / GOOD / guard.LOCK_NAME).read_text()).group(1))
        process.send_signal(signal.SIGKILL)
        try:
            _, errors = process.communicate(timeout=60)  # until the point, which shares its stderr, has ended
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(point, signal.SIGKILL)
    assert b"saved; run it again to go on" in errors
    with guard.lock(root / GOOD):
        pass
