"""Which processes make one run, as flags, SLURM, Open MPI, Kubernetes or a TPU tell: read from the environment, nothing is touched."""

import importlib.util
import pathlib
import re
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

from vitmed import config

NVIDIA = CHIPS = pathlib.Path("/dev")
TPU_PORT = 8476
METADATA, METADATA_SECONDS = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/", 2.0
PORTS = range(61440, 65536)
ADDRESS = re.compile(r".+:\d+")
FIRST_HOST = re.compile(r"([^,\[]+)(?:\[(\d+))?")  # of SLURM's lists: node1,node2 or node[01-04,07]
OPEN_MPI_HOST = re.compile(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)")
ASKED = "asked for"  # the source of a cluster that flags or variables of ours name
FLAGS = ("coordinator", "num_processes", "process_id")  # and as variables: VITMED_COORDINATOR ...


class Cluster(NamedTuple):
    """The processes of a run: where they meet (HOST:PORT), how many, which is this one, its devices (None: all), who says so."""

    coordinator: str
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None
    source: str

    def __str__(self) -> str:
        return f"process {self.process_id} of {self.num_processes} ({self.source})"


def detect(environ: Mapping[str, str], **flags: str | None) -> Cluster | None:
    """The cluster that the flags (coordinator, num_processes, process_id) or the environment speak of; None for a process on its own.

    Looked for in this order: flags; $VITMED_COORDINATOR, $VITMED_NUM_PROCESSES and $VITMED_PROCESS_ID (in an Indexed Job of Kubernetes
    $JOB_COMPLETION_INDEX); SLURM's srun; Open MPI's mpirun; a TPU of several hosts. Of the first two a coordinator alone completes what
    the others say. InputError where they make no sense.
    """
    asked = {name: flags.get(name) or environ.get(f"VITMED_{name.upper()}", "") for name in FLAGS}
    coordinator = asked["coordinator"]
    if asked["num_processes"] or asked["process_id"]:
        asked["process_id"] = asked["process_id"] or environ.get("JOB_COMPLETION_INDEX", "")
        return _asked_for(**asked)
    for found in (_slurm(environ), _open_mpi(environ, coordinator), _tpu(environ)):
        if found is not None and found.num_processes > 1:
            return found._replace(coordinator=_address(coordinator)) if coordinator else found
    return _asked_for(**asked) if coordinator else None


def flags(cluster: Cluster | None) -> list[str]:
    """The flags that tell another process of this one's place; none where the environment does."""
    if cluster is None or cluster.source != ASKED:
        return []
    return [f"--{name}={getattr(cluster, name)}" for name in FLAGS]


def _asked_for(*, coordinator: str, num_processes: str, process_id: str) -> Cluster | None:
    given = f"coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}"
    numbers = [int(text) if text.isascii() and text.isdecimal() else -1 for text in (num_processes, process_id)]
    if not ADDRESS.fullmatch(coordinator) or not 0 <= numbers[1] < numbers[0]:
        form = "a HOST:PORT of process 0, the number of processes, and which of them this is, from 0"
        raise config.InputError(f"{given}: must be all three: {form} (--coordinator=node1:12345 --num_processes=2 --process_id=0)")
    return Cluster(coordinator, *numbers, None, ASKED) if numbers[0] > 1 else None


def _address(coordinator: str) -> str:
    """HOST:PORT; InputError where it is none."""
    config.require(bool(ADDRESS.fullmatch(coordinator)), "coordinator", coordinator, "HOST:PORT of process 0, such as node1:12345")
    return coordinator


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


def _open_mpi(environ: Mapping[str, str], coordinator: str) -> Cluster | None:
    """A rank of mpirun; InputError where neither it (Open MPI 5) nor `coordinator` says where they meet."""
    count, process, local, here = (_number(environ, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))
    if None in (count, process):
        return None
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    host = OPEN_MPI_HOST.search(uri)
    if host is None and count > 1 and not coordinator:
        raise config.InputError("this mpirun does not say on which host it runs; set VITMED_COORDINATOR=HOST:PORT of rank 0 (mpirun -x)")
    job = int(re.match(r"\d*", uri).group() or 0) // 2**12  # Open MPI numbers its jobs in such steps
    address = coordinator or f"{(host[1] or host[2]) if host else 'localhost'}:{PORTS[job % len(PORTS)]}"
    return Cluster(address, count, process, _of_task(environ, local or 0, here or 1), "Open MPI")


def _of_task(environ: Mapping[str, str], local: int, tasks: int) -> tuple[int, ...] | None:
    """A task's share of the GPUs that it sees; None, all of them, where it is alone on its node or is shown its own only."""
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    number = len(list(NVIDIA.glob("nvidia[0-9]*"))) if shown is None else len([gpu for gpu in shown.split(",") if gpu])
    if tasks <= 1 or number < tasks or environ.get("SLURM_GPUS_PER_TASK"):
        return None
    return tuple(range(local * number // tasks, (local + 1) * number // tasks))


def _tpu(environ: Mapping[str, str]) -> Cluster | None:
    """A host of a TPU slice, as its environment (GKE) or the machine's metadata (Compute Engine) tells."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if not environ.get("TPU_WORKER_HOSTNAMES") and not any(CHIPS.glob("accel[0-9]*")) and not any(CHIPS.glob("vfio/[0-9]*")):
        return None
    if (platforms and not platforms.startswith("tpu")) or importlib.util.find_spec("libtpu") is None:
        return None
    workers, process = environ.get("TPU_WORKER_HOSTNAMES", ""), environ.get("TPU_WORKER_ID", "")
    if not workers or not process.isdecimal():
        workers, process = _metadata("worker-network-endpoints"), _metadata("agent-worker-number")
    if not workers or not process.isdecimal():
        return None
    hosts = workers.split(",")  # each a name, or name:number:address
    return Cluster(f"{hosts[0].rpartition(':')[2]}:{TPU_PORT}", len(hosts), int(process), None, "TPU")


def _metadata(name: str) -> str:
    """An attribute of this Compute Engine machine; empty where there is none, or this is no such machine."""
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as answer:
            return answer.read().decode().strip()
    except (OSError, ValueError):
        return ""
