"""A disk that fills up, a folder that becomes read-only or goes away under a run: one line, status 1, and nothing lost that was saved."""

import os
import shutil
import subprocess

import pytest
from killing import Moment

from vitmed.runs import checkpoint

MEGABYTES = 32  # some times what a small run needs


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own, or a skip."""
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "vitmed-test", tmp_path], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a file system needs root" if not mounted else f"no file system can be mounted: {mounted.stderr.decode()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def fail(runs, workdir, moment, said):
    """A run that meets the harm ends with status 1 and one line."""
    status, log = runs.killer.run(workdir, moment)
    assert status == 1, log
    last = log.splitlines()[-1]
    assert last.startswith("vitmed: "), log
    assert said in last
    assert str(workdir) in last


def require_intact(workdir):
    with checkpoint.Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() is not None


LATER = [
    Moment("write", 60, "orbax-checkpoint-tmp"),  # some write of some later checkpoint
    Moment("write", 1, "open metrics.jsonl"),
    Moment("place", 9),
    Moment("write", 0, "open result.json"),
]


@pytest.mark.parametrize(
    ("harm", "moments"),
    [pytest.param("fill", LATER, id="fill"), pytest.param("read-only", LATER[::2], id="read-only", marks=pytest.mark.slow)],
)
def test_a_disk_that_fills_up_or_becomes_read_only(runs2d, disk, harm, moments):
    workdir = disk / "run"
    for moment in moments:
        fail(
            runs2d,
            workdir,
            Moment(moment.kind, moment.number, moment.what, harm),
            {"fill": "No space left", "read-only": "Read-only"}[harm],
        )
        require_intact(workdir)
        if harm == "fill":
            (disk / "filler").unlink()
        else:
            subprocess.run(["umount", workdir], check=True)
    assert runs2d.killer.live(workdir)
    runs2d.require_whole(workdir)


@pytest.mark.slow  # what a full disk does above is nearly the same
def test_files_that_may_not_grow(runs2d, tmp_path):
    """What a quota does, where no file system can be mounted."""
    workdir = tmp_path / "run"
    fail(runs2d, workdir, Moment("write", 1, "open metrics.jsonl", "limit"), "File too large")
    require_intact(workdir)
    assert runs2d.killer.live(workdir)
    runs2d.require_whole(workdir)


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=pytest.mark.slow) for moment in LATER[1:3]], ids=["while writing", "while computing"]
)
def test_a_folder_that_goes_away(runs2d, tmp_path, moment):
    workdir = tmp_path / "run"
    fail(runs2d, workdir, Moment(moment.kind, moment.number, moment.what, "remove"), "No such file")
    shutil.rmtree(workdir, ignore_errors=True)
    assert runs2d.killer.live(workdir)
    runs2d.require_whole(workdir)
