"""Checkpoints: Orbax writes them, a digest of every byte tells whether one is still what was written.

Orbax commits a step by renaming its folder but keeps no checksum of array data: a flipped bit is restored silently as another number.
So a committed step is *sealed* with the SHA-256 of each of its files, and only sealed, intact steps are restored.
A step holds three items: `state` (what training changes), `best` (the best parameters of each run) and `progress` (JSON: position and
metrics of the same moment).
"""

import hashlib
import json
import logging
import pathlib
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vitmed import config
from vitmed.runs import folder

SEAL = "sha256.json"
KEPT = 2  # the newest, and the one before it in case the newest breaks

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every step of every save


class Checkpoints:
    """The checkpoints of one run's folder; a context manager, since saving goes on in the background. `read_only` writes nothing."""

    def __init__(self, path: pathlib.Path, *, read_only: bool = False):
        self._path = pathlib.Path(path).resolve()
        self._read_only = read_only
        self._manager: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Checkpoints":
        keep = preservation_policy.LatestN(KEPT)
        options = ocp.CheckpointManagerOptions(preservation_policy=keep, create=not self._read_only, read_only=self._read_only)
        self._manager = ocp.CheckpointManager(self._path, item_names=("state", "best", "progress"), options=options)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            if not self._read_only:
                self.finish()
        finally:
            self._manager.close()

    def save(self, step: int, *, state: Any, best: Any, progress: dict[str, Any]) -> None:
        """Begin to write a step; device arrays are copied before this returns, the files are written in the background."""
        self.finish()
        items = {"state": ocp.args.StandardSave(state), "best": ocp.args.StandardSave(best), "progress": ocp.args.JsonSave(progress)}
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def finish(self) -> None:
        """Wait for a save that is under way and seal it."""
        self._manager.wait_until_finished()
        for step in self._manager.all_steps():
            if not (self._step(step) / SEAL).exists():
                seal(self._step(step))

    def poll(self) -> None:
        """Seal a save that has ended meanwhile; does not wait."""
        if not self._manager.is_saving_in_progress():
            self.finish()

    def latest(self) -> int | None:
        """The newest intact step, or None where none was ever sealed; what is broken is named on stderr and left alone.

        InputError where there are checkpoints but not one of them is intact.
        """
        troubles = {}
        for step in sorted((int(entry.name) for entry in self._path.glob("[0-9]*") if entry.name.isdigit()), reverse=True):
            trouble = defect(self._step(step))
            if trouble is None:
                if troubles:
                    broken = "; ".join(f"step {bad}: {why}" for bad, why in troubles.items())
                    print(f"vitmed: {self._path}: {broken}; going on from step {step}, the newest intact one", file=sys.stderr)
                return step
            troubles[step] = trouble
        if any(why != _UNSEALED for why in troubles.values()):
            broken = "; ".join(f"step {step}: {why}" for step, why in troubles.items())
            raise config.InputError(f"{self._path}: no intact checkpoint ({broken}); move the folder away to start over")
        return None

    def restore(self, step: int, **shapes: Any) -> dict[str, Any]:
        """Items of a step by name: abstract arrays with shardings for `state` and `best`, anything for `progress`."""
        wanted = {name: ocp.args.JsonRestore() if name == "progress" else ocp.args.StandardRestore(shape) for name, shape in shapes.items()}
        return dict(self._manager.restore(step, args=ocp.args.Composite(**wanted)).items())

    def _step(self, step: int) -> pathlib.Path:
        return self._path / str(step)


_UNSEALED = "not sealed (the run ended while it was written)"


def seal(step: pathlib.Path) -> None:
    """Write the digests of all files of a committed step beside them."""
    folder.write_whole(step / SEAL, json.dumps(_digests(step), indent=1).encode())


def defect(step: pathlib.Path) -> str | None:
    """Why a step cannot be trusted, or None where every byte is as it was written."""
    try:
        expected = json.loads((step / SEAL).read_bytes())
        actual = _digests(step)
    except FileNotFoundError:
        return _UNSEALED
    except (OSError, ValueError) as error:
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


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a pytree: what `restore` needs in order to place arrays."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings)
