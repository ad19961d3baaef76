"""Runs in processes that are killed, or lose their disk, at chosen moments: what tests of lost machines share.

`Killer.live` is one life of `python -m vitmed.main`: it ends by itself, or at its moment comes what is to come. Processes are forked from
one that has imported everything and touched no device, which makes a life a matter of seconds.
"""

import contextlib
import dataclasses
import faulthandler
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np

from vitmed import config as config_lib
from vitmed import experiment
from vitmed.runs import checkpoint, folder, guard

ROOT = pathlib.Path(__file__).parent.parent
TIMES = ("train_seconds", "compile_seconds", "train_images_per_second", "test_milliseconds_per_image", "peak_memory_bytes")
SMALL = {"model.variant": "vit_micro", "train.epochs": "2", "train.batch_size": "250", "seeds": "0,1", "train.checkpoint_seconds": "0"}
SPECS = {2: "configs/quickstart.py:patch=14", 3: "configs/quickstart.py:dataset=phantom3d,patch=14"}
LONGEST_SECONDS = 100  # of a life: then it ends with every thread's traceback
WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")  # audit events that name a path


@dataclasses.dataclass(frozen=True)
class Moment:
    """When something happens to a process: `kind` and how many of them it lives through; and `harm`, what happens: a key of HARMS.

    place: where a run looks for signals (before a chunk, before a batch of an evaluation); write: a change to a file below the run's folder
    whose event and path contain the words of `what`; seconds: that long after the start, whatever it is doing.
    """

    kind: str
    number: float
    what: str = ""
    harm: str = "kill"

    @staticmethod
    def drawn(rng: random.Random, *, seconds: float) -> "Moment":
        """Any moment of a run that takes about that long."""
        kind = rng.choice(("place", "write", "seconds"))
        return Moment(kind, rng.uniform(0, seconds) if kind == "seconds" else rng.randrange({"place": 20, "write": 120}[kind]))


def _kill(workdir: pathlib.Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fill(workdir: pathlib.Path) -> None:
    """Fill the file system to its last byte, as other people's data would."""
    with contextlib.suppress(OSError), open(workdir.parent / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


def _limit(workdir: pathlib.Path) -> None:
    """Let no file grow beyond some bytes, like a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def _make_read_only(workdir: pathlib.Path) -> None:
    """Mount the folder over itself, read-only: what is open stays writable, which alone would keep a file system from becoming so."""
    subprocess.run(["mount", "--bind", workdir, workdir], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", workdir], check=True)


def _remove(workdir: pathlib.Path) -> None:
    while workdir.exists():  # something may be written there meanwhile
        shutil.rmtree(workdir, ignore_errors=True)


HARMS = {"kill": _kill, "fill": _fill, "limit": _limit, "read-only": _make_read_only, "remove": _remove}


def _arm(moment: Moment, workdir: str) -> None:
    """Make this process do itself the harm at the moment, once."""
    left = [int(moment.number)]

    def pass_by() -> None:
        left[0] -= 1
        if left[0] == -1:
            HARMS[moment.harm](pathlib.Path(workdir))

    if moment.kind == "place":
        check = guard.Signals.check

        def counted(self: guard.Signals) -> None:
            pass_by()
            check(self)

        guard.Signals.check = counted
    elif moment.kind == "write":

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in WRITES and left[0] >= 0:
                reads = event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
                described = " ".join([event, *(os.fsdecode(value) for value in arguments if isinstance(value, str | bytes | os.PathLike))])
                # Looked for in what is below the folder: where tests run side by side, the path to it has an "open" in it.
                if not reads and workdir in described and all(word in described.replace(workdir, "") for word in moment.what.split()):
                    pass_by()

        sys.addaudithook(hook)


def _live(argv: list[str], workdir: str, moment: Moment | None, programs: str, log: str) -> None:
    from vitmed import cli, main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    faulthandler.dump_traceback_later(LONGEST_SECONDS, exit=True)
    os.chdir(ROOT)
    jax.config.update("jax_compilation_cache_dir", programs)
    experiment.CHUNK_SECONDS = 0  # one step each: more places to be killed at
    if moment is not None:
        _arm(moment, workdir)
    sys.exit(cli.run_cli(main.main, argv))


class Killer:
    """Lives of runs of one command line, whose compiled programs are kept in a folder."""

    def __init__(self, spec: str, overrides: dict[str, str], *, programs: pathlib.Path):
        self.config = config_lib.load(f"{ROOT}/{spec}", overrides)
        self._argv = [f"--config={ROOT}/{spec}", *(f"--config.{field}={value}" for field, value in overrides.items())]
        self._programs = str(programs)
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["vitmed.main", "vitmed.experiment", "vitmed.forecast"])

    def run(self, workdir: pathlib.Path, moment: Moment | None = None) -> tuple[int, str]:
        """(exit status, what this life and those before said): to the end, whatever comes at the moment."""
        log = pathlib.Path(f"{self._programs}-{workdir.parent.name}-{workdir.name}.log")  # on no disk that is filled
        argv = [*self._argv, f"--workdir={workdir}"]
        process = self._processes.Process(target=_live, args=(argv, str(workdir), moment, self._programs, str(log)))
        process.start()
        if moment is not None and moment.kind == "seconds":
            process.join(moment.number)
            process.kill()
        process.join()
        said = log.read_text() if log.exists() else ""
        assert "Traceback" not in said, said
        return process.exitcode, said

    def live(self, workdir: pathlib.Path, moment: Moment | None = None) -> bool:
        """Run until done (True) or killed (False); any other end is a failure of the test."""
        status, said = self.run(workdir, moment)
        assert status in (0, -signal.SIGKILL), f"{status} after {moment}: {said}"
        return status == 0

    def timed(self, workdir: pathlib.Path) -> float:
        """An undisturbed run; the seconds that it takes."""
        started = time.monotonic()
        assert self.live(workdir)
        return time.monotonic() - started


class Runs:
    """An undisturbed run of 2D or 3D phantoms in a folder, with compiled programs of its own, and the killer of others like it."""

    def __init__(self, rank: int, path: pathlib.Path):
        self.path = path
        self.killer = Killer(SPECS[rank], SMALL, programs=path / "programs")
        self.seconds = self.killer.timed(path / "whole")
        self.whole = outcome(path / "whole", self.killer.config)

    def require_whole(self, workdir: pathlib.Path) -> None:
        """A run there has left what the undisturbed one has, byte by byte."""
        found = outcome(workdir, self.killer.config)
        assert sorted(found) == sorted(self.whole)
        assert [name for name in found if found[name] != self.whole[name]] == []


def outcome(workdir: pathlib.Path, config: Any) -> dict[str, bytes]:
    """Everything that a finished run leaves and that is no time, by name: files, and the arrays and progress of the last checkpoint."""
    run_folder = folder.RunFolder(workdir)
    found = {}
    for file in sorted(file for file in workdir.rglob("*") if file.is_file() and run_folder.checkpoints not in file.parents):
        if file.name != ".lock":
            found[str(file.relative_to(workdir))] = file.read_bytes()
    result = json.loads(found["result.json"])
    found["result.json"] = json.dumps({name: value for name, value in result.items() if name not in TIMES}).encode()
    arrays, progress = stored(config, workdir)
    found |= {f"checkpoint {index}": str(array.dtype).encode() + array.tobytes() for index, array in enumerate(arrays)}
    return found | {"progress": json.dumps(progress).encode()}


def stored(config: Any, workdir: pathlib.Path) -> tuple[list[np.ndarray], dict[str, Any]]:
    """All arrays of the last checkpoint, and its progress without the times."""
    recipe = experiment.recipe(experiment.plan(config), steps_per_epoch=1)
    with checkpoint.Checkpoints(folder.RunFolder(workdir).checkpoints, read_only=True) as checkpoints:
        state, best = recipe.abstract
        items = checkpoints.restore(checkpoints.latest(), state=state, best=best, progress=None)
    progress = {name: value for name, value in items["progress"].items() if not name.endswith("seconds")}
    return [np.asarray(leaf) for leaf in jax.tree.leaves((items["state"], items["best"]))], progress
