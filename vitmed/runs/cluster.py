"""Which processes make one run, as flags, SLURM, Open MPI, Kubernetes or a TPU tell: read from the environment, nothing is touched."""

import importlib.util
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

from vitmed import config

PORTS = range(61440, 65536)
FIRST_HOST = re.compile(r"([^,\[]+)(?:\[(\d+))?")  # of SLURM's lists: node1,node2 or node[01-04,07]
OPEN_MPI_HOST = re.compile(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)")
ASKED = "asked for"  # the source of a cluster that flags or variables of ours name
FLAGS = ("coordinator", "num_processes", "process_id")  # and as variables: VITMED_COORDINATOR ...


class Cluster(NamedTuple):
    """The processes of a run: where they meet (HOST:PORT), how many, which is this one, its devices (None: all), who says so.

    On a TPU all but the last are None: JAX asks the machine.
    """

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    local_devices: tuple[int, ...] | None
    source: str

    def __str__(self) -> str:
        return "a process" if self.num_processes is None else f"process {self.process_id} of {self.num_processes} ({self.source})"


def detect(environ: Mapping[str, str], **flags: str | None) -> Cluster | None:
    """The cluster that the flags (coordinator, num_processes, process_id) or the environment speak of; None for a process on its own.

    Looked for in this order: flags; $VITMED_COORDINATOR, $VITMED_NUM_PROCESSES and $VITMED_PROCESS_ID (in an Indexed Job of Kubernetes
    $JOB_COMPLETION_INDEX); SLURM's srun; Open MPI's mpirun; a TPU. InputError where they make no sense.
    """
    asked = {name: flags.get(name) or environ.get(f"VITMED_{name.upper()}", "") for name in FLAGS}
    if any(asked.values()):
        asked["process_id"] = asked["process_id"] or environ.get("JOB_COMPLETION_INDEX", "")
        return _asked_for(**asked)
    for found in (_slurm(environ), _open_mpi(environ)):
        if found is not None and found.num_processes > 1:
            return found
    return Cluster(None, None, None, None, "TPU") if _on_tpu(environ) else None


def flags(cluster: Cluster | None) -> list[str]:
    """The flags that tell another process of this one's place; none where the environment does."""
    if cluster is None or cluster.source != ASKED:
        return []
    return [f"--{name}={getattr(cluster, name)}" for name in FLAGS]


def _asked_for(*, coordinator: str, num_processes: str, process_id: str) -> Cluster | None:
    given = f"coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}"
    numbers = [int(text) if text.isascii() and text.isdecimal() else -1 for text in (num_processes, process_id)]
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= numbers[1] < numbers[0]:
        form = "a HOST:PORT of process 0, the number of processes, and which of them this is, from 0"
        raise config.InputError(f"{given}: must be all three: {form} (--coordinator=node1:12345 --num_processes=2 --process_id=0)")
    return Cluster(coordinator, *numbers, None, ASKED) if numbers[0] > 1 else None


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    """The first of the variables that holds a number."""
    return next((int(environ[name]) for name in names if environ.get(name, "").isdecimal()), None)


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    """A task of srun; a batch script itself is none."""
    nodes = FIRST_HOST.match(environ.get("SLURM_STEP_NODELIST", ""))
    job, process, local = (_number(environ, f"SLURM_{name}") for name in ("JOB_ID", "PROCID", "LOCALID"))
    count = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if nodes is None or None in (job, process, local, count):
        return None
    coordinator = f"{nodes[1]}{nodes[2] or ''}:{PORTS[job % len(PORTS)]}"
    return Cluster(coordinator, count, process, _of_task(environ, local, _tasks_here(environ)), "SLURM")


def _tasks_here(environ: Mapping[str, str]) -> int:
    """How many tasks of a SLURM step run on this node: its entry of a list such as 2(x3),1."""
    entries = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    by_node = [int(tasks) for tasks, nodes in entries for _ in range(int(nodes or 1))]
    node = _number(environ, "SLURM_NODEID") or 0
    return by_node[node] if node < len(by_node) else 1


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    """A rank of mpirun; InputError where it does not say where they meet (Open MPI 5)."""
    count, process, local, here = (_number(environ, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))
    if None in (count, process):
        return None
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    host = OPEN_MPI_HOST.search(uri)
    if host is None and count > 1:
        raise config.InputError("this mpirun does not say on which host it runs; set VITMED_COORDINATOR=HOST:PORT of rank 0 (mpirun -x)")
    job = int(re.match(r"\d*", uri).group() or 0) // 2**12  # Open MPI numbers its jobs in such steps
    coordinator = f"{(host[1] or host[2]) if host else 'localhost'}:{PORTS[job % len(PORTS)]}"
    return Cluster(coordinator, count, process, _of_task(environ, local or 0, here or 1), "Open MPI")


def _of_task(environ: Mapping[str, str], local: int, tasks: int) -> tuple[int, ...] | None:
    """The GPU of a task that shares a node with others: its own of the visible ones, unless each is shown only its own."""
    visible = [gpu for gpu in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return None if tasks <= 1 or (visible and len(visible) < tasks) else (local,)


def _on_tpu(environ: Mapping[str, str]) -> bool:
    chips = any(pathlib.Path("/dev").glob(pattern) for pattern in ("accel[0-9]*", "vfio/[0-9]*"))
    return chips and environ.get("JAX_PLATFORMS", "tpu") == "tpu" and importlib.util.find_spec("libtpu") is not None
