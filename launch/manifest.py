"""What a sweep over many machines is: its points, and which of them share a task. DIR/manifest.json holds it.

A task is one GPU's work, in order. Its number stays: tasks that wait in a queue go by it, so a manifest only ever grows at its end, and
a point that is run again alone leaves its task, which may become empty, for one of its own.

What engines (see launch/sweep.py) put into their files comes from here too: `task_command` and `report_command`.
"""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vitmed import config as config_lib
from vitmed.runs import files

VERSION = 1
FILE_NAME = "manifest.json"
PACK = 0.25
LONGEST_FAULT = 400
NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,200}")  # what vitmed/study/points.py makes


@dataclasses.dataclass(frozen=True)
class Point:
    """A run: its folder's name, what follows the colon of --config, and by arithmetic the GMACs and the seconds of its whole training.

    The seconds are those of no real machine (vitmed/forecast.py): what they are in proportion to others' counts.
    """

    name: str
    argument: str
    gmacs: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A config file and its arguments (as given: relative to the checkout), the overrides for every point, the names of the tasks' points.

    `pack` is what the tasks were made with: how large a task of several points may be, as a share of the costliest point.
    """

    config: str
    overrides: Mapping[str, str]
    points: tuple[Point, ...]
    tasks: tuple[tuple[str, ...], ...]
    pack: float = PACK


def packed(points: Sequence[Point], share: float) -> tuple[tuple[str, ...], ...]:
    """The points' names by task, the costliest first: each goes into the first task that then costs at most `share` of the costliest point.

    Costs are GMACs. What costs more than that is alone; a share of 0 leaves every point alone.
    """
    most = share * max((point.gmacs for point in points), default=0.0)
    tasks: list[list[str]] = []
    costs: list[float] = []
    for point in sorted(points, key=lambda point: (-point.gmacs, point.name)):
        index = next((index for index, cost in enumerate(costs) if cost + point.gmacs <= most), None)
        if index is None:
            index = len(tasks)
            tasks.append([])
            costs.append(0.0)
        tasks[index].append(point.name)
        costs[index] += point.gmacs
    return tuple(map(tuple, tasks))


def grown(manifest: Manifest, points: Sequence[Point]) -> Manifest:
    """The manifest with the points that it has not yet, in tasks of their own at the end."""
    there = {point.name for point in manifest.points}
    new = [point for point in points if point.name not in there]
    return dataclasses.replace(manifest, points=(*manifest.points, *new), tasks=(*manifest.tasks, *packed(new, manifest.pack)))


def alone(manifest: Manifest, names: Sequence[str]) -> Manifest:
    """The manifest with each of these points in a task of its own at the end; one that is alone already stays where it is."""
    moved = {name for task in manifest.tasks if len(task) > 1 for name in task if name in names}
    kept = tuple(tuple(name for name in task if name not in moved) for task in manifest.tasks)
    return dataclasses.replace(manifest, tasks=(*kept, *((name,) for task in manifest.tasks for name in task if name in moved)))


def task_command(python: str, *, manifest: str, workdir: str, task: int | str) -> list[str]:
    """What runs a task on its machine, in the checkout: `task` is its number, a shell's word such as $N, or all; paths as seen there."""
    return [python, "-m", "launch.task", f"--manifest={manifest}", f"--workdir={workdir}", f"--task={task}"]


def report_command(python: str, *, workdir: str) -> list[str]:
    """What makes the report of all points when the tasks are done."""
    return [python, "-m", "vitmed.report", f"--workdir={workdir}", f"--out={workdir}/report"]


# --- the file -------------------------------------------------------------------------------------------------------------------


def text(manifest: Manifest) -> str:
    """The file's text."""
    return files.json_bytes({"version": VERSION, **dataclasses.asdict(manifest)}).decode()


def write(manifest: Manifest, workdir: pathlib.Path) -> None:
    """Write DIR/manifest.json, whole or not at all."""
    files.make_folder(workdir)
    files.write_whole(workdir / FILE_NAME, text(manifest).encode())


def read(path: pathlib.Path, *, runs: bool = True) -> Manifest:
    """The manifest in a file; FileNotFoundError where there is none, InputError that names the fault where it is nonsense.

    Unless its points are only looked at, and not run, its config must be there.
    """
    said = files.parse_json(files.read(path), where=str(path))
    fault = _fault(said)
    if fault is None and runs:
        try:
            config_lib.find_file(said["config"].partition(":")[0])
        except (config_lib.InputError, OSError) as error:  # OSError: a name that is too long
            fault = str(error)
    if fault is not None:
        fault = config_lib.one_line(fault)
        fault = fault if len(fault) < LONGEST_FAULT else f"{fault[:LONGEST_FAULT]} ..."
        raise config_lib.InputError(
            f"{path}: {fault}; restore it from a copy, or, where no task of it waits or runs, remove it and give the sweep's command again"
        )
    points = tuple(Point(**{name: kind(point[name]) for name, kind in POINT.items()}) for point in said["points"])
    return Manifest(said["config"], said["overrides"], points, tuple(map(tuple, said["tasks"])), float(said["pack"]))


POINT = {"name": str, "argument": str, "gmacs": float, "seconds": float}
KEYS = {"version": int, "config": str, "overrides": dict, "points": list, "tasks": list, "pack": float}


def _fault(said: Mapping[str, Any]) -> str | None:
    """The first thing that makes no sense in a manifest's JSON, None if all does."""
    if said.get("version") != VERSION:
        return f"version is {said.get('version')!r}, and this vitmed reads {VERSION}"
    if fault := _field_fault(said, KEYS, "the manifest"):
        return fault
    if bad := [f"{name}={value!r}" for name, value in said["overrides"].items() if not isinstance(value, str)]:
        return f"overrides: {bad[0]} is no text"
    for number, point in enumerate(said["points"]):
        if fault := _field_fault(point, POINT, f"points[{number}]"):
            return fault
        if not NAME.fullmatch(point["name"]) or point["name"] in ("launch", FILE_NAME):
            return f"points[{number}]: {point['name'][:40]!r} is no name of a point's folder"
    names = [point["name"] for point in said["points"]]
    for number, task in enumerate(said["tasks"]):
        if not isinstance(task, list) or not all(isinstance(name, str) for name in task):
            return f"tasks[{number}] is no list of points' names"
        if unknown := [name for name in task if name not in names]:
            return f"tasks[{number}]: there is no point {unknown[0]!r}; {config_lib.nearest(unknown[0], names)}"
    placed = [name for task in said["tasks"] for name in task]
    for name in names:
        if names.count(name) != 1 or placed.count(name) != 1:
            return f"point {name!r} is there {names.count(name)} times and in tasks {placed.count(name)} times; each must be once"
    return None if names else "there are no points"


def _field_fault(value: Any, fields: Mapping[str, type], where: str) -> str | None:
    """What is missing, too much or of another type among the fields of a JSON object; numbers must be finite and not negative."""
    if not isinstance(value, dict):
        return f"{where} is no object"
    if unlike := sorted(fields.keys() ^ value.keys()):
        return f"{where} {'has no' if unlike[0] in fields else 'has an unknown'} {unlike[0]!r}"
    for name, kind in fields.items():
        item = value[name]
        if kind is float:
            if isinstance(item, bool) or not isinstance(item, int | float) or not 0 <= item <= sys.float_info.max:  # nor NaN
                return f"{where}: {name} is {repr(item)[:40]}; it must be a number, at least 0"
        elif type(item) is not kind:
            return f"{where}: {name} is {type(item).__name__}; it must be {kind.__name__}"
    return None
