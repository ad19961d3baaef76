"""Kubernetes: an Indexed Job with a pod for each task, or a JobSet that also makes the report when the tasks have ended.

The manifest goes into a ConfigMap; runs, data and weights lie on one persistent volume claim that every pod mounts. Pods that are
evicted, or end with status 75, are started again and not counted; one that crashes is started again three times. With --processes=N
each task is a Job of N pods, which train its points together (jax.distributed).
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
from typing import Any

import yaml

from launch import launchers
from launch import manifest as manifests
from vitmed import cli
from vitmed import config as config_lib
from vitmed.runs import files

KINDS = ("job", "jobset")
SWEEP = "vitmed/sweep"  # a label, by which `queued` finds what runs
TASKS, TASK_OF_JOB = "vitmed/tasks", "vitmed/task-of-job"  # annotations: the tasks by the index of a pod, or of a JobSet's Job
POD_INDEX, POD_FAILURES = "batch.kubernetes.io/job-completion-index", "batch.kubernetes.io/job-index-failure-count"
JOB_INDEX = "jobset.sigs.k8s.io/job-index"
MANIFEST_FOLDER = "/etc/vitmed"
PORT = 8476
GRACE = 120  # seconds for a step, a checkpoint and its seal after SIGTERM
CRASHES = 3
STOPPED = [75, 143]  # by SIGTERM; 143 where it came before Python could listen
RESTARTS = 100  # of a JobSet whose pods train together: each lost pod is one
KEPT = 7 * 24 * 3600  # seconds for which a Job that has ended can be looked at
USER = 1000  # of the Dockerfile
ABSENT = ("NotFound", "doesn't have a resource type")  # kubectl's words


def add_flags(parser: cli.Parser) -> None:
    """--image, --claim and what a pod gets."""
    group = parser.add_argument_group("kubernetes")
    group.add_argument("--image", default="", metavar="IMAGE", help="the image made of the Dockerfile, as the cluster pulls it")
    group.add_argument("--claim", default="", metavar="NAME", help="the ReadWriteMany volume claim for runs, data and weights")
    launchers.add_mount(group)
    group.add_argument("--namespace", default="default", metavar="NAME", help="(default: default)")
    group.add_argument(
        "--kind", default="job", help="job, or jobset: makes the report at the end, needs JobSet's controller (default: job)"
    )
    group.add_argument("--limit", type=int, metavar="N", help="pods at the same time (default: all)")
    group.add_argument("--processes", type=int, default=1, metavar="N", help="pods that train each point together; needs --kind=jobset")
    group.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of a pod (default: 1)")
    group.add_argument("--cpus", default="4", metavar="N", help="CPUs of a pod (default: 4)")
    group.add_argument("--memory", default="16Gi", metavar="SIZE", help="memory of a pod (default: 16Gi)")
    group.add_argument("--node_selector", action="append", default=[], metavar="LABEL=VALUE", help="only nodes with this label; repeatable")


def render(manifest: manifests.Manifest, options: argparse.Namespace) -> dict[str, str]:
    """job.yaml or jobset.yaml, and report.yaml: a Job that makes the report whenever it is replaced by force."""
    _check(options)
    text = files.json_bytes({"version": manifests.VERSION, **dataclasses.asdict(manifest)}).decode()
    # Another name for other work: Jobs cannot be changed, and one that still runs goes on.
    name = f"{launchers.sweep_name(options.workdir)}-{launchers.digest(text, options.tasks)[:8]}"
    tasks = ",".join(map(str, options.tasks))
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(name, options, {}), "data": {manifests.FILE_NAME: text}}
    metadata = _metadata(name, options, {TASKS: tasks})
    if options.kind == "jobset":
        work = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": _jobset_spec(name, options)}
    else:
        spec = _tasks_spec(name, options) | {"ttlSecondsAfterFinished": KEPT}
        work = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
    report = {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(f"{name}-report", options, {}), "spec": _report_spec(options)}
    return {f"{options.kind}.yaml": launchers.as_yaml(config_map, work), "report.yaml": launchers.as_yaml(report)}


def _check(options: argparse.Namespace) -> None:
    """InputError for flags that the cluster would refuse, or read as something else."""
    launchers.require_mount(options)
    launchers.require_given("--image", options.image, "registry.example.com/vitmed:0.1.0")
    launchers.require_given("--claim", options.claim, "vitmed")
    config_lib.one_of("--kind", options.kind, KINDS)
    for flag, value, pattern, example in (
        ("--image", options.image, r"[\w./:@-]+", "registry.example.com/vitmed:0.1.0"),
        ("--claim", options.claim, r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?", "vitmed"),
        ("--namespace", options.namespace, r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", "default"),
        ("--cpus", options.cpus, r"\d+(\.\d+)?|\d+m", "4 or 500m"),
        ("--memory", options.memory, r"\d+(\.\d+)?([kMGTPE]|[KMGTPE]i)?", "16Gi"),
        *(("--node_selector", label, r"[\w./-]+=[\w.-]*", "cloud.google.com/gke-spot=true") for label in options.node_selector),
    ):
        launchers.require_match(flag, value, pattern, example)
    for flag, number, least in (("--gpus", options.gpus, 0), ("--processes", options.processes, 1), ("--limit", options.limit, 1)):
        config_lib.require(number is None or number >= least, flag, number, f"at least {least}")
    if options.processes > 1 and options.kind != "jobset":
        raise config_lib.InputError(
            f"--processes={options.processes}: pods find one another by a JobSet's names; give --kind=jobset as well"
        )
    if options.processes > 1 and options.limit is not None:
        raise config_lib.InputError(f"--limit={options.limit}: a JobSet starts all its Jobs at once; leave it out with --processes")


def _metadata(name: str, options: argparse.Namespace, annotations: dict[str, str]) -> dict[str, Any]:
    return {"name": name, "namespace": options.namespace, "labels": _labels(options), "annotations": annotations}


def _labels(options: argparse.Namespace) -> dict[str, str]:
    return {SWEEP: launchers.sweep_name(options.workdir)}


# --- what runs ------------------------------------------------------------------------------------------------------------------


def _jobset_spec(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The tasks, in one Job or with --processes in a Job each, and the report, which begins when these are complete."""
    together = options.processes > 1
    annotations = {TASK_OF_JOB if together else TASKS: ",".join(map(str, options.tasks))}
    metadata = {"labels": _labels(options), "annotations": annotations}
    tasks = {
        "name": "tasks",
        "replicas": len(options.tasks) if together else 1,
        "template": {"metadata": metadata, "spec": _tasks_spec(name, options)},
    }
    report = {
        "name": "report",
        "replicas": 1,
        "dependsOn": [{"name": "tasks", "status": "Complete"}],
        "template": {"spec": _report_spec(options)},
    }
    spec = {"ttlSecondsAfterFinished": KEPT, "network": {"enableDNSHostnames": True}, "replicatedJobs": [tasks, report]}
    if together:  # a lost pod leaves its peers waiting: all Jobs are made anew and go on from their checkpoints
        spec["failurePolicy"] = {"maxRestarts": RESTARTS}
    return spec


def _tasks_spec(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The Job of all tasks, a pod each; with --processes that of one task, whose pods share their fate."""
    resources: dict[str, Any] = {"requests": {"cpu": options.cpus, "memory": options.memory}, "limits": {"memory": options.memory}}
    if options.gpus:
        resources["limits"]["nvidia.com/gpu"] = options.gpus
    spec: dict[str, Any] = {"completionMode": "Indexed"}
    if options.processes > 1:
        spec |= {"completions": options.processes, "parallelism": options.processes, "backoffLimit": 0}
    else:
        at_once = min(options.limit or len(options.tasks), len(options.tasks))
        spec |= {"completions": len(options.tasks), "parallelism": at_once, "backoffLimitPerIndex": CRASHES}
        spec["podFailurePolicy"] = {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "Ignore", "onExitCodes": {"containerName": "task", "operator": "In", "values": STOPPED}},
                {"action": "FailIndex", "onExitCodes": {"containerName": "task", "operator": "In", "values": [2]}},
            ]
        }
    command = ["/bin/sh", "-c", task_script(options)]
    pod = _pod("task", command, environment=_environment(name, options), resources=resources, options=options)
    pod["terminationGracePeriodSeconds"] = GRACE
    pod["volumes"].append({"name": "manifest", "configMap": {"name": name}})
    pod["containers"][0]["volumeMounts"].append({"name": "manifest", "mountPath": MANIFEST_FOLDER, "readOnly": True})
    if options.gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if options.node_selector:
        pod["nodeSelector"] = dict(label.split("=", 1) for label in options.node_selector)
    return spec | {"template": {"metadata": {"labels": _labels(options)}, "spec": pod}}


def _environment(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a task's container is told: which of the tasks it is, and with --processes where its peers are."""
    variables = [{"name": key, "value": value} for key, value in launchers.environment(options).items()]
    if options.processes == 1:
        return [*variables, _field("INDEX", f"annotations['{POD_INDEX}']"), _field("FAILURES", f"annotations['{POD_FAILURES}']")]
    return [
        *variables,
        _field("INDEX", f"labels['{JOB_INDEX}']"),
        # A JobSet gives its pods names: this is the first of the same Job. A process's number is its JOB_COMPLETION_INDEX.
        {"name": "VITMED_COORDINATOR", "value": f"{name}-tasks-$(INDEX)-0.{name}:{PORT}"},
        {"name": "VITMED_NUM_PROCESSES", "value": str(options.processes)},
    ]


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.{path}"}}}


def task_script(options: argparse.Namespace) -> str:
    """What a task's container runs: a shell that passes SIGTERM on. A container's first process gets no signal before it listens.

    A JobSet makes no report where a task has failed, so there a task that has ended counts as complete: what failed stands in the
    points' folders, and the report says it. Status 1 may also be a folder that is still locked, and is tried again before.
    """
    # The number of the task is a word of the shell, everything else is quoted.
    *words, last = manifests.task_command("python", manifest=f"{MANIFEST_FOLDER}/{manifests.FILE_NAME}", workdir=options.workdir, task="$1")
    command = f'{shlex.join(words)} "{last}"'
    script = f"""stopped= child=
stop() {{ sleep 1; kill -TERM "$child"; }} # a child that has just been made, and has not its program yet, would not hear it
trap 'stopped=1; [ -z "$child" ] || stop' TERM
set -- {" ".join(map(str, options.tasks))}; shift "$INDEX"
[ -z "$stopped" ] || exit 143
{command} &
child=$!
[ -z "$stopped" ] || stop
wait "$child"; status=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done
"""
    if options.kind == "jobset":
        again = f'[ "$status" = 1 ] && [ "${{FAILURES:-{CRASHES}}}" -lt {CRASHES} ] && exit 1\n'
        script += "" if options.processes > 1 else again
        script += 'case $status in 1|2) echo "task $1 ended with status $status" >&2; status=0 ;; esac\n'
    return f'{script}exit "$status"\n'


def _report_spec(options: argparse.Namespace) -> dict[str, Any]:
    """A Job of one pod without a GPU; status 1 is a report that leaves runs out, and no reason to make it again."""
    resources = {"requests": {"cpu": options.cpus, "memory": options.memory}, "limits": {"memory": options.memory}}
    command = manifests.report_command("python", workdir=options.workdir)
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "report", "operator": "In", "values": [1, 2]}},
    ]
    pod = _pod("report", command, environment=[], resources=resources, options=options)
    return {
        "backoffLimit": CRASHES,
        "podFailurePolicy": {"rules": rules},
        "template": {"metadata": {"labels": _labels(options)}, "spec": pod},
    }


def _pod(name: str, command: list[str], *, environment: list, resources: dict, options: argparse.Namespace) -> dict[str, Any]:
    """A pod of one container with the shared volume."""
    container = {
        "name": name,
        "image": options.image,
        "command": command,
        "env": environment,
        "resources": resources,
        "volumeMounts": [{"name": "share", "mountPath": options.mount}],
    }
    return {
        "restartPolicy": "Never",
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER},
        "containers": [container],
        "volumes": [{"name": "share", "persistentVolumeClaim": {"claimName": options.claim}}],
    }


# --- the cluster ----------------------------------------------------------------------------------------------------------------


def require(options: argparse.Namespace) -> None:
    """InputError where kubectl, the claim or the JobSet controller is not there."""
    launchers.require_command("kubectl", engine="kubernetes", install="install it and name your cluster (kubectl config use-context)")
    wanted = [(["get", "persistentvolumeclaim", options.claim], f"--claim={options.claim}", "create it, or name another")]
    if options.kind == "jobset":
        install = "install the JobSet controller in the cluster, or take --kind=job"
        wanted.append((["get", "jobsets.jobset.x-k8s.io"], "--kind=jobset", install))
    for command, flag, mend in wanted:
        try:
            _kubectl(options, *command, "--output=name")
        except config_lib.MachineError as error:
            if not any(words in str(error) for words in ABSENT):
                raise  # a cluster that does not answer says nothing of the flag
            raise config_lib.InputError(f"{flag}: {error}; {mend}") from error


def submit(folder: pathlib.Path, options: argparse.Namespace) -> str:
    """Apply the ConfigMap and the Job or JobSet, in place of one of the same tasks that has ended."""
    file = folder / f"{options.kind}.yaml"
    name = next(yaml.safe_load_all(file.read_text()))["metadata"]["name"]
    # `queued` has left out what still runs: a Job of this name has ended, and would not be started again.
    _kubectl(options, "delete", options.kind, name, "--ignore-not-found", "--cascade=foreground")
    _kubectl(options, "apply", f"--filename={file}")
    label = f"{SWEEP}={launchers.sweep_name(options.workdir)}"
    watch = f"kubectl --namespace={options.namespace} get {options.kind} {name} --watch"
    report = "" if options.kind == "jobset" else f"; when it has ended, the report: kubectl replace --force --filename={folder}/report.yaml"
    return f"{len(options.tasks)} tasks are submitted as {options.kind} {name}, {label}; watch: {watch}{report}"


def queued(options: argparse.Namespace) -> frozenset[int]:
    """The tasks of this sweep whose Jobs have not ended, less those that are through within them."""
    label = f"--selector={SWEEP}={launchers.sweep_name(options.workdir)}"
    found: set[int] = set()
    for job in json.loads(_kubectl(options, "get", "jobs", label, "--output=json"))["items"]:
        status, metadata = job.get("status", {}), job["metadata"]
        ended = any(one["type"] in ("Complete", "Failed") and one["status"] == "True" for one in status.get("conditions", ()))
        annotations = metadata.get("annotations", {})
        if ended:
            continue
        if TASK_OF_JOB in annotations:
            found.add(int(annotations[TASK_OF_JOB].split(",")[int(metadata["labels"][JOB_INDEX])]))
        elif TASKS in annotations:
            through = _indexes(status.get("completedIndexes", "")) | _indexes(status.get("failedIndexes", ""))
            found |= {int(task) for index, task in enumerate(annotations[TASKS].split(",")) if index not in through}
    return frozenset(found)


def _indexes(text: str) -> set[int]:
    """'0,3-5' as Kubernetes writes it -> {0, 3, 4, 5}."""
    pairs = [part.partition("-") for part in text.split(",") if part]
    return {index for first, _, last in pairs for index in range(int(first), int(last or first) + 1)}


def _kubectl(options: argparse.Namespace, *arguments: str) -> str:
    return launchers.ask(["kubectl", f"--namespace={options.namespace}", *arguments])
