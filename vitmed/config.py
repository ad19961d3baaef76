"""From the command line to a checked config: `--config=file.py:key=value,...`, `--config.field=value`, and errors made readable.

InputError is what a user can cause: one line, exit status 2, nothing written. MachineError is the machine's own trouble: exit status 1.
"""

import contextlib
import difflib
import importlib.util
import math
import os
import pathlib
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

# Words that stand in a field where numbers may stand as well.
WORDS = ("auto", "none", "balanced")


class InputError(ValueError):
    """Wrong input: one line that says what came, what is allowed and how to mend it; exit status 2, nothing written."""


class UnknownArgumentError(InputError):
    """A config file's argument that it does not have; `allowed` are those that it has."""

    def __init__(self, item: str, allowed: Iterable[str]):
        key, separator, _ = item.partition("=")
        comma = "" if separator else "; a value that holds a comma goes into --config.FIELD=VALUE"
        super().__init__(f"config argument {key!r} is unknown; {nearest(key, allowed)}{comma}")
        self.item, self.allowed = item, tuple(allowed)


class MachineError(RuntimeError):
    """Trouble of the machine, not of the input (disk full, folder locked, no network): one line; exit status 1."""


class LostError(MachineError):
    """Another process of the run has ended, or the network has failed: one line; exit status 75, run it again."""


class Stopped(BaseException):
    """A signal asked the run to stop; `signum` is the signal. Like KeyboardInterrupt it is no Exception: nothing may swallow it."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


def one_line(text: object) -> str:
    """The text in one line, without what would move a terminal's cursor or change its colours: parts of it may come out of a file."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(str(text).split()))


def nearest(name: str, names: Iterable[str]) -> str:
    """The names most like `name`, or all of them where none is, as words for an error."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(names)}"


# --- config files and their arguments -------------------------------------------------------------------------------------------


def find_file(path: str) -> pathlib.Path:
    """The config file as given, else the one of that name that comes with the package."""
    given = pathlib.Path(path)
    if given.is_file():
        return given
    if given.parts in ((given.name,), ("configs", given.name)) and (shipped := shipped_file(given.name)):
        return shipped
    raise InputError(f"--config={path}: no such file; give the path of a config, such as configs/vit2d.py")


def shipped_file(name: str) -> pathlib.Path | None:
    """The config of that name that comes with the package: within it where it is installed, beside it in a checkout."""
    package = pathlib.Path(__file__).parent
    return next((file for file in (package / "configs" / name, package.parent / "configs" / name) if file.is_file()), None)


def load_module(path: str) -> Any:
    """The config file as a module: code that the user trusts. InputError where it cannot be imported or has no get_config."""
    file = find_file(path)
    spec = importlib.util.spec_from_file_location(f"vitmed_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"--config={path}: not a Python file; give one ending in .py")
    module = importlib.util.module_from_spec(spec)
    with errors_of(file):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"--config={path}: has no get_config(arg); see configs/vit2d.py for one")
    return module


@contextlib.contextmanager
def errors_of(file: pathlib.Path) -> Iterable[None]:
    """Name file and line where a config file itself goes wrong."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is a fault of it
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        raise InputError(f"{file}, line {line}: {type(error).__name__}: {error}; mend the config file") from error


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ml_collections.ConfigDict:
    """The config of `file.py` or `file.py:arguments` (only the first colon splits), with `field=value` overrides on top."""
    path, _, argument = spec.partition(":")
    config = from_file(path, argument)
    for field, text in (overrides or {}).items():
        override(config, field, text)
    return config


def from_file(path: str | os.PathLike, argument: str = "") -> ml_collections.ConfigDict:
    """The config that a file gives for its argument."""
    module = load_module(str(path))
    with errors_of(find_file(str(path))):
        config = module.get_config(argument)
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(f"--config={path}: get_config gave {type(config).__name__}; it must return an ml_collections.ConfigDict")
    return config


def extended(path: str | os.PathLike, argument: str, **own: Any) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    """(the config of another file, values): of the arguments those that are the `own` ones of a file built on it, the rest are the other's.

    `own` has the defaults, as `arguments` takes them.
    """
    items = [item for item in argument.split(",") if item]
    mine = [item for item in items if item.partition("=")[0] in own]
    values = arguments(",".join(mine), **own)
    try:
        return from_file(path, ",".join(item for item in items if item not in mine)), values
    except UnknownArgumentError as error:
        raise UnknownArgumentError(error.item, (*error.allowed, *own)) from error


def arguments(text: str, **defaults: Any) -> dict[str, Any]:
    """Parse a config file's `key=value,key=value` by the types of the defaults; `patch` may be written 7 or 2x7x7."""
    values = dict(defaults)
    for item in filter(None, text.split(",")):
        key, separator, value = item.partition("=")
        if key not in defaults:
            raise UnknownArgumentError(item, defaults)
        if not separator:
            raise InputError(f"config argument {key!r} has no value; write {key}={example(defaults[key])}")
        values[key] = parse(f"config argument {key}", value, defaults[key])
    return values


def override(config: ml_collections.ConfigDict, field: str, text: str) -> None:
    """Set one field from its text, by the type that it has; InputError for an unknown field or a value that does not fit."""
    fields = flatten(config.to_dict())
    if field not in fields:
        section = field.rpartition(".")[0]
        there = [name.rpartition(".")[2] for name in fields if name.rpartition(".")[0] == section]
        listed = f"{section or 'the config'} has {', '.join(there)}" if there else f"sections are {', '.join(config)}"
        close = difflib.get_close_matches(field, fields, n=1)
        raise InputError(f"--config.{field}: no such field; {f'did you mean {close[0]}? ' if close else ''}{listed}")
    *parents, leaf = field.split(".")
    owner = config
    for parent in parents:
        owner = owner[parent]
    with owner.ignore_type():
        owner[leaf] = parse(f"--config.{field}", text, fields[field])


def parse(name: str, text: str, like: Any) -> Any:
    """The value written in `text`, of the type of `like`; where `like` is one of WORDS, numbers or a word."""
    if like in WORDS:
        with contextlib.suppress(ValueError, OverflowError):
            return _numbers(text, float)
    if isinstance(like, str) or text == "auto" or (isinstance(like, tuple) and text in WORDS):
        return text
    try:
        if isinstance(like, tuple):
            return _numbers(text, type(like[0]) if like else int)
        if isinstance(like, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        value = float(text)
        if isinstance(like, int) and value != int(value):
            raise ValueError("not a whole number")
        return type(like)(value)
    except (ValueError, KeyError, OverflowError) as error:
        kind = {bool: "true or false", int: "a whole number", float: "a number", tuple: "a list of numbers"}[type(like)]
        raise InputError(f"{name}={text}: not {kind}; write {name}={example(like)}") from error


def _numbers(text: str, kind: type) -> tuple[Any, ...]:
    """'7', '2x7x7', '0,1,2' and '(0, 1, 2)' as a tuple of numbers."""
    parts = text.replace("x", ",").strip("()[] ").strip(",").split(",")
    return tuple(kind(part) for part in parts)


def patch_text(patch_size: Sequence[int]) -> str:
    """A patch size as it is written: 7, or 2x7x7 where the axes differ."""
    return str(patch_size[0]) if len(set(patch_size)) == 1 else "x".join(map(str, patch_size))


def example(like: Any) -> str:
    """A value as it is written on the command line."""
    return ",".join(map(str, like)) if isinstance(like, tuple) else str(like)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def as_tuples(nested: Mapping[str, Any]) -> dict[str, Any]:
    """A config read from JSON, its lists turned into the tuples that they were."""
    turned = {key: as_tuples(value) if isinstance(value, Mapping) else value for key, value in nested.items()}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in turned.items()}


# --- values ---------------------------------------------------------------------------------------------------------------------


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """InputError 'name=value: must be allowed' unless the condition holds."""
    if not condition:
        raise InputError(f"{name}={example(value)}: must be {allowed}")


def one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    """`value` where it is one of the allowed words."""
    allowed = list(allowed)
    if value not in allowed:
        raise InputError(f"{name}={value}: unknown; {nearest(value, allowed)}")
    return value


def per_axis(name: str, value: Sequence[int], rank: int, *, zero: bool = False) -> tuple[int, ...]:
    """One entry per axis, positive or also `zero`; a single entry stands for all of them."""
    require(all(entry >= 1 - zero for entry in value), name, tuple(value), "positive, or 0" if zero else "positive")
    require(len(value) in (1, rank), name, tuple(value), f"one number, or {rank} for {rank} axes")
    return tuple(value) * rank if len(value) == 1 else tuple(value)


def finite(name: str, value: float, *, least: float = -math.inf, most: float = math.inf) -> float:
    """`value` where it is a finite number within bounds."""
    require(math.isfinite(value) and least <= value <= most, name, value, f"a finite number from {least:g} to {most:g}")
    return value
