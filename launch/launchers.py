"""What the engines share that hand a sweep to somebody else's command: names, checks of flags, and asking that command."""

import argparse
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from vitmed import config as config_lib

LONGEST_NAME = 30  # leaves room for what launchers append: theirs end at 63
KLOG = re.compile(r"[IWEF]\d{4} [\d:.]+ ")  # begins what kubectl logs besides what it has to say


def sweep_name(workdir: str) -> str:
    """The sweep's name for a launcher, [a-z][a-z0-9-]*: its folder's, and 6 characters of a hash of the whole path.

    Folders of the same last name must differ: a launcher knows a sweep by this name alone.
    """
    path = os.path.normpath(workdir)
    name = re.sub(r"[^a-z0-9]+", "-", os.path.basename(path).lower()).strip("-")
    if not name[:1].isalpha():
        name = f"run-{name}"
    return f"{name[: LONGEST_NAME - 7].strip('-')}-{digest(path)[:6]}"


def digest(*values: Any) -> str:
    """A hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def add_mount(group: argparse._ArgumentGroup) -> None:
    """The flag that says where machines of a cloud find the shared folder."""
    text = "where the machines mount what they share; --workdir must be below it, data are looked for in DIR/data (default: /share)"
    group.add_argument("--mount", default="/share", metavar="DIR", help=text)


def environment(options: argparse.Namespace) -> dict[str, str]:
    """The variables by which vitmed and the Hugging Face library find data and weights in the shared folder."""
    return {"VITMED_DATA": f"{options.mount}/data", "VITMED_WEIGHTS": f"{options.mount}/weights", "HF_HOME": f"{options.mount}/huggingface"}


def require_mount(options: argparse.Namespace) -> None:
    """InputError where the machines could not see the sweep's folder."""
    require_match("--mount", options.mount, r"(/[\w.-]+)+", "/share")
    require_match("--workdir", options.workdir, r"(/[\w. -]+)+", f"{options.mount}/runs/study")
    for flag, path in (("--mount", options.mount), ("--workdir", options.workdir)):
        config_lib.require(".." not in pathlib.PurePath(path).parts, flag, path, "a path without ..")
    if pathlib.PurePath(options.mount) not in pathlib.PurePath(options.workdir).parents:
        example = f"{options.mount}/runs/{pathlib.PurePath(options.workdir).name}"
        raise config_lib.InputError(
            f"--workdir={config_lib.one_line(options.workdir)}: is not below --mount={options.mount}, all that the machines share; write "
            f"--workdir={example}, or another --mount"
        )


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines, which are scripts and files here, as they are."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def as_yaml(*documents: Any) -> str:
    """YAML documents, their keys in the order given."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def require_given(flag: str, value: str | None, example: str) -> None:
    """InputError where a flag without a default is not given."""
    if not value:
        raise config_lib.InputError(f"{flag}: is not given and has no default; write {flag}={example}")


def require_match(flag: str, value: str, pattern: str, example: str) -> None:
    """InputError where a flag's value is not of this form: a launcher would refuse it later, or read it as something else."""
    if not re.fullmatch(pattern, value):
        raise config_lib.InputError(f"{flag}={config_lib.one_line(value)}: must be of the form of {example}")


def require_command(command: str, *, engine: str, install: str) -> None:
    """InputError where the launcher's command is not installed."""
    if shutil.which(command) is None:
        raise config_lib.InputError(
            f"--to={engine}: there is no {command} on this machine; {install}, or give --dry-run to see what would be submitted"
        )


def ask(command: Sequence[str]) -> str:
    """The command's output; MachineError with the line that it complained in where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, errors="replace")
    if done.returncode:
        lines = (done.stderr or done.stdout).splitlines()
        said = [line for line in lines if line.strip() and not KLOG.match(line)] or ["it said nothing"]
        complaint = next((line for line in said if "error" in line.lower()), said[-1])
        raise config_lib.MachineError(f"{' '.join(command[:3])}: exit status {done.returncode}: {config_lib.one_line(complaint)}")
    return done.stdout


def run_script(script: pathlib.Path) -> None:
    """Run a rendered script under bash, what it prints on stderr; MachineError where it fails, Stopped after a signal.

    A signal is passed on: what a script does at its end, such as giving a machine back, it does then as well. Only the first one is: more
    would end the commands of that end.
    """
    received: list[int] = []
    process: subprocess.Popen | None = None

    def forward(signum: int, _: object) -> None:
        received.append(signum)
        if process is not None and len(received) == 1:
            os.killpg(process.pid, signal.SIGTERM)  # what the script waits for as well: until that ends bash does nothing

    passed_on = [one for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]  # nohup
    former = {signum: signal.signal(signum, forward) for signum in passed_on}
    try:
        process = subprocess.Popen(["bash", str(script)], stdout=sys.stderr, stdin=subprocess.DEVNULL, start_new_session=True)
        if received:
            os.killpg(process.pid, signal.SIGTERM)  # it came before there was a script
        status = process.wait()
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)
    if received:
        raise config_lib.Stopped(signal.SIGINT if signal.SIGINT in received else signal.SIGTERM)
    if status:
        raise config_lib.MachineError(f"{script} ended with exit status {status}; what it said stands above")
