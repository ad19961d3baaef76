"""The engine of SLURM: an array job with an index for each task, which requeues itself when its time is up, and a job that collects.

A task gets SIGTERM two minutes before the time limit (or when the node is wanted for others), saves its state, ends with 75 and is put
into the queue again, to go on from there. One that was cancelled stays cancelled: the script asks SLURM before it requeues itself.
"""

import argparse
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence

from launch import launchers
from launch import manifest as manifest_lib
from vitmed import cli
from vitmed import config as config_lib

INSTALL = "run this on a login node of the cluster, or install SLURM's commands (Debian: apt-get install slurm-client)"
LEAST_MINUTES = 10  # of a time limit: in less a task would be stopped before it has compiled, again and again
ARRAY, COLLECT = "array.sh", "collect.sh"
TIME = r"\d+(:\d+(:\d+)?)?|\d+-\d+(:\d+(:\d+)?)?"  # sbatch --time
# What is allowed in a flag that goes into an #SBATCH line, and words for it.
FORMS = {
    "partition": (r"[\w.,-]+", "a partition's name"),
    "account": (r"[\w.-]+", "an account's name"),
    "time": (TIME, "minutes, HH:MM:SS or D-HH:MM:SS"),
    "mem": (r"\d+[KMGT]?", "a number of megabytes, or such as 32G"),
    "cpus": (r"[1-9]\d*", "a number of cores"),
    "gres": (r"[\w.:=,-]+", "such as gpu:1, gpu:a100:1 or none"),
    "limit": (r"[1-9]\d*", "a number of tasks"),
}
OPTIONS = {"partition": "partition", "account": "account", "time": "time", "mem": "mem", "cpus": "cpus-per-task"}
SCRIPT = """#!/bin/bash
{directives}
# Tasks of a sweep; launch/slurm.py writes this file. SIGTERM comes to this shell alone, which passes it on and waits.
unset "${{!SLURM_STEP_@}}"  # of a step from which this was submitted
stopped=
child=
trap 'stopped=1; interrupted=1; if [ -n "$child" ]; then kill -TERM "$child"; fi' TERM
{{ {setup}; }} || {{ echo "the command of --setup has failed" >&2; exit 1; }}
{task} &
child=$!
if [ -n "$stopped" ]; then kill -TERM "$child"; fi
interrupted=1
while [ -n "$interrupted" ]; do
    interrupted=
    wait "$child"
    status=$?
done
if [ -n "$stopped" ] && [ "$status" -eq 143 ]; then status=75; fi  # it came before the task could listen
# 75: stopped, its state is saved. A job that was cancelled, or requeued by others, is not running any more by now.
# Named by array and index: the plain number of one of them stands for all.
job="${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
for _ in 1 2 3 4 5; do # a busy controller may not answer at once
    [ "$status" -eq 75 ] || break
    state=$(squeue --noheader --jobs="$job" --format=%T) || {{ sleep 5; continue; }}
    if [ "$state" != RUNNING ] || scontrol requeue "$job"; then break; fi
    sleep 5
done
exit "$status"
"""


def add_flags(parser: cli.Parser) -> None:
    """Flags of sbatch, by its names where it has them."""
    group = parser.add_argument_group("slurm")
    group.add_argument("--partition", metavar="NAME", help="the partition (default: the cluster's)")
    group.add_argument("--account", metavar="NAME", help="the account that pays")
    group.add_argument("--time", metavar="D-HH:MM:SS", help="time limit of a task; at its end the task goes into the queue again")
    group.add_argument("--mem", metavar="32G", help="memory of a task")
    group.add_argument("--cpus", metavar="N", help="cores of a task")
    group.add_argument("--gres", default="gpu:1", metavar="GRES", help="a task's device; none: no GPU (default: gpu:1)")
    group.add_argument("--limit", metavar="N", help="how many tasks run at the same time at most")
    group.add_argument("--setup", default="", metavar="COMMAND", help="a line of shell to run before, such as 'module load cuda'")


def render(manifest: manifest_lib.Manifest, options: argparse.Namespace) -> dict[str, str]:
    """The two scripts."""
    for flag, (form, allowed) in FORMS.items():
        value = getattr(options, flag)
        config_lib.require(value is None or re.fullmatch(form, value) is not None, f"--{flag}", value, allowed)
    if options.time is not None:
        enough = minutes(options.time) == 0 or minutes(options.time) >= LEAST_MINUTES
        config_lib.require(
            enough, "--time", options.time, f"at least {LEAST_MINUTES} minutes: two are kept for saving the state; 0 for no limit"
        )
    config_lib.require("\n" not in options.setup, "--setup", options.setup, "one line; join commands by &&")
    for name, path in (("--workdir", options.workdir), ("the checkout's folder", os.getcwd())):
        config_lib.require(
            not set('%\\"\n') & set(path), name, path, "a path without %, \\, quotes and line ends, which sbatch reads otherwise"
        )
    task = manifest_lib.task_command(sys.executable, manifest=options.manifest, workdir=options.workdir, task="$N")
    words = [*map(shlex.quote, task[:-1]), '--task="$SLURM_ARRAY_TASK_ID"']
    report = shlex.join(manifest_lib.report_command(sys.executable, workdir=options.workdir))
    setup = options.setup or ":"
    return {
        ARRAY: SCRIPT.format(directives=_directives(_array(options)), setup=setup, task=" ".join(words)),
        COLLECT: f"#!/bin/bash\n{_directives(_collect(options))}\n{{ {setup}; }} || exit 1\nexec {report}\n",
    }


def _shared(options: argparse.Namespace, logs: str) -> dict[str, str | None]:
    """What sbatch is told of both jobs."""
    given = {name: getattr(options, flag) for flag, name in OPTIONS.items() if getattr(options, flag) is not None}
    return {"chdir": os.getcwd(), "open-mode": "append", "output": f"{options.workdir}/launch/slurm/{logs}.log", "ntasks": "1", **given}


def _array(options: argparse.Namespace) -> dict[str, str | None]:
    limit = f"%{options.limit}" if options.limit else ""
    named = {"job-name": job_name(options.workdir), "array": f"{indices(options.tasks)}{limit}", **_shared(options, "%A_%a")}
    return named | ({} if options.gres == "none" else {"gres": options.gres}) | {"signal": "B:TERM@120", "requeue": None}


def _collect(options: argparse.Namespace) -> dict[str, str | None]:
    return {"job-name": f"{job_name(options.workdir)}-report", **_shared(options, "%j")}


def minutes(time: str) -> float:
    """A time limit as sbatch reads it, in minutes: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    from_hours = dash or len(numbers) == 3
    hours, mins, seconds = [*([] if from_hours else [0]), *numbers, 0, 0][:3]
    return (int(days or 0) * 24 + hours) * 60 + mins + seconds / 60


def _directives(options: dict[str, str | None]) -> str:
    """The lines that sbatch reads."""
    return "\n".join(f"#SBATCH --{name}" + ("" if value is None else f'="{value}"') for name, value in options.items())


def indices(tasks: Sequence[int]) -> str:
    """Ascending numbers as sbatch --array takes them: 0-3,5."""
    spans: list[list[int]] = []
    for number in tasks:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def job_name(workdir: str) -> str:
    """The array's name in the queue: of this sweep and no other."""
    return f"{launchers.sweep_name(workdir)}-{launchers.digest(os.path.realpath(workdir))[:8]}"


# --- what the cluster says ------------------------------------------------------------------------------------------------------


def require(options: argparse.Namespace) -> None:
    """InputError where SLURM is not installed, has no such partition or refuses the jobs; MachineError where it does not answer."""
    for program in ("sbatch", "squeue", "sinfo"):
        launchers.require_command(program, engine="slurm", install=INSTALL)
    listed = launchers.ask(["sinfo", "--noheader", "--format=%P"]).split()
    there = [name.removesuffix("*") for name in listed]
    if options.partition is None and not any(name.endswith("*") for name in listed):
        raise config_lib.InputError(f"--partition: the cluster has no default one; choose one of {', '.join(there)}")
    for name in options.partition.split(",") if options.partition else ():
        if name not in there:
            raise config_lib.InputError(f"--partition={name}: there is no such partition; choose one of {', '.join(there)}")
    for directives in (_array(options), _collect(options)):
        script = f"#!/bin/bash\n{_directives(directives)}\n"
        tested = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
        if tested.returncode:
            said = tested.stderr.strip().removeprefix("sbatch: error: ")
            raise config_lib.InputError(f"--to=slurm: sbatch refuses the job: {said}; change --gres, --partition or what it names")


def queued(options: argparse.Namespace) -> frozenset[int]:
    """The array indices of this sweep that wait or run."""
    asked = ["squeue", "--noheader", "--array", f"--name={job_name(options.workdir)}", "--format=%K"]
    return frozenset(int(index) for index in launchers.ask(asked).split() if index.isdecimal())


def submit(folder: pathlib.Path, options: argparse.Namespace) -> str:
    """Submit both jobs or none."""
    array = launchers.ask(["sbatch", "--parsable", str(folder / ARRAY)]).strip().partition(";")[0]
    try:
        collect = launchers.ask(["sbatch", "--parsable", f"--dependency=afterany:{array}", str(folder / COLLECT)]).strip().partition(";")[0]
    except config_lib.MachineError:
        launchers.ask(["scancel", array])
        raise
    watch = f"squeue --name={job_name(options.workdir)}; logs in {folder}"
    return (
        f"job {array} runs the tasks {indices(options.tasks)}, job {collect} makes {options.workdir}/report when they have ended; {watch}"
    )
