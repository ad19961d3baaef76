"""The scripts of launch/tpu.py among fake commands: what they do when a TPU is taken away, input is wrong or a signal comes."""

import os
import pathlib
import re
import signal
import tarfile
import threading
import time

import pytest
from fake_commands import Fakes, options_of, render, write

from launch import launchers, tpu
from vitmed import config as config_lib

NAME = launchers.sweep_name("/share/runs/study")
NOT_FOUND = "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource 'study' was not found."
DESCRIBE, CREATE, DELETE = (f"gcloud compute tpus queued-resources {verb} {NAME} *" for verb in ("describe", "create", "delete"))
SETUP, RUN, REPORT = (f"gcloud compute tpus tpu-vm ssh {NAME} *bash worker.sh {what}" for what in ("setup", "run", "report"))
WORDS = {"describe": "state", "create": "create", "delete": "delete", "scp": "copy", "setup": "setup", "run": "run", "report": "report"}


@pytest.fixture
def fakes(tmp_path):
    """Fake commands; worker.sh's python is one of them."""
    fakes = Fakes(tmp_path / "fakes", "gcloud", "sleep", "sudo", "mountpoint", "uv")
    fakes.add(tmp_path / "vitmed-env/bin/python")
    return fakes


def steps(fakes):
    """The calls in a word each."""
    found = [re.search(r"queued-resources (\w+)|tpu-vm (scp)|worker.sh (\w+)", call) for call in fakes.calls if call.startswith("gcloud")]
    return " ".join(WORDS[next(filter(None, match.groups()))] for match in found)


def sweep_script(fakes, tmp_path, *flags):
    write(tmp_path, render(tpu, *flags))
    return fakes.run(["bash", str(tmp_path / "sweep.sh")])


def states(fakes, *names):
    for name in names:
        fakes.answer(DESCRIBE, *((1, NOT_FOUND) if name == "ABSENT" else (0, name)))


def test_a_sweep_gets_a_tpu_runs_reports_and_gives_it_back(fakes, tmp_path):
    states(fakes, "ABSENT", "WAITING_FOR_RESOURCES", "ACTIVE")
    done = sweep_script(fakes, tmp_path, "--spot", "--accelerator_type=v6e-16")
    assert done.returncode == 0, done.stderr
    assert steps(fakes) == "state create state state copy setup run report delete"
    create = next(call for call in fakes.calls if " create " in call)
    assert create.endswith("--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot --async")
    assert "--worker=all --command=bash worker.sh run" in " ".join(fakes.calls)
    assert "--worker=0 --command=bash worker.sh report" in " ".join(fakes.calls)
    with tarfile.open(tmp_path / "vitmed.tgz") as archive:
        names = archive.getnames()
    assert {"launch/task.py", "vitmed/main.py", "configs/vit2d.py", "requirements.lock"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.parametrize("status", [75, 255, 1])
def test_a_tpu_that_was_taken_away_is_replaced_and_the_sweep_goes_on(fakes, tmp_path, status):
    states(fakes, "ACTIVE", "ABSENT", "SUSPENDED", "ABSENT", "ACTIVE")
    fakes.answer(RUN, status)
    done = sweep_script(fakes, tmp_path)
    assert done.returncode == 0, done.stderr
    again = "delete state create state delete state create state copy setup run report delete"
    assert steps(fakes) == f"state copy setup run {again}"


def test_a_worker_that_cannot_be_set_up_gets_another_tpu(fakes, tmp_path):
    states(fakes, "ACTIVE", "ABSENT", "ACTIVE")
    fakes.answer(SETUP, 1)
    assert sweep_script(fakes, tmp_path).returncode == 0
    assert steps(fakes) == "state copy setup delete state create state copy setup run report delete"


def test_wrong_input_stops_and_gives_the_tpu_back(fakes, tmp_path):
    states(fakes, "ACTIVE")
    fakes.answer(RUN, 12)
    assert sweep_script(fakes, tmp_path).returncode == 2
    assert steps(fakes) == "state copy setup run delete"


@pytest.mark.parametrize(("of_run", "of_report"), [(11, 0), (0, 1)])
def test_failed_points_are_in_the_report_and_in_the_exit_status(fakes, tmp_path, of_run, of_report):
    states(fakes, "ACTIVE")
    fakes.answer(RUN, of_run)
    fakes.answer(REPORT, of_report)
    done = sweep_script(fakes, tmp_path)
    assert (done.returncode, steps(fakes)) == (1, "state copy setup run report delete")
    assert "points have failed" in done.stderr


def test_it_gives_up_after_so_many_tpus(fakes, tmp_path):
    fakes.answer(DESCRIBE, "*1", NOT_FOUND)
    done = sweep_script(fakes, tmp_path, "--attempts=2")
    assert (done.returncode, steps(fakes)) == (75, "state create state create state delete")
    assert "gave up after 2 attempts" in done.stderr


def test_a_request_that_is_refused_ends_the_sweep(fakes, tmp_path):
    states(fakes, "ABSENT")
    fakes.answer(CREATE, 1)
    assert sweep_script(fakes, tmp_path).returncode == 1
    assert steps(fakes) == "state create delete"


def test_a_request_is_kept_while_gcloud_does_not_say_how_it_stands(fakes, tmp_path):
    fakes.answer(DESCRIBE, 1, "ERROR: (gcloud) PERMISSION_DENIED: log in")
    fakes.answer(DESCRIBE, 1)
    states(fakes, "WAITING_FOR_RESOURCES", "ACTIVE")
    done = sweep_script(fakes, tmp_path)
    assert done.returncode == 0, done.stderr
    assert steps(fakes) == "state state state state copy setup run report delete"
    assert "1 of 20 times: ERROR: (gcloud) PERMISSION_DENIED: log in" in done.stderr


def test_it_gives_up_where_gcloud_never_says_how_the_request_stands(fakes, tmp_path):
    fakes.answer(DESCRIBE, "*1", "ERROR: (gcloud) UNAVAILABLE: try again")
    done = sweep_script(fakes, tmp_path)
    assert (done.returncode, steps(fakes)) == (75, "state " * 20 + "delete")


def signal_when(fakes, *signals):
    """Send this process each signal once a call has words: (signal, words)."""

    def send():
        for signum, words in signals:
            end = time.monotonic() + 30
            while not any(words in call for call in fakes.calls) and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(0.2)
            os.kill(os.getpid(), signum)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_a_signal_gives_the_tpu_back(fakes, tmp_path, monkeypatch):
    for name in ("PATH", "FAKES"):
        monkeypatch.setenv(name, fakes.environment()[name])
    states(fakes, "ACTIVE")
    fakes.answer(RUN, "hang")
    fakes.answer(DELETE, "slow")
    write(tmp_path, render(tpu))
    # The second comes while the TPU is deleted.
    sender = signal_when(fakes, (signal.SIGTERM, "worker.sh run"), (signal.SIGINT, " delete "))
    begun = time.monotonic()
    with pytest.raises(config_lib.Stopped):
        tpu.submit(tmp_path, options_of(tpu))
    sender.join()
    assert time.monotonic() - begun < 30
    assert fakes.calls[-1].endswith("ended")
    assert [call.split()[4] for call in fakes.calls[-2:]] == ["delete", "delete"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_script_does_not_end_the_deletion(fakes, tmp_path, signum):
    states(fakes, "ACTIVE")
    fakes.answer(DELETE, "slow")
    write(tmp_path, render(tpu))
    process = fakes.start(["bash", str(tmp_path / "sweep.sh")])
    while not any(" delete " in call for call in fakes.calls):
        time.sleep(0.05)
    os.killpg(process.pid, signum)
    assert process.wait(30) == 0
    assert fakes.calls[-1].endswith("ended")


def test_only_the_first_signal_is_passed_on(tmp_path):
    said, me = tmp_path / "said", os.getpid()
    lines = [f"trap 'echo signal >> {said}' TERM", *(f"kill -TERM {me}; sleep 0.3; true" for _ in range(3))]
    (tmp_path / "script.sh").write_text("\n".join(lines) + "\n")
    with pytest.raises(config_lib.Stopped):
        launchers.run_script(tmp_path / "script.sh")
    assert said.read_text() == "signal\n"


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """As under nohup."""
    (tmp_path / "script.sh").write_text(f"kill -HUP {os.getpid()}; sleep 0.3\n")
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launchers.run_script(tmp_path / "script.sh")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_two_commands_do_not_share_a_tpu(fakes, monkeypatch):
    for name in ("PATH", "FAKES"):
        monkeypatch.setenv(name, fakes.environment()[name])
    fakes.answer("*queued-resources list *", 0, launchers.sweep_name("/share/other/study"))
    tpu.require(options_of(tpu))
    fakes.answer("*queued-resources list *", 0, NAME)
    with pytest.raises(config_lib.InputError, match=f"its TPU {NAME} is there already"):
        tpu.require(options_of(tpu))


# --- on the workers -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(fakes, tmp_path):
    """A function that runs worker.sh, whose share is a folder of this machine."""
    share = tmp_path / "share"
    share.mkdir()
    write(tmp_path, render(tpu, f"--mount={share}", workdir=f"{share}/runs/study"))
    with tarfile.open(tmp_path / "vitmed.tgz", "w:gz") as archive:
        archive.add(tmp_path / "worker.sh", "launch/task.py")
    return lambda what: fakes.run(["bash", str(tmp_path / "worker.sh"), what], HOME=str(tmp_path))


def test_a_worker_mounts_the_share_and_installs_the_locked_versions(worker, fakes, tmp_path):
    fakes.answer("mountpoint *", 1)
    done = worker("setup")
    assert done.returncode == 0, done.stderr
    assert f"sudo mount -t nfs 10.0.0.2:/vitmed {tmp_path}/share" in fakes.calls
    install = f"uv pip install --quiet --python {tmp_path}/vitmed-env/bin/python --constraint requirements.lock .[tpu,medical,hub]"
    assert fakes.calls[-1] == install
    assert (tmp_path / "vitmed-checkout/launch/task.py").exists()
    calls = len(fakes.calls)
    assert worker("setup").returncode == 0
    assert [call.split()[0] for call in fakes.calls[calls:]] == ["mountpoint", "uv"], "what is there is not done again"


@pytest.mark.parametrize(
    ("statuses", "expected", "ran"),
    [((0, 0, 0), 0, "013"), ((1, 0, 0), 11, "013"), ((0, 2), 12, "01"), ((1, 75), 75, "01"), ((137,), 137, "0")],
)
def test_a_worker_runs_the_tasks_in_order_and_says_how_they_ended(worker, fakes, tmp_path, statuses, expected, ran):
    worker("setup")
    for status in statuses:
        fakes.answer("python *", status, "a line of a task")
    assert worker("run").returncode == expected
    tasks = [call for call in fakes.calls if call.startswith("python")]
    workdir = tmp_path / "share/runs/study"
    assert tasks == [f"python -m launch.task --manifest={tmp_path}/manifest.json --workdir={workdir} --task={task}" for task in ran]
    (log,) = (workdir / "launch/tpu").glob("*.log")
    assert log.read_text().count("a line of a task") == len(ran)


def test_a_second_call_waits_for_the_first(worker, fakes, tmp_path):
    """gcloud gives a command again whose connection broke."""
    worker("setup")
    fakes.answer("python *--task=0", "stop")
    first = fakes.start(["bash", str(tmp_path / "worker.sh"), "run"], HOME=str(tmp_path))
    while not any("--task=0" in call for call in fakes.calls):
        time.sleep(0.05)
    second = fakes.start(["bash", str(tmp_path / "worker.sh"), "run"], HOME=str(tmp_path))
    time.sleep(0.5)
    assert sum("--task" in call for call in fakes.calls) == 1
    os.killpg(first.pid, signal.SIGTERM)
    assert second.wait(30) == 0
    assert first.wait(30) != 0
    assert [call[-1] for call in fakes.calls if call.endswith(("0", "1", "3")) and "--task=" in call] == ["0", "0", "1", "3"]


def test_the_report_is_made_in_the_checkout(worker, fakes, tmp_path):
    worker("setup")
    assert worker("report").returncode == 0
    workdir = tmp_path / "share/runs/study"
    assert fakes.calls[-1] == f"python -m vitmed.report --workdir={workdir} --out={workdir}/report"


def test_a_share_that_cannot_be_written_stops_the_sweep(worker, fakes, tmp_path):
    pathlib.Path(tmp_path / "share/runs").touch()
    done = worker("setup")
    assert done.returncode == 12
    assert "cannot write to" in done.stderr


def test_a_folders_name_stays_one_word_of_the_scripts():
    files = render(tpu, workdir="/share/runs/my study")
    assert "WORKDIR='/share/runs/my study'\n" in files["worker.sh"]
    assert re.search(r"^NAME=my-study-[0-9a-f]{6}$", files["sweep.sh"], re.MULTILINE)
    with pytest.raises(config_lib.InputError, match="--workdir="):
        render(tpu, workdir="/share/runs/$HOME")
