"""Checkpoints: Orbax writes them, a digest of every byte tells whether one is still what was written.

Orbax commits a step by renaming its folder but keeps no checksum of array data: a flipped bit is restored silently as another number.
So a committed step is *sealed* with the SHA-256 of each of its files, and only sealed, intact steps are restored.
A step holds three items: `state` (what training changes), `best` (the best parameters of each run) and `progress` (JSON: position and
metrics of the same moment). Where several processes make a run, each writes its part of the arrays, and process 0 seals and chooses.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vitmed import config
from vitmed.runs import files, processes

SEAL = "sha256.json"
ASIDE = "broken-"  # begins the names of steps that were moved aside
CAUSE = re.compile(r"(?<=: )[^:]+(?= \[os_error_code)")  # at the end of what TensorStore says, after several paths
KEPT = 2  # the newest, and the one before it in case the newest breaks

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every step of every save, and its errors before it raises them


class Checkpoints:
    """The checkpoints of one run's folder; a context manager, since saving goes on in the background. `read_only` writes nothing."""

    def __init__(self, path: pathlib.Path, *, read_only: bool = False):
        self._path = pathlib.Path(path).resolve()
        self._read_only = read_only
        self._manager: ocp.CheckpointManager | None = None
        self._sealing = concurrent.futures.ThreadPoolExecutor(1, "seal")
        self._pending: concurrent.futures.Future | None = None
        self._newest = 0  # the step before anything was done, which needs no checkpoint
        self._hook = sys.unraisablehook

    def __enter__(self) -> "Checkpoints":
        keep = preservation_policy.LatestN(KEPT)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._report
        # Made asynchronously, a folder that cannot be made leaves threads that wait for it for 20 minutes, and the process with them.
        at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, create=not self._read_only, read_only=self._read_only, async_options=at_once
        )
        self._manager = ocp.CheckpointManager(self._path, item_names=("state", "best", "progress"), options=options)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self._sealing.shutdown()
            with contextlib.suppress(
                OSError, ValueError, RuntimeError
            ):  # what went wrong in the background was told above, or is being told
                self._manager.close()
        if error is None:
            sys.unraisablehook = self._hook

    def _report(self, unraisable: Any) -> None:
        """Where one write of a save fails, TensorStore tells of the others to an event loop that Orbax has closed; no user needs those."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)

    def save(self, step: int, *, state: Any, best: Any, progress: dict[str, Any]) -> None:
        """Begin to write a step; device arrays are copied before this returns, the files are written and sealed in the background.

        Does nothing where it is the newest already. MachineError where writing fails, this step or the one before.
        """
        if step == self._newest:
            return
        self.finish()
        items = {"state": ocp.args.StandardSave(state), "best": ocp.args.StandardSave(best), "progress": ocp.args.JsonSave(progress)}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._newest = step
        self._pending = self._sealing.submit(self._commit, step)

    def _commit(self, step: int) -> None:
        """Seal what this process has written, as soon as it is there: anything else would vouch for bytes unseen."""
        with self._writing():
            self._manager.wait_until_finished()
            if processes.is_main():
                seal(self._step(step))

    def finish(self) -> None:
        """Wait for a save that is under way; MachineError where it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def poll(self) -> None:
        """MachineError where a save has failed meanwhile; does not wait."""
        if self._pending is not None and self._pending.done():
            self.finish()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Orbax reports a full disk or a lost folder as one of several errors and at great length; here it is one line."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            said = CAUSE.search(str(error)) or re.match("[^\n]{,200}", str(error).strip())
            raise config.MachineError(
                f"{self._path}: the checkpoint could not be written ({said.group() or type(error).__name__}); "
                "make room or mend that, and run the same command again"
            ) from error

    def latest(self) -> int | None:
        """The newest intact step, the same for all processes of a run; see `_latest`."""
        self._newest = processes.by_main(self._latest) or 0
        if processes.count() > 1:
            self._manager.reload()  # steps may have been moved aside
        return self._newest or None

    def _latest(self) -> int | None:
        """The newest intact step, or None where none was ever sealed; what is broken is named on stderr.

        Broken steps are moved aside, out of the way of those to come, and never deleted; where there is no intact one, nothing is touched
        and InputError says what there is.
        """
        troubles = {}
        for step in sorted((int(entry.name) for entry in self._path.glob("[0-9]*") if entry.name.isdigit()), reverse=True):
            trouble = defect(self._step(step))
            if trouble is None:
                if troubles:
                    found = f"{self._path}: {_listed(troubles)}; going on from step {step}, the newest intact one"
                    print(f"vitmed: {found}{self._set_aside(troubles)}", file=sys.stderr)
                return step
            troubles[step] = trouble
        if any(why != _UNSEALED for why in troubles.values()):
            raise config.InputError(f"{self._path}: no intact checkpoint ({_listed(troubles)}); move the folder away to start over")
        if troubles and not self._read_only:
            print(f"vitmed: {self._path}: {_listed(troubles)}; starting over{self._set_aside(troubles)}", file=sys.stderr)
        return None

    def _set_aside(self, steps: Iterable[int]) -> str:
        """Rename steps so that they are neither counted nor deleted as checkpoints, and say so; a reader leaves them."""
        if self._read_only or not steps:
            return ""
        for step in steps:
            os.replace(self._step(step), self._path / f"{ASIDE}{step}-{time.time_ns()}")
        self._manager.reload()
        return f"; what is broken is kept as {ASIDE}*"

    def restore(self, step: int, **shapes: Any) -> dict[str, Any]:
        """Items of a step by name: abstract arrays with shardings for `state` and `best`, anything for `progress`."""
        wanted = {name: ocp.args.JsonRestore() if name == "progress" else ocp.args.StandardRestore(shape) for name, shape in shapes.items()}
        return dict(self._manager.restore(step, args=ocp.args.Composite(**wanted)).items())

    def _step(self, step: int) -> pathlib.Path:
        return self._path / str(step)


_UNSEALED = "not sealed (the run ended while it was written)"


def _listed(troubles: Mapping[int, str]) -> str:
    return "; ".join(f"step {step}: {why}" for step, why in troubles.items())


def begun(path: pathlib.Path) -> bool:
    """Whether a checkpoint was ever finished there, broken or not."""
    return next(pathlib.Path(path).glob(f"[0-9]*/{SEAL}"), None) is not None


def seal(step: pathlib.Path) -> None:
    """Write the digests of all files of a committed step beside them."""
    files.write_whole(step / SEAL, json.dumps(_digests(step), indent=1).encode())


def defect(step: pathlib.Path) -> str | None:
    """Why a step cannot be trusted, or None where every byte is as it was written."""
    try:
        expected = json.loads((step / SEAL).read_bytes())
        actual = _digests(step)
    except FileNotFoundError:
        return _UNSEALED
    except (OSError, ValueError, RecursionError) as error:
        return f"{SEAL} cannot be read ({error})"
    if not isinstance(expected, dict) or not expected:
        return f"{SEAL} is not a table of digests"
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong there"
        if expected[name] != actual[name]:
            return f"{name} is not what was written"
    return None


def _digests(step: pathlib.Path) -> dict[str, str]:
    found = {}
    for file in sorted(step.rglob("*")):
        if file.is_file() and file.name != SEAL:
            with file.open("rb") as stream:
                found[str(file.relative_to(step))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found
