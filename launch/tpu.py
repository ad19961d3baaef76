"""A TPU slice on Google Cloud: every worker runs the same tasks, so that each point is trained by all chips together.

sweep.sh, on this machine, holds the TPU for as long as there is work and asks for another one when it is taken away; worker.sh runs on the
workers. vitmed.main finds its peers by itself on a TPU. Runs, data and weights lie on an NFS share (Filestore) that all workers mount.
"""

import argparse
import pathlib
import shlex

from launch import launchers
from launch import manifest as manifests
from vitmed import cli
from vitmed import config as config_lib

CHECKOUT = pathlib.Path(__file__).parents[1]
TEMPLATES = CHECKOUT / "launch" / "templates"
SWEEP, WORKER = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("tpu_sweep.sh", "tpu_worker.sh"))
RUNTIMES = {"v6e": "v2-alpha-tpuv6e", "v5p": "v2-alpha-tpuv5", "v5litepod": "v2-alpha-tpuv5-lite", "v4": "tpu-ubuntu2204-base"}


def add_flags(parser: cli.Parser) -> None:
    """--zone, --accelerator_type, --share and how often to begin anew."""
    group = parser.add_argument_group("tpu")
    group.add_argument("--zone", default="", metavar="ZONE", help="the zone; the project is gcloud's (gcloud config set project)")
    group.add_argument("--accelerator_type", default="v5litepod-4", metavar="TYPE", help="the slice, such as v6e-16 (default: v5litepod-4)")
    group.add_argument("--runtime_version", default="", metavar="NAME", help=f"(default by the type: {', '.join(RUNTIMES.values())})")
    group.add_argument("--share", default="", metavar="HOST:/PATH", help="the NFS export that holds runs, data and weights")
    launchers.add_mount(group)
    group.add_argument("--spot", action="store_true", help="a spot TPU: cheaper, and taken away at times")
    group.add_argument("--attempts", type=int, default=20, metavar="N", help="TPUs to ask for, one after another (default: 20)")


def render(manifest: manifests.Manifest, options: argparse.Namespace) -> dict[str, str]:
    """sweep.sh and worker.sh."""
    _check(options)
    task = manifests.task_command("", manifest="", workdir=options.workdir, task="$1")[1:]
    words = [
        '"--manifest=$HOME/manifest.json"' if word == "--manifest=" else f'"{word}"' if "$1" in word else shlex.quote(word) for word in task
    ]
    report = shlex.join(manifests.report_command("", workdir=options.workdir)[1:])
    worker = {"MOUNT": options.mount, "SHARE": options.share, "WORKDIR": options.workdir, "TASKS": " ".join(map(str, options.tasks))}
    functions = [
        *(f"export {name}={shlex.quote(value)}" for name, value in launchers.environment(options).items()),
        f'run_task() {{ "$python" {" ".join(words)}; }}',
        f'report() {{ "$python" {report}; }}',
    ]
    sweep = {
        "NAME": launchers.sweep_name(options.workdir),
        "ZONE": options.zone,
        "TYPE": options.accelerator_type,
        "RUNTIME": options.runtime_version or RUNTIMES[_generation(options)],
        "CHECKOUT": str(CHECKOUT),
        "MANIFEST": options.manifest,
        "WORKDIR": options.workdir,
        "ATTEMPTS": str(options.attempts),
        "SPOT": "--spot" if options.spot else "",
    }
    return {"sweep.sh": _script(sweep, [], SWEEP), "worker.sh": _script(worker, functions, WORKER)}


def _script(values: dict[str, str], lines: list[str], body: str) -> str:
    """A script that begins with its values."""
    return "\n".join(["#!/usr/bin/env bash", *(f"{name}={shlex.quote(value)}" for name, value in values.items()), *lines, body])


def _generation(options: argparse.Namespace) -> str:
    return options.accelerator_type.partition("-")[0]


def _check(options: argparse.Namespace) -> None:
    """InputError for flags that gcloud would refuse, or read as something else."""
    launchers.require_mount(options)
    launchers.require_given("--zone", options.zone, "us-central1-a")
    launchers.require_given("--share", options.share, "10.0.0.2:/vitmed")
    for flag, value, pattern, example in (
        ("--zone", options.zone, r"[a-z]+(-[a-z0-9]+)+", "us-central1-a"),
        ("--accelerator_type", options.accelerator_type, r"[a-z0-9]+-\d+", "v5litepod-4"),
        ("--runtime_version", options.runtime_version, r"[a-z0-9.-]*", "v2-alpha-tpuv5-lite"),
        ("--share", options.share, r"[\w.-]+:(/[\w.-]+)+", "10.0.0.2:/vitmed"),
    ):
        launchers.require_match(flag, value, pattern, example)
    if not options.runtime_version and _generation(options) not in RUNTIMES:
        known = ", ".join(f"{name}-N" for name in RUNTIMES)
        raise config_lib.InputError(
            f"--accelerator_type={options.accelerator_type}: its software is only known for {known}; give --runtime_version"
        )
    config_lib.require(options.attempts >= 1, "--attempts", options.attempts, "at least 1")


# --- the cloud ------------------------------------------------------------------------------------------------------------------


def require(options: argparse.Namespace) -> None:
    """InputError where gcloud is not installed, or the sweep has a TPU already: two would run the same points."""
    launchers.require_command("gcloud", engine="tpu", install="install the Google Cloud CLI and run gcloud auth login")
    name = launchers.sweep_name(options.workdir)
    place = ["gcloud", "compute", "tpus", "queued-resources"]
    if name in launchers.ask([*place, "list", f"--zone={options.zone}", "--format=value(name.basename())"]).split():
        mend = f"{' '.join(place)} delete {name} --zone={options.zone} --force"
        raise config_lib.InputError(
            f"--workdir={options.workdir}: its TPU {name} is there already; wait for the command that has it, or: {mend}"
        )


def submit(folder: pathlib.Path, options: argparse.Namespace) -> str:
    """Run sweep.sh to its end, which is that of the sweep; a signal gives the TPU back and leaves the rest for the next call."""
    launchers.run_script(folder / "sweep.sh")
    return f"{len(options.tasks)} tasks are done, the TPU is given back; the report: {options.workdir}/report/index.html"
