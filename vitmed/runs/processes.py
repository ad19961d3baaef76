"""Several processes that make one run: joined, kept in step, and none left waiting for one that has died.

Each process has its own devices and its part of every batch; process 0 alone writes what is not a checkpoint. Whatever could differ
between them (a signal, a file that one sees and another does not yet, memory) is agreed upon here before anyone acts on it.
"""

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import numpy as np

from vitmed import config
from vitmed.runs import cluster as clusters

T = TypeVar("T")
# Seconds after which a process that gives no sign of life is dead, and so then are the others; and for which processes wait for each other
# at the start, since the nodes of a job do not start at once. VITMED_HEARTBEAT_SECONDS and VITMED_JOINING_SECONDS say otherwise.
SECONDS = {"VITMED_HEARTBEAT_SECONDS": 60, "VITMED_JOINING_SECONDS": 300}
# What JAX says where another process is gone, on CPUs (Gloo), GPUs (NCCL) and of its own service.
LOST = re.compile(r"Gloo|NCCL|coordination service|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED")
LOST_TEXT = "another process of this run has ended or never came, or the network has failed; run the same command again to go on"

_joined = False
_failed = False  # whether an error ended this process's part, so that it must not wait for the others


@contextlib.contextmanager
def together(cluster: clusters.Cluster | None) -> Iterator[None]:
    """Join the other processes before JAX is used; LostError where they do not come, or where one is lost within the context."""
    global _joined, _failed
    if cluster is None:
        yield
        return
    try:
        _join(cluster)
        _joined = True
        yield
    except config.Stopped:  # all have agreed to stop
        raise
    except (RuntimeError, ValueError) as error:
        if getattr(error, "agreed", False):  # all end by it, and may wait for each other
            raise
        _failed = True
        cause = error.__cause__ if isinstance(error, config.InputError | config.MachineError) else error
        if cause is None or not LOST.search(str(cause)):
            raise
        raise config.LostError(f"{cluster}: {LOST_TEXT} ({config.one_line(cause)[:200]})") from error
    except BaseException:
        _failed = True
        raise


def ended(cluster: clusters.Cluster, status: int) -> config.MachineError:
    """What to say of a process that a signal has ended: JAX aborts one whose peers give no sign of life."""
    if status == -signal.SIGABRT:
        return config.LostError(f"{cluster}: {LOST_TEXT}")
    name = signal.Signals(-status).name
    return config.MachineError(f"{cluster}: killed by {name}{', perhaps for want of memory' if name == 'SIGKILL' else ''}")


def _join(cluster: clusters.Cluster) -> None:
    import jax

    heartbeat, joining = (_seconds(name) for name in SECONDS)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which is ours
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # two programs at once could meet their peers' in another order
    settings = {"initialization_timeout": joining, "heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": heartbeat}
    settings |= {"cluster_detection_method": "deactivate", "local_device_ids": cluster.local_devices}
    jax.distributed.initialize(cluster.coordinator, cluster.num_processes, cluster.process_id, **settings)


def _seconds(name: str) -> int:
    text = os.environ.get(name, str(SECONDS[name]))
    config.require(text.isdecimal() and int(text) > 0, name, text, "a whole number of seconds")
    return int(text)


def leave(status: int) -> NoReturn:
    """End this process with a status; without waiting for the others, as JAX would, where an error ended it."""
    if _failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def count() -> int:
    """How many processes make this run; does not touch the devices of one that is alone."""
    return sys.modules["jax"].process_count() if _joined else 1


def is_main() -> bool:
    """Whether this is process 0, which writes and speaks for all."""
    return count() == 1 or sys.modules["jax"].process_index() == 0


def most(number: int) -> int:
    """The largest of all processes' numbers; all must ask at the same point."""
    return max(_all(number))


def least(number: int) -> int:
    """The smallest of all processes' numbers; all must ask at the same point."""
    return min(_all(number))


def _all(number: int) -> list[int]:
    if count() == 1:
        return [number]
    from jax.experimental import multihost_utils

    halves = multihost_utils.process_allgather(np.array([number], np.int64).view(np.int32))  # JAX takes no 64 bits
    return np.ascontiguousarray(halves).view(np.int64).ravel().tolist()


def by_main(function: Callable[[], T]) -> T:
    """What a function gives (JSON) in process 0, which alone calls it, to all of them; so too its InputError or MachineError."""
    if count() == 1:
        return function()
    outcome: dict[str, Any] = {}
    if is_main():
        try:
            outcome = {"value": function()}
        except (config.InputError, config.MachineError) as error:
            outcome = {"error": type(error).__name__, "said": str(error)}
    outcome = _told(outcome)
    if "error" in outcome:
        raise _agreed(getattr(config, outcome["error"], config.InputError)(outcome["said"]), told=not is_main())
    return outcome["value"]


def by_all(function: Callable[[], T]) -> T:
    """What a function gives in each process; where it raises InputError or MachineError in one of them, all end by it."""
    if count() == 1:
        return function()
    result, fault = None, None
    try:
        result = function()
    except (config.InputError, config.MachineError) as error:
        fault = error
    me = sys.modules["jax"].process_index()
    # Who speaks is the first that has something to say; what kind of error it is decides how all end.
    first, is_machines = divmod(least(2 * (me if fault else count()) + isinstance(fault, config.MachineError)), 2)
    if fault is not None:
        raise _agreed(fault, told=first != me)
    if first < count():
        kind = config.MachineError if is_machines else config.InputError
        raise _agreed(kind(f"process {first} has ended the run, and says why"), told=True)
    return result


def same(what: str, content: str) -> None:
    """InputError in all processes where what should be the same is not: they would train on a mixture."""

    def check() -> None:
        if content != expected:
            raise config.InputError(
                f"process {sys.modules['jax'].process_index()} has other {what} than process 0; give all the same files"
            )

    expected = by_main(lambda: content)
    by_all(check)


def _agreed(error: Exception, *, told: bool) -> Exception:
    """An error that ends all processes, of which those that are `told` need not say it."""
    error.agreed, error.told = True, told
    return error


def main_first(function: Callable[[], T]) -> T:
    """What a function gives in each process, called by process 0 first: where it downloads, the others find what is there."""
    result = by_all(lambda: function() if is_main() else None)
    return by_all(lambda: result if is_main() else function())


def _told(outcome: dict[str, Any]) -> dict[str, Any]:
    """Process 0's outcome, as JSON: first its length, then its bytes."""
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(outcome).encode(), np.uint8) if is_main() else np.zeros(0, np.uint8)
    padded = np.zeros(most(len(data)), np.uint8)
    padded[: len(data)] = data
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())
