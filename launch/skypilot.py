"""SkyPilot: a managed job for each task on whichever cloud is cheapest, started again elsewhere when a spot machine is taken away.

task.yaml is one job, told by $VITMED_TASK which task it is; submit.sh launches one for each task, finish.sh waits for them and launches
report.yaml. The checkout comes along as the jobs' working directory, and runs, data and weights lie in a bucket or on a SkyPilot volume.
"""

import argparse
import json
import pathlib
import shlex
from typing import Any

from launch import launchers
from launch import manifest as manifests
from vitmed import cli

CHECKOUT = pathlib.Path(__file__).parents[1]
MANIFEST = "vitmed-manifest.json"  # in the machine's home folder
PYTHON = "~/vitmed/bin/python"
QUEUE = ("sky", "jobs", "queue", "--skip-finished", "--all", "--output=json")  # without --all the latest 50
# The lock's versions, for the accelerator and without torch (pyproject.toml, [tool.uv]); a job that is recovered may find them there.
SETUP = """\
set -e
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
export PATH="$HOME/.local/bin:$PATH"
[ -x {python} ] || uv venv --quiet --python 3.11 ~/vitmed
uv pip install --quiet --python {python} --constraint requirements.lock '.[{extras}]'
"""


def add_flags(parser: cli.Parser) -> None:
    """--storage and the machines."""
    group = parser.add_argument_group("skypilot")
    group.add_argument(
        "--storage", default="", metavar="WHERE", help="a bucket such as gs://NAME or s3://NAME, or a SkyPilot volume's name"
    )
    launchers.add_mount(group)
    group.add_argument("--accelerators", default="L4:1", metavar="NAME:N", help="the GPU of a task (default: L4:1)")
    group.add_argument(
        "--infra", default="", metavar="WHERE", help="a cloud, region or cluster: gcp, aws/us-east-1, k8s (default: the cheapest)"
    )
    group.add_argument("--cpus", default="4+", metavar="N", help="CPUs of a machine, + for at least (default: 4+)")
    group.add_argument("--memory", default="16+", metavar="GB", help="memory of a machine (default: 16+)")
    group.add_argument("--spot", action="store_true", help="spot machines: cheaper, and taken away at times")


def render(manifest: manifests.Manifest, options: argparse.Namespace) -> dict[str, str]:
    """task.yaml, report.yaml and the scripts that launch them and wait."""
    _check(options)
    name = launchers.sweep_name(options.workdir)
    # The task's number and the home folder are the shell's, everything else is quoted.
    *words, last = manifests.task_command(PYTHON, manifest="", workdir=options.workdir, task="$VITMED_TASK")[1:]
    words = [f'"--manifest=$HOME/{MANIFEST}"' if word == "--manifest=" else shlex.quote(word) for word in words]
    accelerator = "tpu" if options.accelerators.lower().startswith("tpu") else "cuda12"
    task = _job(name, options, extras=f"{accelerator},medical,hub", run=f'exec {PYTHON} {" ".join(words)} "{last}"\n')
    task["resources"] |= {"accelerators": options.accelerators, "use_spot": options.spot}
    # Status 75 is not counted among failures; another one, such as wrong input, would only cost the same again.
    task["resources"]["job_recovery"] = {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    task["envs"] |= {"VITMED_TASK": None}  # launching without it is refused
    task["file_mounts"] = {f"~/{MANIFEST}": options.manifest} | task.get("file_mounts", {})
    words = manifests.report_command(PYTHON, workdir=options.workdir)[1:]
    report = _job(f"{name}-report", options, extras="medical", run=f"exec {PYTHON} {shlex.join(words)}\n")
    return {
        "task.yaml": launchers.as_yaml(task),
        "report.yaml": launchers.as_yaml(report),
        "submit.sh": _submit_script(name, options),
        "finish.sh": _finish_script(name, options),
    }


def _check(options: argparse.Namespace) -> None:
    """InputError for flags that SkyPilot would refuse, or read as something else."""
    launchers.require_mount(options)
    launchers.require_given("--storage", options.storage, "gs://my-bucket")
    for flag, value, pattern, example in (
        (
            "--storage",
            options.storage,
            r"(gs|s3|r2)://[\w./-]+|https://[\w./-]+|cos://[\w./-]+|[\w-]+",
            "gs://my-bucket, or a volume's name",
        ),
        ("--accelerators", options.accelerators, r"[\w.-]+(:\d+)?", "L4:1"),
        ("--infra", options.infra, r"([\w.*-]+(/[\w.*@:-]+){0,2})?", "gcp, aws/us-east-1 or k8s"),
        ("--cpus", options.cpus, r"\d+(\.\d+)?\+?", "4 or 4+"),
        ("--memory", options.memory, r"\d+(\.\d+)?\+?", "16 or 16+"),
    ):
        launchers.require_match(flag, value, pattern, example)


def _job(name: str, options: argparse.Namespace, *, extras: str, run: str) -> dict[str, Any]:
    """A task of SkyPilot: the machine, the checkout, the shared folder, how it is set up and what it runs."""
    job: dict[str, Any] = {
        "name": name,
        "workdir": str(CHECKOUT),
        "resources": {"cpus": options.cpus, "memory": options.memory},
        "envs": launchers.environment(options),
        "setup": SETUP.format(python=PYTHON, extras=extras),
        "run": run,
    }
    if options.infra:
        job["resources"]["infra"] = options.infra
    if "://" in options.storage:  # cached: a bucket mounted directly can neither append to a file nor rename one
        job["file_mounts"] = {options.mount: {"source": options.storage, "mode": "MOUNT_CACHED"}}
    else:
        job["volumes"] = {options.mount: options.storage}
    return job


def _submit_script(name: str, options: argparse.Namespace) -> str:
    """Launch a managed job for each task; what was launched before an error goes on, and is not launched again next time."""
    return f"""#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"
for task in {" ".join(map(str, options.tasks))}; do
    sky jobs launch --yes --detach-run --name "{name}-$task" --env "VITMED_TASK=$task" task.yaml
done
"""


def _finish_script(name: str, options: argparse.Namespace) -> str:
    """Follow the tasks' logs until each has ended, then make the report: those submitted last, and those of before that have not ended."""
    return f"""#!/usr/bin/env bash
set -uo pipefail
cd "$(dirname "$0")" || exit
queue=$({shlex.join(QUEUE)}) || {{ echo "sky does not say what is in the queue" >&2; exit 1; }}
before() {{ grep -oE '"{name}-[0-9]+"' <<<"$queue" | grep -oE '[0-9]+"' | tr -d '"'; }}
for task in $({{ printf '%s\\n' {" ".join(map(str, options.tasks))}; before; }} | sort -nu); do
    while :; do
        status=0
        sky jobs logs --name "{name}-$task" || status=$?
        [ "$status" = 101 ] || break # 101: the connection has ended, and the job has not
        sleep 60
    done
    [ "$status" = 0 ] || echo "task $task did not end well, the report says what is missing: sky jobs logs --name {name}-$task" >&2
done
sky jobs launch --yes --name "{name}-report" report.yaml
"""


# --- the clouds -----------------------------------------------------------------------------------------------------------------


def require(options: argparse.Namespace) -> None:
    """InputError where sky is not installed."""
    launchers.require_command("sky", engine="skypilot", install="pip install 'skypilot[gcp]' (or aws, kubernetes, ...) and run sky check")


def submit(folder: pathlib.Path, options: argparse.Namespace) -> str:
    """Launch the jobs."""
    launchers.run_script(folder / "submit.sh")
    return f"{len(options.tasks)} tasks are submitted; watch: sky jobs queue; wait for them and make the report: bash {folder}/finish.sh"


def queued(options: argparse.Namespace) -> frozenset[int]:
    """The tasks whose jobs wait, run or are being recovered."""
    name = launchers.sweep_name(options.workdir)
    jobs = json.loads(launchers.ask(QUEUE))
    parts = [job["job_name"].rpartition("-") for job in jobs if job.get("job_name")]
    return frozenset(int(task) for sweep, _, task in parts if sweep == name and task.isdecimal())
