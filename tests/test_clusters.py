"""What launch/ renders for clouds: files that their readers' own schemas accept, and scripts that do the right thing, run among fakes."""

import json
import os
import pathlib
import shutil
import subprocess
import time

import pytest
import yaml
from fake_commands import MANIFEST, NEEDED, Fakes, options_of, render, write

from launch import kubernetes, launchers, manifest, skypilot, tpu
from vitmed import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent
NAME = launchers.sweep_name("/share/runs/study")
VALIDATORS = os.environ.get("VITMED_VALIDATORS", "")
needs_validators = pytest.mark.skipif(
    not VALIDATORS, reason="VITMED_VALIDATORS names no bin folder with tests/validators.txt installed; .ci/run makes one"
)


def work_of(files):
    """The Job or JobSet, and its ConfigMap."""
    name = next(name for name in files if name != "report.yaml")
    config_map, work = yaml.safe_load_all(files[name])
    return work, config_map


def task_container(work):
    spec = work["spec"]["replicatedJobs"][0]["template"]["spec"] if work["kind"] == "JobSet" else work["spec"]
    return spec, spec["template"]["spec"]["containers"][0]


# --- what all have in common ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", NEEDED)
def test_rendering_is_pure_and_names_only_the_tasks_asked_for(engine):
    files = render(engine, tasks=(1, 3))
    assert files == render(engine, tasks=(1, 3))
    text = "".join(files.values())
    assert "1 3" in text
    assert "0 1 3" not in text
    assert "launch.task" in text
    assert "vitmed.report" in text


@pytest.mark.parametrize(
    ("engine", "flags", "says"),
    [
        (kubernetes, ["--image="], "--image: is not given"),
        (kubernetes, ["--claim="], "--claim=vitmed"),
        (kubernetes, ["--claim=a b"], "--claim=a b: must be of the form of vitmed"),
        (kubernetes, ["--image=x; rm"], "--image=x; rm: must"),
        (kubernetes, ["--namespace=Bad_"], "--namespace=Bad_: must"),
        (kubernetes, ["--memory=16 GB"], "16Gi"),
        (kubernetes, ["--cpus=many"], "500m"),
        (kubernetes, ["--gpus=-1"], "--gpus=-1: must be at least 0"),
        (kubernetes, ["--gpus=two"], "invalid int value"),
        (kubernetes, ["--limit=0"], "--limit=0: must be at least 1"),
        (kubernetes, ["--kind=jobst"], "did you mean jobset"),
        (kubernetes, ["--node_selector=gpu"], "cloud.google.com/gke-spot=true"),
        (kubernetes, ["--processes=4"], "--kind=jobset as well"),
        (kubernetes, ["--processes=4", "--kind=jobset", "--limit=2"], "leave it out"),
        (kubernetes, ["--mount=/other"], "--workdir=/other/runs/study"),
        (kubernetes, ["--workdir=/share/../etc"], "--workdir=/share/../etc: must be a path without .."),
        (tpu, ["--mount=/share/.."], "--mount=/share/..: must be a path without .."),
        (kubernetes, ["--mount=relative"], "--mount=relative: must be of the form of /share"),
        (skypilot, ["--storage="], "--storage: is not given"),
        (skypilot, ["--storage=gs:/bucket"], "gs://my-bucket"),
        (skypilot, ["--accelerators=one L4"], "L4:1"),
        (skypilot, ["--infra=a/b/c/d"], "aws/us-east-1"),
        (skypilot, ["--memory=16Gi"], "16 or 16+"),
        (tpu, ["--zone="], "--zone: is not given"),
        (tpu, ["--share=10.0.0.2"], "10.0.0.2:/vitmed"),
        (tpu, ["--accelerator_type=v9-8"], "give --runtime_version"),
        (tpu, ["--attempts=0"], "--attempts=0: must be at least 1"),
    ],
)
def test_bad_flags_get_one_line(engine, flags, says):
    with pytest.raises(config_lib.InputError) as caught:
        render(engine, *flags)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("engine", "command"), [(kubernetes, "kubectl"), (skypilot, "sky"), (tpu, "gcloud")])
def test_a_launcher_that_is_not_installed_is_refused_with_what_to_do(engine, command, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(config_lib.InputError, match=f"there is no {command} on this machine; .*--dry-run"):
        engine.require(options_of(engine))


def test_folders_get_names_that_differ_and_are_allowed():
    folders = ["a/study", "b/study", "vit_2d", "vit.2d", "VIT-2d", "2d", "größe", "---", "x" * 70, "x" * 71, "x" * 22 + "-y"]
    names = [launchers.sweep_name(f"/share/{folder}") for folder in folders]
    assert len(set(names)) == len(names)
    for name in names:
        launchers.require_match("name", name, r"[a-z][a-z0-9-]{0,22}-[0-9a-f]{6}", "study")
    assert names[0].startswith("study-")
    assert names[5].startswith("run-2d-")


def test_a_folder_has_one_name_however_it_is_written():
    assert {launchers.sweep_name(path) for path in ("/share//a/study/", "/share/a/./study", "/share/b/../a/study")} == {
        launchers.sweep_name("/share/a/study")
    }


@pytest.mark.parametrize("engine", [kubernetes, skypilot, tpu])
def test_sweeps_of_folders_with_the_same_last_name_share_no_name(engine):
    names = [launchers.sweep_name(f"/share/{parent}/study") for parent in "ab"]
    text = "".join(render(engine, workdir="/share/a/study").values())
    assert names[0] in text
    assert names[1] not in text


def test_an_error_tells_what_the_launcher_said():
    with pytest.raises(config_lib.MachineError, match="exit status 3: ERROR: no permission"):
        launchers.ask(["sh", "-c", "echo trying >&2; echo ERROR: no permission >&2; echo 'Run this: help' >&2; exit 3"])


# --- Kubernetes -----------------------------------------------------------------------------------------------------------------


def test_a_job_has_a_pod_for_each_task_and_counts_no_preemption():
    job, config_map = work_of(render(kubernetes, "--limit=2", "--node_selector=a.b/c=d", "--gpus=2"))
    spec, container = task_container(job)
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (3, 2, "Indexed")
    actions = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in spec["podFailurePolicy"]["rules"]]
    assert actions == [("Ignore", None), ("Ignore", [75, 143]), ("FailIndex", [2])]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert spec["template"]["spec"]["nodeSelector"] == {"a.b/c": "d"}
    assert spec["template"]["spec"]["volumes"][1]["configMap"]["name"] == config_map["metadata"]["name"]


def test_the_manifest_in_the_config_map_is_read_back_as_it_is(tmp_path):
    _, config_map = work_of(render(kubernetes))
    (tmp_path / "manifest.json").write_text(config_map["data"]["manifest.json"])
    assert manifest.read(tmp_path / "manifest.json") == MANIFEST


def test_other_tasks_get_a_job_of_another_name():
    names = {work_of(render(kubernetes, tasks=tasks))[0]["metadata"]["name"] for tasks in ((0, 1, 3), (1,))}
    assert len(names) == 2
    assert {name[:-8] for name in names} == {f"{NAME}-"}


def test_pods_that_train_together_find_the_first_of_their_own_job():
    work, _ = work_of(render(kubernetes, "--kind=jobset", "--processes=4"))
    tasks, report = work["spec"]["replicatedJobs"]
    spec, container = task_container(work)
    assert (tasks["replicas"], spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (3, 4, 4, 0)
    variables = {one["name"]: one.get("value") for one in container["env"]}
    name = work["metadata"]["name"]
    assert variables["VITMED_COORDINATOR"] == f"{name}-{tasks['name']}-$(INDEX)-0.{name}:8476"
    assert variables["VITMED_NUM_PROCESSES"] == "4"
    assert report["dependsOn"] == [{"name": "tasks", "status": "Complete"}]
    assert work["spec"]["failurePolicy"]["maxRestarts"] > 10


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path / "fakes", "python", "kubectl", "sky", "gcloud", "sleep", "uv")


@pytest.fixture
def called(fakes, monkeypatch):
    """The same fakes, found by this process too."""
    for name in ("PATH", "FAKES"):
        monkeypatch.setenv(name, fakes.environment()[name])
    return fakes


@pytest.mark.parametrize("status", [0, 1, 2, 75, 137])
def test_a_jobs_pod_ends_as_its_task_does(fakes, status):
    _, container = task_container(work_of(render(kubernetes, workdir="/share/my runs/study"))[0])
    fakes.answer("python *", status)
    assert fakes.run(container["command"], INDEX="2").returncode == status
    assert fakes.calls == ["python -m launch.task --manifest=/etc/vitmed/manifest.json --workdir=/share/my runs/study --task=3"]


@pytest.mark.parametrize(
    ("status", "failures", "expected"), [(0, 0, 0), (1, 0, 1), (1, 2, 1), (1, 3, 0), (2, 0, 0), (75, 3, 75), (137, 0, 137)]
)
def test_a_jobsets_pod_ends_well_where_only_points_have_failed_for_good(fakes, status, failures, expected):
    _, container = task_container(work_of(render(kubernetes, "--kind=jobset"))[0])
    fakes.answer("python *--task=0", status)
    assert fakes.run(container["command"], INDEX="0", FAILURES=str(failures)).returncode == expected


@pytest.mark.parametrize("kind", kubernetes.KINDS)
def test_a_pod_loses_no_sigterm_that_comes_early(fakes, kind):
    script = task_container(work_of(render(kubernetes, f"--kind={kind}"))[0])[1]["command"][2]
    before = script.replace('shift "$INDEX"', 'kill -TERM $$; shift "$INDEX"')
    assert (fakes.run(["sh", "-c", before], INDEX="1").returncode, fakes.calls) == (143, [])
    fakes.answer("python *", "stop")
    just_made = script.replace("child=$!", "kill -TERM $$; child=$!").replace("sleep", "sleep_for_real")
    assert fakes.run(["sh", "-c", just_made], INDEX="1").returncode == 75


@pytest.mark.parametrize("kind", kubernetes.KINDS)
def test_a_pod_passes_sigterm_on_and_waits(fakes, kind):
    """Its first process is the shell: what does not listen there gets no signal."""
    _, container = task_container(work_of(render(kubernetes, f"--kind={kind}"))[0])
    fakes.answer("python *", "stop")
    process = fakes.start(container["command"], INDEX="1", FAILURES="0")
    wait_for(lambda: fakes.listening)
    process.terminate()
    assert process.wait(30) == 75
    assert fakes.calls[-1].endswith("--task=1 got SIGTERM")


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_submitting_replaces_a_job_that_has_ended_and_applies(called, tmp_path):
    options = options_of(kubernetes)
    kubernetes.require(options)
    write(tmp_path, kubernetes.render(MANIFEST, options))
    said = kubernetes.submit(tmp_path, options)
    name = work_of(render(kubernetes))[0]["metadata"]["name"]
    get, delete, apply = called.calls
    assert get == "kubectl --namespace=default get persistentvolumeclaim vitmed --output=name"
    assert delete == f"kubectl --namespace=default delete job {name} --ignore-not-found --cascade=foreground"
    assert apply == f"kubectl --namespace=default apply --filename={tmp_path}/job.yaml"
    assert f"kubectl replace --force --filename={tmp_path}/report.yaml" in said
    assert f"vitmed/sweep={NAME}" in said


@pytest.mark.parametrize(
    ("kind", "asked", "answer", "says"),
    [
        ("job", "*persistentvolumeclaim*", 'Error from server (NotFound): persistentvolumeclaims "vitmed" not found', "--claim"),
        ("jobset", "*jobsets*", 'error: the server doesn\'t have a resource type "jobsets"', "--kind"),
    ],
)
def test_a_claim_or_controller_that_is_not_there_is_refused(called, kind, asked, answer, says):
    called.answer(asked, 1, answer)
    with pytest.raises(config_lib.InputError, match=says):
        kubernetes.require(options_of(kubernetes, f"--kind={kind}"))


@pytest.mark.parametrize("kind", kubernetes.KINDS)
def test_a_cluster_that_does_not_answer_is_no_missing_claim(called, tmp_path, kind):
    log = 'E1125 10:00:00.000000 7 memcache.go:265] "Unhandled Error" err="connection refused"'
    refused = "The connection to the server localhost:8080 was refused - did you specify the right host or port?"
    (called.bin / "kubectl").write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{log}\n{refused}\n\nEND\nexit 1\n")
    with pytest.raises(config_lib.MachineError, match=f"exit status 1: {refused[:-1]}"):
        kubernetes.require(options_of(kubernetes, f"--kind={kind}"))


def test_tasks_whose_jobs_have_not_ended_are_queued(called):

    def job(tasks, labels=(), key=kubernetes.TASKS, **status):
        return {"metadata": {"annotations": {key: tasks}, "labels": dict(labels)}, "status": status}

    done = [{"type": "Complete", "status": "True"}]
    jobs = [
        job("3,5,7,9,11", completedIndexes="0,2-3", failedIndexes="4"),
        job("20,21", conditions=done),
        job("30,31,32", {kubernetes.JOB_INDEX: "1"}, key=kubernetes.TASK_OF_JOB, conditions=[{"type": "Suspended", "status": "True"}]),
        {"metadata": {}},
    ]
    called.answer(f"*get jobs --selector=vitmed/sweep={NAME} --output=json", 0, json.dumps({"items": jobs}))
    assert kubernetes.queued(options_of(kubernetes)) == {5, 31}


# --- SkyPilot -------------------------------------------------------------------------------------------------------------------

QUEUE = "sky jobs queue --skip-finished --all --output=json"


def test_a_job_runs_its_task_and_only_status_75_begins_again(fakes, tmp_path):
    files = render(skypilot, "--spot", "--infra=gcp", workdir="/share/my runs/study")
    task = yaml.safe_load(files["task.yaml"])
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    assert task["resources"]["use_spot"]
    assert task["file_mounts"]["/share"] == {"source": "gs://bucket", "mode": "MOUNT_CACHED"}
    fakes.add(tmp_path / "vitmed/bin/python")
    fakes.answer("python *", 75)
    assert fakes.run(["bash", "-c", task["run"]], HOME=str(tmp_path), VITMED_TASK="3").returncode == 75
    given = f"--manifest={tmp_path}/vitmed-manifest.json --workdir=/share/my runs/study --task=3"
    assert fakes.calls == [f"python -m launch.task {given}"]


def test_a_job_installs_the_locked_versions_once(fakes, tmp_path):
    setup = yaml.safe_load(render(skypilot)["task.yaml"])["setup"]
    for _ in range(2):
        assert fakes.run(["bash", "-c", setup], HOME=str(tmp_path)).returncode == 0
        fakes.add(tmp_path / "vitmed/bin/python")
    install = f"uv pip install --quiet --python {tmp_path}/vitmed/bin/python --constraint requirements.lock .[cuda12,medical,hub]"
    assert fakes.calls == [f"uv venv --quiet --python 3.11 {tmp_path}/vitmed", install, install]
    fakes.answer("uv pip *", 1)
    assert fakes.run(["bash", "-c", setup], HOME=str(tmp_path)).returncode == 1


def test_a_volume_is_mounted_where_no_bucket_is_named():
    task = yaml.safe_load(render(skypilot, "--storage=my-volume")["task.yaml"])
    assert task["volumes"] == {"/share": "my-volume"}
    assert list(task["file_mounts"]) == ["~/vitmed-manifest.json"]


def test_submitting_launches_each_task_and_finishing_waits_and_reports(called, tmp_path):
    options = options_of(skypilot, tasks=(0, 3))
    write(tmp_path, skypilot.render(MANIFEST, options))
    assert f"bash {tmp_path}/finish.sh" in skypilot.submit(tmp_path, options)
    assert called.calls == [
        f"sky jobs launch --yes --detach-run --name {NAME}-{task} --env VITMED_TASK={task} task.yaml" for task in (0, 3)
    ]
    called.answer(f"sky jobs logs *{NAME}-0", 101)
    called.answer(f"sky jobs logs *{NAME}-3", 100)
    done = called.run(["bash", str(tmp_path / "finish.sh")])
    assert done.returncode == 0
    assert "task 3 did not end well" in done.stderr
    logs = [f"sky jobs logs --name {NAME}-{task}" for task in (0, 0, 3)]
    assert called.calls[2:] == [QUEUE, logs[0], "sleep 60", *logs[1:], f"sky jobs launch --yes --name {NAME}-report report.yaml"]


def test_finishing_waits_for_what_was_submitted_before_too(fakes, tmp_path):
    write(tmp_path, render(skypilot, tasks=(3,)))
    names = [f"{NAME}-3", f"{NAME}-12", f"{NAME}-report", "study-4", f"my-{NAME}-5", None]
    fakes.answer(QUEUE, 0, json.dumps([{"job_name": name} for name in names]))
    assert fakes.run(["bash", str(tmp_path / "finish.sh")]).returncode == 0
    assert [call.rpartition("-")[2] for call in fakes.calls if " logs " in call] == ["3", "12"]


def test_no_report_is_begun_where_nobody_knows_what_runs(fakes, tmp_path):
    write(tmp_path, render(skypilot))
    fakes.answer(QUEUE, 1)
    assert fakes.run(["bash", str(tmp_path / "finish.sh")]).returncode == 1
    assert fakes.calls == [QUEUE]


def test_a_launch_that_is_refused_ends_submitting(called, tmp_path):
    options = options_of(skypilot)
    write(tmp_path, skypilot.render(MANIFEST, options))
    called.answer(f"sky *{NAME}-1 *", 4)
    with pytest.raises(config_lib.MachineError, match="exit status 4"):
        skypilot.submit(tmp_path, options)
    assert len(called.calls) == 2


def test_jobs_of_this_sweep_are_queued(called):
    names = [f"{NAME}-3", f"{NAME}-12", f"{NAME}-report", "study-4", f"my-{NAME}-5", None]
    called.answer(QUEUE, 0, json.dumps([{"job_name": name} for name in names]))
    assert skypilot.queued(options_of(skypilot)) == {3, 12}


# --- whoever will read the files ------------------------------------------------------------------------------------------------

VARIANTS = {
    "job": (kubernetes, ["--limit=2", "--node_selector=a.b/c=d"]),
    "jobset": (kubernetes, ["--kind=jobset", "--gpus=0"]),
    "together": (kubernetes, ["--kind=jobset", "--processes=4"]),
    "bucket": (skypilot, ["--spot", "--infra=gcp"]),
    "volume": (skypilot, ["--storage=my-volume", "--infra=k8s"]),
}


# What must be refused: a word that the files of a variant have, and what is put in its place.
SPOILT = [
    ("job", "podFailurePolicy", "podFailPolicy"),
    ("job", "action: FailIndex", "action: 3"),
    ("jobset", "dependsOn", "depends"),
    ("jobset", "backoffLimitPerIndex", "backoffPerIndex"),
    ("together", "maxRestarts: ", "maxRestarts: x"),
    ("bucket", "use_spot", "spot"),
    ("bucket", "recover_on_exit_codes", "recover_on_codes"),
    ("volume", "L4:1", "L4:one"),
]


def yaml_files(kind):
    files = render(VARIANTS[kind][0], *VARIANTS[kind][1])
    return {name: text for name, text in files.items() if name.endswith(".yaml")}


@needs_validators
def test_the_schemas_of_kubernetes_jobset_and_skypilot_accept_the_files_and_not_others():
    files = {f"{kind}/{name}": text for kind in VARIANTS for name, text in yaml_files(kind).items()}
    for number, (kind, word, other) in enumerate(SPOILT):
        spoilt = {f"{number}/{name}": text.replace(word, other) for name, text in yaml_files(kind).items() if word in text}
        assert spoilt, word
        files |= spoilt
    # All at once: to import SkyPilot alone takes seconds.
    command = [f"{VALIDATORS}/python", str(ROOT / "tests/validate_rendered.py")]
    done = subprocess.run(command, input=json.dumps(files), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    faults = done.stdout.splitlines()
    assert [fault for fault in faults if not fault[0].isdigit()] == []
    for number, what in enumerate(SPOILT):
        assert any(fault.startswith(f"{number}/") for fault in faults), f"{what} is accepted"


SCRIPTS = [("skypilot", "submit.sh"), ("skypilot", "finish.sh"), ("tpu", "sweep.sh"), ("tpu", "worker.sh")]


@pytest.mark.parametrize(("engine", "name"), SCRIPTS)
def test_shellcheck_has_nothing_to_say(engine, name):
    command = shutil.which("shellcheck") or (f"{VALIDATORS}/shellcheck" if VALIDATORS else None)
    if command is None:
        pytest.skip("there is no shellcheck; it is a package of most distributions")
    script = render({"skypilot": skypilot, "tpu": tpu}[engine])[name]
    done = subprocess.run([command, "--shell=bash", "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@needs_validators
def test_hadolint_has_nothing_to_say_against_the_dockerfile():
    done = subprocess.run([f"{VALIDATORS}/hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
