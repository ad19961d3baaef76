"""Several processes that make one run: what the environment says of them, and two real ones that train, die, and go on."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from vitmed import config
from vitmed.runs import cluster, guard, processes

ROOT = pathlib.Path(__file__).parent.parent
HEARTBEAT_SECONDS = 10
LONGEST_SECONDS = 400  # for two processes to end by themselves
# Parameters and moments lie in both processes, examples are read by the one that feeds them, and every chunk is followed by a checkpoint.
SPREAD = {
    "model.variant": "vit_mini",
    "train.epochs": "6",
    "train.batch_size": "100",
    "train.checkpoint_seconds": "0",
    "seeds": "0,1",
    "mesh.data": "1",
    "mesh.fsdp": "2",
    "data.placement": "host",
}
KEPT = ("config.json", "model.json", "metrics.jsonl", "predictions/val.npz", "predictions/test.npz", "weights/seed1.safetensors")

SRUN = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NODELIST": "node[07-09,12]",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
MPIRUN_5 = {name: value for name, value in MPIRUN.items() if "uri" not in name}
INDEXED_JOB = {"VITMED_COORDINATOR": "job-0.svc:9999", "VITMED_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}


@pytest.mark.parametrize(
    ("environ", "flags", "expected"),
    [
        ({}, {}, None),
        (SRUN, {}, ("node07:61809", 8, 5, (1,))),
        (SRUN | {"SLURM_STEP_NODELIST": "a1,a2"}, {}, ("a1:61809", 8, 5, (1,))),
        (SRUN | {"CUDA_VISIBLE_DEVICES": "0"}, {}, ("node07:61809", 8, 5, None)),  # the task is shown its own GPU alone
        (SRUN | {"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_PER_TASK": "2"}, {}, ("node07:61809", 8, 5, None)),
        (SRUN | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, {}, ("node07:61809", 8, 5, (2, 3))),
        (SRUN | {"VITMED_COORDINATOR": "other:1"}, {}, ("other:1", 8, 5, (1,))),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0"}, {}, ("node07:61809", 8, 5, None)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {}, None),  # a sweep's task, one of many
        ({name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}, {}, None),  # a batch script
        (MPIRUN, {}, ("10.96.0.1:62624", 4, 3, (1,))),
        (MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, {}, None),
        (MPIRUN_5 | {"VITMED_COORDINATOR": "h:1"}, {}, ("h:1", 4, 3, (1,))),
        (INDEXED_JOB, {}, ("job-0.svc:9999", 4, 2, None)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}, {}, None),  # a pod of a sweep
        (SRUN, {"coordinator": "h:1", "num_processes": "2", "process_id": "1"}, ("h:1", 2, 1, None)),
        ({}, {"coordinator": "h:1", "num_processes": "1", "process_id": "0"}, None),
    ],
)
def test_the_processes_of_a_run_are_found(environ, flags, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "NVIDIA", tmp_path)
    for number in range(2):
        (tmp_path / f"nvidia{number}").touch()
    found = cluster.detect(environ, **flags)
    assert (found and found[:4]) == expected


@pytest.mark.parametrize(
    ("environ", "flags", "words"),
    [
        ({}, {"num_processes": "2"}, "coordinator=, num_processes=2.*all three"),
        ({}, {"coordinator": "h", "num_processes": "2", "process_id": "0"}, "coordinator=h,.*HOST:PORT"),
        ({}, {"coordinator": "h:1", "num_processes": "2", "process_id": "2"}, "process_id=2.*from 0"),
        ({}, {"coordinator": "h:1", "num_processes": "two", "process_id": "0"}, "num_processes=two"),
        ({"VITMED_COORDINATOR": "h:1"}, {}, "all three"),
        (MPIRUN_5, {}, "VITMED_COORDINATOR"),
        (MPIRUN_5, {"coordinator": "h"}, "coordinator=h: must be HOST:PORT"),
    ],
)
def test_processes_that_cannot_be_are_refused(environ, flags, words):
    with pytest.raises(config.InputError, match=words):
        cluster.detect(environ, **flags)


@pytest.mark.parametrize(
    ("environ", "metadata", "expected"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, {}, ("a:8476", 2, 1, None)),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}, {}, None),
        ({}, {"worker-network-endpoints": "x:0:10.0.0.2,y:1:10.0.0.3", "agent-worker-number": "1"}, ("10.0.0.2:8476", 2, 1, None)),
        ({}, {"worker-network-endpoints": "10.0.0.2", "agent-worker-number": "0"}, None),
        ({}, {}, None),  # a notebook's TPU
        ({"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, {}, None),
        ({"JAX_PLATFORMS": "tpu,cpu", "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, {}, ("a:8476", 2, 1, None)),
    ],
)
def test_the_hosts_of_a_tpu_are_found(environ, metadata, expected, tmp_path, monkeypatch):
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(cluster, "CHIPS", tmp_path)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(cluster, "_metadata", lambda name: metadata.get(name, ""))
    found = cluster.detect(environ)
    assert (found and found[:4]) == expected


def test_a_signal_to_one_process_stops_all_at_the_same_place(monkeypatch):
    monkeypatch.setattr(processes, "_all", lambda number: [number, signal.SIGTERM])
    with pytest.raises(config.Stopped) as caught:
        guard.Signals().check()
    assert caught.value.signum == signal.SIGTERM


# --- two real processes ---------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


class Pair:
    """Two processes of one run, each with one device, started together; their words in files."""

    def __init__(self, workdir, log, *, config="configs/quickstart.py:patch=14", extra=(), **overrides):
        self._logs = [log.with_name(f"{log.name}-{index}") for index in range(2)]
        flags = [f"--config.{field}={value}" for field, value in (SPREAD | overrides).items() if value is not None]
        meeting = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
        command = [sys.executable, "-W", "error", "-m", "vitmed.main", f"--config={config}", f"--workdir={workdir}", *extra]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "VITMED_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS)}
        self.processes = []
        for index, path in enumerate(self._logs):
            with path.open("w") as file:
                argv = [*command, *flags, *meeting, f"--process_id={index}"]
                self.processes.append(subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=file, stderr=file))

    def wait(self):
        """Their exit statuses, and what each said of itself in a line."""
        try:
            statuses = [process.wait(LONGEST_SECONDS) for process in self.processes]
        finally:
            for process in self.processes:
                for pid in (*self.children(process), process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()
        said = [path.read_text() for path in self._logs]
        assert all("Traceback" not in words for words in said), said
        return statuses, [[line for line in words.splitlines() if line.startswith("vitmed: ")] for words in said]

    @staticmethod
    def children(process):
        with contextlib.suppress(OSError):
            return [int(pid) for pid in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        return []

    def take_away(self, index, signum=signal.SIGKILL):
        """End a process as the loss of its machine would: with what watches it, which can tell nobody."""
        pids = [*self.children(self.processes[index]), self.processes[index].pid]
        for pid in pids if signum == signal.SIGSTOP else reversed(pids):
            os.kill(pid, signum)


def wait_for_epochs(workdir, number):
    deadline = time.monotonic() + LONGEST_SECONDS
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < number:
        assert time.monotonic() < deadline, f"no {number} epochs in {LONGEST_SECONDS} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run by one process with two devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    flags = [f"--config.{field}={value}" for field, value in SPREAD.items()]
    command = [sys.executable, "-m", "vitmed.main", "--config=configs/quickstart.py:patch=14", f"--workdir={workdir}", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return workdir


def test_two_processes_one_killed_then_one_stopped_give_what_one_process_gives(alone, tmp_path):
    workdir = tmp_path / "run"
    pair = Pair(workdir, tmp_path / "killed")
    wait_for_epochs(workdir, 2)
    pair.take_away(1)
    statuses, said = pair.wait()
    assert statuses == [75, -signal.SIGKILL]
    assert len(said[0]) == 1
    assert "process 0 of 2" in said[0][0]
    assert processes.LOST_TEXT in said[0][0]
    assert not (workdir / "result.json").exists()

    pair = Pair(workdir, tmp_path / "stopped")
    wait_for_epochs(workdir, 4)
    pair.processes[1].terminate()  # as a cluster tells one machine first
    statuses, said = pair.wait()
    assert statuses == [75, 75]
    assert len(said[0]) == 0
    assert not (workdir / "result.json").exists()

    statuses, _ = Pair(workdir, tmp_path / "finished").wait()
    assert statuses == [0, 0]
    for name in KEPT:
        assert (workdir / name).read_bytes() == (alone / name).read_bytes(), name
    found, expected = (json.loads((path / "result.json").read_text()) for path in (workdir, alone))
    assert [found[name] for name in ("test", "val", "best_epoch", "device")] == [
        expected[name] for name in ("test", "val", "best_epoch", "device")
    ]
    assert sorted(path.name for path in workdir.rglob("*") if path.is_file() and "checkpoints" not in path.parts) == sorted(
        path.name for path in alone.rglob("*") if path.is_file() and "checkpoints" not in path.parts
    )


def test_a_finished_run_is_shown_and_a_batch_that_one_process_alone_can_take_is_refused(alone, tmp_path):
    statuses, said = Pair(alone, tmp_path / "shown").wait()
    assert statuses == [0, 0]
    assert said == [[], []]
    refused = {"mesh.data": "-1", "mesh.fsdp": "1", "train.batch_size": "25"}
    statuses, said = Pair(tmp_path / "refused", tmp_path / "log", **refused).wait()
    assert statuses == [2, 2]
    assert "mesh.data=1" in said[0][0]
    assert "1 of the 2 processes" in said[0][0]
    assert said[1] == []  # it is said once
    assert not (tmp_path / "refused").exists()


def together(tmp_path, code):
    """Exit statuses and words of two processes that run the same lines, with `me` 0 and 1."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\nfrom vitmed import cli, config\nfrom vitmed.runs import cluster, processes\nme = int(sys.argv[1])\n"
        f"found = cluster.detect({{}}, coordinator='localhost:{free_port()}', num_processes='2', process_id=str(me))\n"
        f"def work():\n    {code}\n"
        "def main(argv):\n    with processes.together(found):\n        work()\n    return 0\n"
        "processes.leave(cli.run_cli(main, []))\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "VITMED_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS), "PYTHONPATH": str(ROOT)}
    pair = [
        subprocess.Popen([sys.executable, script, str(me)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for me in range(2)
    ]
    said = [process.communicate(timeout=LONGEST_SECONDS)[1] for process in pair]
    return [process.returncode for process in pair], said


@pytest.mark.parametrize(
    ("code", "statuses", "speaker"),
    [
        ("time.sleep(me); processes.by_main(lambda: 1 / 0 if me else config.require(False, 'x', 1, 'two'))", [2, 2], 0),
        ("processes.by_all(lambda: config.require(me == 0, 'x', 1, 'two')) if not time.sleep(1 - me) else None", [2, 2], 1),
        ("processes.same('data', str(me)) if not time.sleep(me) else None", [2, 2], 1),
    ],
)
def test_an_error_ends_all_processes_and_is_said_once(tmp_path, code, statuses, speaker):
    """However late one of them comes to it: nobody takes the others for lost."""
    found, said = together(tmp_path, code)
    assert found == statuses, said
    assert "vitmed: " in said[speaker]
    assert "vitmed: " not in said[1 - speaker]


@pytest.mark.slow
def test_a_process_that_gives_no_sign_of_life_ends_the_others(tmp_path):
    workdir = tmp_path / "run"
    pair = Pair(workdir, tmp_path / "log")
    wait_for_epochs(workdir, 1)
    started = time.monotonic()
    pair.take_away(1, signal.SIGSTOP)
    assert pair.processes[0].wait(LONGEST_SECONDS) == 75
    assert time.monotonic() - started < 4 * HEARTBEAT_SECONDS
    pair.take_away(1)
    _, said = pair.wait()
    assert processes.LOST_TEXT in said[0][-1]
    assert len(said[0]) == 1


@pytest.mark.slow
def test_a_folder_in_use_is_refused_in_all_processes(alone, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with guard.lock(workdir):
        statuses, said = Pair(workdir, tmp_path / "log").wait()
    assert statuses == [1, 1]
    assert "in use" in said[0][-1]
    assert said[1] == []


@pytest.mark.parametrize(
    ("seconds", "status", "words"), [("2", 75, processes.LOST_TEXT), ("soon", 2, "VITMED_JOINING_SECONDS=soon: must be")]
)
def test_a_process_that_nobody_joins_ends(tmp_path, seconds, status, words):
    command = [sys.executable, "-m", "vitmed.main", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    command += [f"--coordinator=localhost:{free_port()}", "--num_processes=2", "--process_id=1"]
    environment = os.environ | {"VITMED_JOINING_SECONDS": seconds}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sweep_of_two_processes_goes_through_its_points_together_past_one_that_fails(tmp_path):
    (tmp_path / "own.py").write_text(
        "from vitmed import config as config_lib\n"
        "def get_config(arg=''):\n"
        "    config = config_lib.from_file('configs/quickstart.py', arg)\n"
        "    config.train.batch_size = 25 if arg == 'patch=28' else 100\n"  # one process alone can take 25
        "    return config\n"
        "def sweep():\n    return [{'patch': '28'}, {'patch': '14'}]\n"
    )
    root = tmp_path / "root"
    overrides = {"train.epochs": "1", "model.variant": "vit_micro", "mesh.fsdp": "1", "mesh.data": "-1", "train.batch_size": None}
    pair = Pair(root, tmp_path / "log", config=f"{tmp_path / 'own.py'}", extra=["--sweep"], **overrides)
    statuses, said = pair.wait()
    assert statuses == [1, 1], said
    assert "1 of the 2 processes" in json.loads((root / "patch28/failure.json").read_text())["said"]
    assert json.loads((root / "patch14/result.json").read_text())["device"].endswith("x 2")
    assert [path.parent.name for path in root.rglob("failure.json")] == ["patch28"]
