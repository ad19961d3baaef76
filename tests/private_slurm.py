"""A SLURM of one node for a test: its own munge key, ports, folders and daemons, as root and without systemd."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "sinfo")
CONF = """
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=short Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=long Nodes=ALL MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why there can be no private SLURM here; None where there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed; apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "a private SLURM runs its jobs as root, and these tests run as another user"


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)


@contextlib.contextmanager
def running(folder: pathlib.Path):
    """The environment of a SLURM whose node is idle, for as long as the context lasts; `folder` is short and root's own."""
    folder.chmod(0o700)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname().partition(".")[0], folder=folder, ports=_free_ports(2)))
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    munge = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in ("pid-file", "log-file", "seed-file", "socket")]
    daemons = []
    logs = [open(folder / f"{name}.out", "wb") for name in ("munged", "slurmctld", "slurmd")]  # noqa: SIM115
    try:
        for command, log in zip(
            (["munged", "--foreground", "--force", f"--key-file={key}", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]), logs, strict=True
        ):
            program = shutil.which(command[0], path=environment["PATH"])
            daemons.append(subprocess.Popen([program, *command[1:]], env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
            if command[0] == "munged":
                _wait((folder / "munge.socket").exists, 20, "munged gives no socket")
        sinfo = ["sinfo", "--noheader", "--format=%T"]

        def idle() -> bool:
            asked = subprocess.run(sinfo, env=environment, capture_output=True, text=True, check=False)
            return "idle" in asked.stdout

        _wait(idle, 60, f"the node does not become idle; see {folder}/*.log")
        yield environment
    finally:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True, timeout=20, check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        _kill_all_of(conf)
        for log in logs:
            log.close()


def _kill_all_of(conf: pathlib.Path) -> None:
    """Kill what the daemons have started and left: it is known by its environment."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if f"SLURM_CONF={conf}".encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
