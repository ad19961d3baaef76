"""A sweep on a real SLURM of one node, started for the test: tasks are stopped in the middle, and every result is there once at the end."""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import private_slurm
import pytest

from launch import slurm
from vitmed import cli

ROOT = pathlib.Path(__file__).parent.parent
# Long enough to be stopped in the middle, also where one task compiles seconds longer than the other.
SMALL = ["--config.model.variant=vit_micro", "--config.train.epochs=150", "--config.train.batch_size=250"]
POINTS = ("phantom2d-patch14", "phantom2d-patch28")
LONGEST_SECONDS = 240

pytestmark = pytest.mark.skipif(private_slurm.why_not() is not None, reason=f"no private SLURM: {private_slurm.why_not()}")


@pytest.fixture(scope="module")
def cluster():
    """The environment of a private SLURM; in a short path, since a socket's must be."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="slurm"))
    try:
        with private_slurm.running(folder) as environment:
            yield environment
    finally:
        shutil.rmtree(folder)


def sweep(environment, workdir, *argv):
    command = [sys.executable, "-m", "launch.sweep", f"--config={ROOT}/configs/quickstart.py", f"--workdir={workdir}", "--to=slurm", *argv]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False)


def ask(environment, *command):
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Watch:
    """Looks at the queue until something is so, and keeps every state that a job was seen in."""

    def __init__(self, environment, logs):
        self.environment, self.logs, self.began, self.seen = environment, logs, time.monotonic(), {}

    def until(self, condition, what):
        while not condition(self.look()):
            if time.monotonic() > self.began + LONGEST_SECONDS:
                logs = "\n".join(f"{file.name}: {file.read_text()}" for file in self.logs.glob("*.log"))
                pytest.fail(f"{what} takes longer than {LONGEST_SECONDS} s; seen: {self.seen}\n{logs}")
            time.sleep(0.2)

    def look(self):
        """Job -> state, of all that wait or run."""
        now = dict(line.split() for line in ask(self.environment, "squeue", "--noheader", "--array", "--format=%i %T").splitlines())
        for job, state in now.items():
            states = self.seen.setdefault(job, [])
            if not states or states[-1][1] != state:
                states.append((f"{time.monotonic() - self.began:.1f} s", state))
        return now


def epochs(workdir, point):
    file = workdir / point / "metrics.jsonl"
    return [json.loads(line)["epoch"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.slow
def test_a_sweep_whose_tasks_are_stopped_in_the_middle_gives_every_result_once(cluster, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    flags = [*SMALL, "--points=dataset=phantom2d,patch=14|28", "--gres=none", "--pack=0", "--limit=2", "--time=1:00:00"]
    began = time.monotonic()
    submitted = sweep(cluster, workdir, *flags)
    assert submitted.returncode == 0, submitted.stderr
    array, collect = re.match(r"job (\d+) runs the tasks 0-1, job (\d+) makes ", submitted.stdout).groups()
    watch = Watch(cluster, workdir / "launch/slurm")
    watch.until(lambda _: all(epochs(workdir, point) for point in POINTS), "the first epoch")

    stopped = {point: epochs(workdir, point) for point in POINTS}
    ask(cluster, "scontrol", "requeue", f"{array}_0")  # as an administrator would, or a job of higher priority
    ask(cluster, "scancel", "--batch", "--signal=TERM", f"{array}_1")  # what SLURM does two minutes before the time limit
    held = set()

    def hold_what_waits(now):
        for job in (f"{array}_0", f"{array}_1"):
            if now.get(job) == "PENDING" and job not in held:
                ask(cluster, "scontrol", "hold", job)
                held.add(job)
        return len(held) == 2

    watch.until(hold_what_waits, "the queue")
    assert not any((workdir / point / "result.json").exists() for point in POINTS), "they were to be stopped before the end"

    waiting = sweep(cluster, workdir, *flags)  # the same command again, while all of it is queued
    assert waiting.returncode == 0
    assert "2 of 2 tasks are in the queue already" in waiting.stderr
    for job in held:
        ask(cluster, "scontrol", "release", job)

    watch.until(lambda now: collect not in now, "the report")
    seconds = time.monotonic() - began
    jobs = {job: ask(cluster, "scontrol", "show", "job", job, "--oneliner") for job in (f"{array}_0", f"{array}_1", collect)}
    states = {job: re.search(r"JobState=(\w+) .*Restarts=(\d+) .*ExitCode=(\S+)", said).groups() for job, said in jobs.items()}
    assert states == {f"{array}_0": ("COMPLETED", "1", "0:0"), f"{array}_1": ("COMPLETED", "1", "0:0"), collect: ("COMPLETED", "0", "0:0")}
    for task, point in enumerate(POINTS):
        assert epochs(workdir, point)[: len(stopped[point])] == stopped[point]
        assert epochs(workdir, point) == list(range(1, 151))
        log = (workdir / f"launch/slurm/{array}_{task}.log").read_text()  # appended to by the second start
        assert log.count(f"vitmed: {point}, 1 of 1") == 2
        assert "saved; run it again to go on" in log
        assert not (workdir / point / "failure.json").exists()
    assert sorted(file.parent.name for file in workdir.rglob("result.json")) == sorted(POINTS)
    with open(workdir / "report/results.csv", newline="") as file:
        rows = sorted((row["patch"], row["seed"]) for row in csv.DictReader(file) if row["kind"] != "ensemble")
    assert rows == [("14", "0"), ("14", "1"), ("28", "0"), ("28", "1")]
    with capsys.disabled():
        print(f"\nSLURM sweep: {seconds:.1f} s from the command to the report; {states}; {watch.seen}")
    again = sweep(cluster, workdir, *flags)
    assert again.returncode == 0
    assert "nothing to submit: 2 of 2 points done" in again.stderr


# Stands for the Python that runs a task: begins, ends with 75 at SIGTERM.
STANDIN = """#!/bin/bash
trap 'echo saved; exit 75' TERM
echo begun
for i in {1..600}; do sleep 0.1; done
"""


def test_a_cancelled_task_does_not_requeue_itself(cluster, tmp_path):
    standin, logs = tmp_path / "python", tmp_path / "launch/slurm"
    standin.write_text(STANDIN)
    standin.chmod(0o755)
    logs.mkdir(parents=True)
    parser = cli.Parser()
    slurm.add_flags(parser)
    options = parser.parse_args(["--gres=none"])
    options.workdir, options.manifest, options.tasks = str(tmp_path), f"{tmp_path}/manifest.json", (0,)
    script = slurm.render(None, options)[slurm.ARRAY].replace(sys.executable, str(standin))
    (tmp_path / "array.sh").write_text(script)
    job = ask(cluster, "sbatch", "--parsable", str(tmp_path / "array.sh")).strip()
    log, watch = logs / f"{job}_0.log", Watch(cluster, logs)
    watch.until(lambda _: log.exists() and "begun" in log.read_text(), "the start")
    ask(cluster, "scancel", job)
    watch.until(lambda now: not now, "the end of all jobs")
    assert log.read_text().count("begun") == 1
    assert "saved" in log.read_text()
    assert "JobState=CANCELLED" in ask(cluster, "scontrol", "show", "job", f"{job}_0")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--partition=gpu", "--gres=none"], ["--partition=gpu: there is no such partition; choose one of short, long"]),
        (["--gres=gpu:1"], ["sbatch refuses the job", "Invalid generic resource", "--gres"]),
        (["--gres=none", "--cpus=64"], ["sbatch refuses the job"]),
    ],
)
def test_what_the_cluster_does_not_have_is_one_line_and_nothing_is_submitted(flags, words, cluster, tmp_path):
    before = ask(cluster, "squeue", "--noheader")
    done = sweep(cluster, tmp_path / "sweep", "--points=dataset=phantom2d,patch=28", *SMALL, *flags)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "sweep").exists()
    assert ask(cluster, "squeue", "--noheader") == before


def test_a_cluster_that_does_not_answer_is_trouble_of_the_machine(cluster, tmp_path):
    conf = tmp_path / "slurm.conf"
    text = pathlib.Path(cluster["SLURM_CONF"]).read_text()
    conf.write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=1\nSlurmctldTimeout=1\nMessageTimeout=2", text))
    done = sweep(os.environ | {"SLURM_CONF": str(conf)}, tmp_path / "sweep", *SMALL, "--gres=none")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("vitmed: sinfo --noheader")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_the_tasks_of_a_step_make_one_run(cluster, tmp_path):
    workdir = tmp_path / "run"
    small = ["--config.model.variant=vit_micro", "--config.train.epochs=1", "--config.train.batch_size=250", "--config.mesh.data=2"]
    run = [sys.executable, "-m", "vitmed.main", f"--config={ROOT}/configs/quickstart.py:patch=28", f"--workdir={workdir}", *small]
    command = ["srun", "--ntasks=2", *run]
    done = subprocess.run(command, env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((workdir / "result.json").read_text())["device"].endswith(" x 2")
    assert done.stdout.count("balanced accuracy") == 1  # process 0 speaks for both
