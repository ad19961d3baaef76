"""How the points of a sweep stand, read from their folders alone: done, running, failed or waiting."""

import collections
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import rich.table

from launch import manifest as manifest_lib
from vitmed import config as config_lib
from vitmed import forecast
from vitmed.runs import checkpoint, folder, guard
from vitmed.study import tables

DONE, RUNNING, FAILED, WAITING = STATES = ("done", "running", "failed", "waiting")


class State(NamedTuple):
    """One of STATES, what is worth knowing besides, and the result of a point that is done."""

    word: str
    note: str = ""
    result: Mapping[str, Any] | None = None


def of(run_folder: folder.RunFolder) -> State:
    """How a point stands; a folder whose files are broken counts as failed."""
    try:
        if (result := run_folder.read_result()) is not None:
            seeds = ", ".join(map(str, result["failed_seeds"]))
            return State(DONE, f"failed seeds {seeds}" if seeds else "", result)
        if holder := guard.holder(run_folder.path):
            return State(RUNNING, f"{holder}{_epochs_text(run_folder)}")
        if failure := run_folder.read_failure():
            said = failure.get("said")
            return State(FAILED, config_lib.one_line(f"{failure.get('ended')}{f': {said}' if said else ''}"))
    except config_lib.InputError as error:
        return State(FAILED, config_lib.one_line(error))
    return State(WAITING, f"begun{_epochs_text(run_folder)}" if checkpoint.begun(run_folder.checkpoints) else "")


def _epochs_text(run_folder: folder.RunFolder) -> str:
    epochs = len(run_folder.read_metrics())
    return f", {epochs} epoch{'' if epochs == 1 else 's'} done" if epochs else ""


def of_all(manifest: manifest_lib.Manifest, workdir: pathlib.Path) -> dict[str, State]:
    """The states by the points' names."""
    return {point.name: of(folder.RunFolder(workdir / point.name)) for point in manifest.points}


def totals(states: Mapping[str, State]) -> str:
    """Such as: 3 of 6 points done, 1 running, 1 failed, 1 waiting."""
    counts = collections.Counter(state.word for state in states.values())
    words = [f"{counts[word]} {word}" for word in STATES[1:] if counts[word]]
    return ", ".join([f"{counts[DONE]} of {len(states)} points done", *words])


def show(manifest: manifest_lib.Manifest, states: Mapping[str, State]) -> None:
    """Print every point with its task, its cost and its state, then the totals and the device time that is left."""
    table = rich.table.Table()
    for name in ("task", "point", "GMACs", "state"):
        table.add_column(name, justify="right" if name in ("task", "GMACs") else "left", overflow="fold")
    points = {point.name: point for point in manifest.points}
    for number, names in enumerate(manifest.tasks):
        for name in (name for name in names if name in states):
            note = states[name].note
            table.add_row(str(number), name, f"{points[name].gmacs:,.0f}", f"{states[name].word}{f': {note}' if note else ''}")
    tables.show(table)
    print(f"{totals(states)}{_left_text(manifest, states)}")


def _left_text(manifest: manifest_lib.Manifest, states: Mapping[str, State]) -> str:
    """What is left as device time, by what the points that are done took; what running ones have behind them is not counted."""
    done = [(point.seconds, states[point.name].result) for point in manifest.points if point.name in states and states[point.name].result]
    left = [point.seconds for point in manifest.points if point.name in states and states[point.name].word in (RUNNING, WAITING)]
    seconds = forecast.seconds_left(done, left) if left and sum(arithmetic for arithmetic, _ in done) else None
    return f"; at most {forecast.duration_text(seconds)} of one device's time left" if seconds is not None else ""
