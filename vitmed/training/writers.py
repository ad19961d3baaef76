"""A run followed from outside: what it measures goes to TensorBoard, Weights & Biases or MLflow while it trains, where that is asked for.

A tracker never changes or ends a run: whatever a package raises (no network, no login, a full disk) is said in one line, and from there on
nothing more goes to it. Nothing is imported that is not asked for, and nothing is written twice when a run goes on.
"""

import importlib.util
import math
import pathlib
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from vitmed import config as config_lib
from vitmed.runs import files
from vitmed.training import tracking

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}  # what each is imported as
FOLDER = "tracking"  # of a run, for the names under which others know it


class Writer(Protocol):
    """One place where a run is shown; a `step` is a training step, from 1, and each value of one belongs to one of the seeds or to all."""

    def scalars(self, shared: Mapping[str, float], of_seeds: Mapping[str, Mapping[int, float]], *, step: int) -> None:
        """Add numbers by name: of the whole run, and by seed."""

    def flush(self) -> None:
        """Let what was added be seen."""

    def conclude(self, tables: tracking.Tables, figures: Mapping[str, bytes], *, step: int) -> None:
        """Add tables by name, each with its header first, and figures by name, as PNG."""

    def close(self, *, finished: bool) -> None:
        """End; `finished` or to be continued."""


def parse(text: str) -> tuple[str, ...]:
    """The writers of `tracking.writers`; InputError where one is unknown or its package is not installed."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        config_lib.one_of("tracking.writers", name, PACKAGES)
        if PACKAGES[name] not in sys.modules and importlib.util.find_spec(PACKAGES[name]) is None:
            raise config_lib.InputError(
                f"tracking.writers={text}: {name} needs the package {PACKAGES[name]}; install it: pip install 'vitmed[tracking]'"
            )
    return names


def stored_id(path: pathlib.Path, name: str, make: Callable[[], str]) -> str:
    """The name under which a service knows the run of a folder: made once and kept in the folder, so that a run that goes on finds it."""
    file = path / FOLDER / f"{name}_run_id"
    try:
        known = files.read(file).decode()
    except FileNotFoundError:
        known = make()
        files.write_whole(file, known.encode(), make_parent=True)
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", known):
        raise config_lib.InputError(f"{file} holds no run's id; remove it to begin a new run there")
    return known


class Tracker(tracking.Observer):
    """Tells the writers of a run what the loop tells it; a context manager around the run that closes them.

    `open_writer(name, step)` opens one, once it is known up to which step all has been told.
    """

    def __init__(self, names: Sequence[str], open_writer: Callable[[str, int], Writer], *, seeds: Sequence[int]):
        self._names, self._open, self._seeds = names, open_writer, seeds
        self._writers: dict[str, Writer] = {}
        self._step, self._finished = 0, False

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, writer in list(self._writers.items()):
            self._attempt(name, lambda writer=writer: writer.close(finished=self._finished))

    def begun(self, step: int) -> None:
        """Open the writers; what they had of later steps comes again."""
        self._step = step
        for name in self._names:
            self._attempt(name, lambda name=name: self._writers.update({name: self._open(name, step)}))

    def trained(self, step: int, *, losses: Sequence[float], images_per_second: float) -> None:
        """Training losses [R] at a step, and the speed."""
        self._step = step
        self._scalars({"train/images_per_second": images_per_second}, {"train/loss": losses}, step=step)

    def validated(self, row: Mapping[str, Any]) -> None:
        """An epoch's line of metrics.jsonl."""
        self._step = row["step"]
        of_seeds = {"train/epoch_loss": row["train_loss"], **{f"val/{name}": values for name, values in row["val"].items()}}
        self._scalars({"train/learning_rate": row["learning_rate"], "train/epoch": row["epoch"]}, of_seeds, step=row["step"])
        self._each(lambda writer: writer.flush())

    def finished(self, test: Mapping[str, Sequence[float | None]], show: Callable[[], tuple[tracking.Tables, Mapping[str, bytes]]]) -> None:
        """The test metrics [R] by name, and the tables and figures that `show` makes of the finished run; all after the last step."""
        self._finished = True
        if not self._writers:
            return
        after = self._step + 1
        self._scalars({}, {f"test/{name}": values for name, values in test.items()}, step=after)
        try:
            tables, figures = show()
        except Exception as error:  # noqa: BLE001  every seed has failed, a disk is full: the run is done all the same
            print(f"vitmed: tracking: no tables and no figures: {_said(error)}", file=sys.stderr)
        else:
            self._each(lambda writer: writer.conclude(tables, figures, step=after))
        self._each(lambda writer: writer.flush())

    def _scalars(self, shared: Mapping[str, float], of_seeds: Mapping[str, Sequence[float | None]], *, step: int) -> None:
        known = {name: _known(values, self._seeds) for name, values in of_seeds.items()}
        self._each(lambda writer: writer.scalars(shared, known, step=step))

    def _each(self, call: Callable[[Writer], None]) -> None:
        for name, writer in list(self._writers.items()):
            self._attempt(name, lambda writer=writer: call(writer))

    def _attempt(self, name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  whatever a package raises, the run is worth more
            self._writers.pop(name, None)
            print(f"vitmed: tracking: {name} is left out from here on: {_said(error)}", file=sys.stderr, flush=True)


def _said(error: Exception) -> str:
    return config_lib.one_line(error)[:300] or type(error).__name__


def _known(values: Sequence[float | None], seeds: Sequence[int]) -> dict[int, float]:
    """The values that are numbers, by seed: one that has failed has none."""
    return {seed: float(value) for seed, value in zip(seeds, values, strict=True) if value is not None and math.isfinite(value)}


def start(
    names: Sequence[str], path: pathlib.Path, *, project: str, name: str, config: Mapping[str, Any], seeds: Sequence[int]
) -> tracking.Observer:
    """What follows a run in a folder, with its flat config: shown within a `project` under a `name`."""
    if not names:
        return tracking.Observer()
    name = name or path.resolve().name

    def open_writer(kind: str, step: int) -> Writer:
        from vitmed.training import backends

        if kind == "tensorboard":
            return backends.TensorBoard(path / "tensorboard", config=config, seeds=seeds, step=step)
        if kind == "wandb":
            made = stored_id(path, kind, lambda: secrets.token_hex(8))
            return backends.WeightsAndBiases(path, project=project, name=name, config=config, run_id=made)
        return backends.MLflow(lambda make: stored_id(path, kind, make), project=project, name=name, config=config)

    return Tracker(names, open_writer, seeds=seeds)
