"""On what a run ran: the device's name, its peak memory, the versions of what computed and stored; and where programs are cached."""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax

from vitmed import config
from vitmed.runs import processes

# What `device_apart` runs; XLA is told not to take the device's memory for itself.
ASK = "import json; from vitmed.runs import machine; print(json.dumps(machine.device()))"
WITHOUT_PREALLOCATION = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
CGROUPS = pathlib.Path("/sys/fs/cgroup")
PACKAGES = ("vitmed", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def peak_memory_bytes(devices: Iterable[jax.Device]) -> int:
    """The largest peak of one of this process's devices where all tell theirs, else of this process."""
    stats = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
    if all("peak_bytes_in_use" in one for one in stats):
        return int(max(one["peak_bytes_in_use"] for one in stats))
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(devices: Iterable[jax.Device]) -> str:
    """Such as 'NVIDIA H200 x 2' or 'cpu (x86_64)'."""
    first, *others = devices
    kind = f"cpu ({platform.machine()})" if first.platform == "cpu" else first.device_kind
    return f"{kind} x {1 + len(others)}" if others else kind


class Device(NamedTuple):
    """What a run computes on: JAX's platform, a name, how many devices, and the bytes that each may use (None: it does not tell)."""

    platform: str
    name: str
    count: int
    memory_bytes: int | None


def device() -> Device:
    """The devices of this run, of which this process takes hold of its own; `memory_bytes` is the least of all processes'."""
    devices = jax.local_devices()
    platform_name, count = devices[0].platform, jax.device_count()
    # On a CPU they share the machine's memory.
    memory = host_memory_bytes() // len(devices) if platform_name == "cpu" else (devices[0].memory_stats() or {}).get("bytes_limit")
    # What follows from it must be the same in all processes of a run.
    agreed = processes.least(-1 if memory is None else memory)
    return Device(platform_name, device_name(jax.devices()), count, None if agreed < 0 else agreed)


def device_apart() -> Device | None:
    """The devices that a process would have, asked of one of its own, so that they stay free for others; None where that fails."""
    environment = os.environ | WITHOUT_PREALLOCATION
    asked = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=False)
    try:
        return Device(*json.loads(asked.stdout.splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        return None


def host_memory_bytes(cgroups: pathlib.Path = CGROUPS, membership: pathlib.Path = pathlib.Path("/proc/self/cgroup")) -> int:
    """The machine's memory, or what its control groups (of a container, of a batch job) leave to this process where that is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        paths = [line.split(":", 2)[2].strip("/") for line in membership.read_text().splitlines()]
    except (OSError, IndexError):
        paths = []
    for path in {pathlib.PurePosixPath(path) for path in (".", *paths)}:
        for parent in (path, *path.parents):
            for file in (cgroups / parent / "memory.max", cgroups / "memory" / parent / "memory.limit_in_bytes"):
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                    limits.append(int(file.read_text()))
    return min(limits)


def versions() -> dict[str, str]:
    """Versions by package, and Python's."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def cache_programs() -> None:
    """Keep compiled programs in the user's cache folder, so that the second run of a model starts at once.

    JAX_COMPILATION_CACHE_DIR names another folder. Processors with other instruction sets that share a home do not share programs. Several
    processes on GPUs keep none: one that finds its program does not compile it, and those that do wait for its share of the autotuning.
    """
    if processes.count() > 1 and jax.default_backend() == "gpu":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir is None:
        root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        if not root.is_absolute():  # a user without a home, as in many containers
            return
        jax.config.update("jax_compilation_cache_dir", str(root / "vitmed" / f"programs-{_instruction_set()}"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The program, once the memory that its compilation took is the system's again.

    Compiling takes 400 to 500 MB, of which glibc would keep 240 to 300, in pieces too small for the arrays that follow.
    """
    program = lowered.compile()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it alone
    if trim is not None:
        trim(0)
    return program


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """MachineError in one line where the device or the host runs out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        cause = str(error).splitlines()[0][:200]
        raise config.MachineError(
            f"{cause}; lower train.micro_batch_size, eval.batch_size or the number of seeds, or take a larger patch"
        ) from error


def _instruction_set() -> str:
    """A short name for what this processor can execute."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
