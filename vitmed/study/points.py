"""The points of a sweep: a config's `sweep()` gives the arguments of each, and each has a folder named after them."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vitmed import config


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


def of_sweep(module: Any) -> list[Point]:
    """The points of a config module; InputError where it has no `sweep()` or two of its points share a name."""
    if not hasattr(module, "sweep"):
        raise config.InputError(f"{module.__file__}: has no sweep(); leave --sweep out, or add one as in configs/vit2d.py")
    with config.errors_of(pathlib.Path(module.__file__)):
        points = [Point({key: str(value) for key, value in arguments.items()}) for arguments in module.sweep()]
    names = [point.name for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not points:
        fault = f"has several points named {', '.join(twice)}" if twice else "is empty"
        raise config.InputError(f"{module.__file__}: sweep() {fault}; every point needs arguments of its own")
    return points


def varied(configs: Sequence[Mapping[str, Any]]) -> set[str]:
    """The dotted names of the fields in which the points' configs differ: what an override may not set for all of them."""
    flat = [config.flatten(one) for one in configs]
    return {name for name in flat[0] if any(one.get(name) != flat[0][name] for one in flat)}


def ordered(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Results by data set, then from the coarsest patch to the finest."""
    return sorted(results, key=lambda result: (result["dataset"], result["num_tokens"]))
