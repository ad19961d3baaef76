"""The points of a sweep: a config's `sweep()` gives the arguments of each, and each has a folder named after them."""

import dataclasses
import inspect
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vitmed import config
from vitmed.runs import folder


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep: its config arguments and the name of its folder, such as breastmnist-patch7."""

    arguments: Mapping[str, str]

    @property
    def argument(self) -> str:
        """What stands after the colon of --config."""
        return ",".join(f"{key}={value}" for key, value in self.arguments.items())

    @property
    def name(self) -> str:
        """The data set, then every other argument with its value; only characters that every file system takes."""
        parts = [value if key == "dataset" else f"{key}{value}" for key, value in self.arguments.items()]
        return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts))


def of_sweep(module: Any, argument: str = "") -> list[Point]:
    """The points of a config module; InputError where it has no `sweep()` or two of its points share a name.

    `argument` (key=value,...) holds for all points: it takes the place of what they would vary, and a `sweep` that takes an argument is
    given it.
    """
    if not hasattr(module, "sweep"):
        raise config.InputError(f"{module.__file__}: has no sweep(); leave --sweep out, or add one as in configs/vit2d.py")
    with config.errors_of(pathlib.Path(module.__file__)):
        given = (argument,) if inspect.signature(module.sweep).parameters else ()
        points = [Point({key: str(value) for key, value in arguments.items()}) for arguments in module.sweep(*given)]
    if argument:
        points = shared(points, argument)
    names = [point.name for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not points:
        fault = f"has several points named {', '.join(twice)}" if twice else "is empty"
        raise config.InputError(f"{module.__file__}: sweep() {fault}; every point needs arguments of its own")
    return points


def shared(points: Sequence[Point], argument: str) -> list[Point]:
    """The points with these arguments instead of their own; of those that are then alike one is left."""
    items = [item.partition("=") for item in argument.split(",") if item]
    given = {key: value for key, separator, value in items if separator}
    if len(given) < len(items):
        raise config.InputError(f"config argument {argument!r}: write key=value,key=value with every key once")
    every = [Point({**point.arguments, **given}) for point in points]
    return list({point.argument: point for point in every}.values())


def selected(points: Sequence[Point], expression: str) -> list[Point]:
    """The points that an expression such as dataset=breastmnist,patch=7|4 keeps; InputError for a key or value that keeps none."""
    wanted = _parsed(expression, {key: None for point in points for key in point.arguments})
    for key, values in wanted.items():
        # First among all points, then among those that the other keys leave, so that every value named keeps at least one point.
        others = {other: allowed for other, allowed in wanted.items() if other != key}
        for among in (points, [point for point in points if _matches(point, others)]):
            there = list(dict.fromkeys(point.arguments[key] for point in among if key in point.arguments))
            for value in values:
                if value not in there:
                    advice = config.nearest(value, there) if there else "the other keys leave no point that has it"
                    where = "" if among is points else f" beside {','.join(_text(other, given) for other, given in others.items())}"
                    raise config.InputError(f"--points={expression}: no point has {key}={value}{where}; {advice}")
    return [point for point in points if _matches(point, wanted)]


def expression_of(kept: Sequence[Point], points: Sequence[Point]) -> str | None:
    """What `selected` would need to keep just these of all points; None where no expression does."""
    keys = list(dict.fromkeys(key for point in points for key in point.arguments))
    values = {key: list(dict.fromkeys(point.arguments[key] for point in kept if key in point.arguments)) for key in keys}
    wanted = {key: of_kept for key, of_kept in values.items() if of_kept}

    def keeps(wanted: Mapping[str, Sequence[str]]) -> bool:
        return [point for point in points if _matches(point, wanted)] == list(kept)

    if not kept or not keeps(wanted):
        return None
    for key in keys:  # those that decide nothing are left out
        fewer = {other: of_kept for other, of_kept in wanted.items() if other != key}
        wanted = fewer if fewer and keeps(fewer) else wanted
    return ",".join(_text(key, of_kept) for key, of_kept in wanted.items())


def _parsed(expression: str, keys: Iterable[str]) -> dict[str, list[str]]:
    """The values that an expression allows, by key; InputError where it is none."""
    keys = list(keys)
    wanted: dict[str, list[str]] = {}
    for item in expression.split(","):
        key, separator, values = item.partition("=")
        if key not in keys:
            raise config.InputError(f"--points={expression}: the sweep's points have no {key!r}; {config.nearest(key, keys)}")
        if not separator or "" in values.split("|") or key in wanted:
            raise config.InputError(f"--points={expression}: write every key once, with its values: {key}=VALUE, or {key}=VALUE|VALUE")
        wanted[key] = values.split("|")
    return wanted


def _matches(point: Point, wanted: Mapping[str, Sequence[str]]) -> bool:
    return all(point.arguments.get(key) in values for key, values in wanted.items())


def _text(key: str, values: Sequence[str]) -> str:
    return f"{key}={'|'.join(values)}"


def varied(configs: Sequence[Mapping[str, Any]]) -> set[str]:
    """The dotted names of the fields in which the points' configs differ: what an override may not set for all of them."""
    flat = [config.flatten(one) for one in configs]
    return {name for name in flat[0] if any(one.get(name) != flat[0][name] for one in flat)}


# What the arguments that all recipes share set: also where every point gives the same one, its folder is named after it.
SET_BY_ARGUMENTS = {
    "dataset": {"data.name"},
    "patch": {"model.patch_size"},
    "patches": {"model.patch_sizes", "model.patch_size"},
    "variant": {"model.variant"},
    "size": {"data.size"},
    "pretrained": {"model.pretrained"},
}


def named(points: Iterable[Point]) -> set[str]:
    """The dotted names of the fields that the points' names tell: an override would make them lie."""
    return set().union(*(SET_BY_ARGUMENTS.get(key, set()) for point in points for key in point.arguments))


def results_of(run_folder: folder.RunFolder, name: str) -> dict[str, Mapping[str, Any]]:
    """What result.json says of a finished run, by its name, and of each of its other patch sizes, by theirs within it."""
    inside = {f"{name}/{path.parent.name}": folder.RunFolder(path.parent) for path in run_folder.at_patch("").path.glob("*/result.json")}
    found = {label: each.read_result() for label, each in ({name: run_folder} | inside).items()}
    return {label: result for label, result in found.items() if result is not None}


def ordered(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Results by their points' names: by data set, then from the coarsest patch to the finest."""
    return dict(sorted(results.items(), key=lambda named: (named[1]["dataset"], named[1]["num_tokens"])))
