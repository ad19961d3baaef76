"""The engine of this machine: the tasks as processes, one on each GPU or --at_once side by side, and at the end the report."""

import argparse
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import IO, NamedTuple

from launch import manifest as manifest_lib
from vitmed import apart, cli
from vitmed import config as config_lib

COMMANDS = "commands.sh"
LOOK_SECONDS = 0.2
GPUS = "CUDA_VISIBLE_DEVICES"


class Running(NamedTuple):
    """A task's process, the file that gets its last words, the GPU that it has (None: whatever there is) and when it began."""

    process: subprocess.Popen
    words: IO[bytes]
    gpu: str | None
    began: float


def add_flags(parser: cli.Parser) -> None:
    """The flag of this engine."""
    parser.add_argument("--at_once", metavar="N", help="how many tasks run at the same time (default: a task on each GPU, or one)")


def render(manifest: manifest_lib.Manifest, options: argparse.Namespace) -> dict[str, str]:
    """The commands, a line each, as a script that could be run by hand: the tasks, then the report."""
    if options.at_once is not None:
        at_once = config_lib.parse("--at_once", options.at_once, 1)
        config_lib.require(at_once >= 1, "--at_once", at_once, "at least 1")
    place = {"manifest": options.manifest, "workdir": options.workdir}
    commands = [manifest_lib.task_command(sys.executable, **place, task=number) for number in options.tasks]
    commands.append(manifest_lib.report_command(sys.executable, workdir=options.workdir))
    return {COMMANDS: "".join(f"{shlex.join(command)}\n" for command in commands)}


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if GPUS in os.environ:
        return [name for name in os.environ[GPUS].split(",") if name and name != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:  # no driver, no GPUs
        return []
    return re.findall(r"^GPU (\d+):", listed.stdout, flags=re.MULTILINE)  # between them there may be lines about parts of one


def require(options: argparse.Namespace) -> None:
    """InputError where more tasks are wanted at once than there are GPUs: two would not fit one's memory."""
    there = len(gpus())
    if there and options.at_once is not None:
        config_lib.require(int(options.at_once) <= there, "--at_once", options.at_once, f"at most {there}, the GPUs of this machine")


def submit(folder: pathlib.Path, options: argparse.Namespace) -> str:
    """Run the tasks and make the report; MachineError where points have failed, Stopped after a signal."""
    *lines, report = (folder / COMMANDS).read_text().splitlines()
    commands = dict(zip(options.tasks, map(shlex.split, lines), strict=True))
    free = gpus() or [None] * int(options.at_once or 1)
    faults = run(commands, free[: int(options.at_once or len(free))], folder)
    status, said = apart.run(shlex.split(report))
    if status:
        faults["the report"] = said or "runs were left out of it"
    if faults:
        named = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        raise config_lib.MachineError(f"{named}; the logs are in {folder}, --status names the points, --retry runs failed ones again")
    return f"tasks done: {len(commands)}; the report: {options.workdir}/report/index.html"


def run(commands: Mapping[int, list[str]], free: list[str | None], folder: pathlib.Path) -> dict[str, str]:
    """Run commands by the task's number, as many at once as there are entries in `free`; what became of those that did not end well.

    A signal is passed on to what runs; when all has ended, Stopped is raised.
    """
    waiting, running, faults = dict(commands), {}, {}
    received: list[int] = []

    def forward(signum: int, _: object) -> None:
        received.append(signum)
        for task in running.values():
            task.process.send_signal(signal.SIGTERM if signum == signal.SIGHUP else signum)

    passed_on = [one for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]  # nohup
    former = {signum: signal.signal(signum, forward) for signum in passed_on}
    try:
        while running or (waiting and not received):
            while waiting and free and not received:
                number = next(iter(waiting))
                running[number] = _start(waiting.pop(number), folder / f"task{number}.log", free.pop(0))
                if received:  # it came while there was no process to pass it on to
                    running[number].process.terminate()
                print(f"vitmed: task {number} begins, {len(waiting)} wait; its log: {folder}/task{number}.log", file=sys.stderr)
            time.sleep(LOOK_SECONDS)
            for number in [number for number, task in running.items() if task.process.poll() is not None]:
                task = running.pop(number)
                free.append(task.gpu)
                status, said = task.process.returncode, _last_words(task)
                print(f"vitmed: task {number} ended with {status} after {time.monotonic() - task.began:.0f} s", file=sys.stderr)
                if status in (75, 130):
                    received.append(signal.SIGTERM if status == 75 else signal.SIGINT)
                elif status:
                    faults[f"task {number}"] = f"exit status {status}{f': {said}' if said else ''}"
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)
    if received:
        raise config_lib.Stopped(signal.SIGINT if signal.SIGINT in received else signal.SIGTERM)
    return faults


def _start(command: list[str], log: pathlib.Path, gpu: str | None) -> Running:
    words = tempfile.TemporaryFile()  # noqa: SIM115 (closed by _last_words)
    environment = os.environ | {cli.LAST_WORDS: str(words.fileno())} | ({} if gpu is None else {GPUS: gpu})
    with open(log, "ab") as output:
        # A session of its own: a terminal's Ctrl-C reaches this process alone, which passes it on once.
        how = {"start_new_session": True, "env": environment, "pass_fds": [words.fileno()]}
        return Running(subprocess.Popen(command, stdout=output, stderr=output, **how), words, gpu, time.monotonic())


def _last_words(task: Running) -> str:
    with task.words as words:
        words.seek(0)
        return words.read().decode(errors="replace")
