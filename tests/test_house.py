"""The house rules, read from the sources: who may import whom (DESIGN.md), forbidden packages, file names and lengths.

`faults` takes any mapping of paths to sources, so that the rules themselves are tested on sources that break them.
"""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCANNED = ("vitmed", "configs", "launch", "benchmarks")
LEAVES = {"config", "fields", "metrics", "cost", "npz"}
CLIS = {"main", "evaluate", "predict", "export", "report"}
WINGS = {"data", "models", "runs", "study", "training"}
BELOW = LEAVES | WINGS
TOP = {
    "apart",
    "budget",
    "cli",
    "experiment",
    "building",
    "external",
    "features",
    "forecast",
    "inference",
    "network",
    "planning",
    "record",
    "start",
    "sweep",
}  # what the CLIs are made of
# Of ours: what each part may import, as dotted names below `vitmed` (a name stands for all below it).
MAY_IMPORT = {
    "config": set(),
    "metrics": {"config"},  # the leaves share config's error classes, which import nothing of ours
    "cost": {"config"},
    "fields": {"config"},
    "npz": set(),
    "data": LEAVES | {"data"},
    "models": LEAVES | {"models"},
    "runs": LEAVES | {"runs"},
    "study": LEAVES | {"study", "runs.folder"},
    "training": LEAVES | {"training", "data", "models", "runs"},
    "checks": BELOW,
    "network": BELOW,
    "planning": BELOW | {"checks", "network"},
    "budget": BELOW | {"planning"},
    "record": BELOW | {"network", "planning"},
    "features": BELOW | {"planning"},
    "start": BELOW | {"network", "planning"},
    "building": BELOW | {"budget", "checks", "planning"},
    "experiment": BELOW | {"building", "features", "network", "planning", "record", "start"},
    "external": BELOW | {"planning"},
    "inference": BELOW | {"budget", "experiment", "start"},
    "cli": {"config"},
    "apart": {"cli", "config"},
    "forecast": BELOW | {"budget", "network", "experiment"},
    "sweep": BELOW | {"apart", "budget", "cli", "experiment", "forecast"},
    **dict.fromkeys(CLIS, BELOW | CLIS | TOP),
    "configs": LEAVES,
    "launch": BELOW | CLIS | TOP,
    "benchmarks": BELOW | CLIS | TOP,
    "__init__": set(),
}
# Top-level packages of ours that stand beside `vitmed`, and who may import them.
BESIDE = {"configs": CLIS | {"configs", "launch", "benchmarks"}, "launch": {"launch"}, "benchmarks": {"benchmarks"}, "tests": set()}
TORCH = {"torch", "torchvision", "medmnist"}  # importing medmnist imports torch
DEVICE = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
FORBIDDEN = {"data": DEVICE, "study": DEVICE, "models": {"optax", "grain", "orbax"}}
ONLY_THESE = {"metrics": {"numpy"}, "cost": set(), "npz": {"numpy"}}  # besides the standard library
SEE_CONFIG_DICTS = CLIS | {"experiment", "inference", "planning", "budget", "forecast", "checks", "network", "config", "configs"}
LOOP = "vitmed/training/loop.py"
BAD_NAMES = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
LONGEST = {"tests": 500}
LONGEST_OTHERWISE = 300


def part(path):
    """vitmed/data/x.py -> data; vitmed/cost.py -> cost; configs/x.py -> configs."""
    folders = pathlib.PurePosixPath(path).parts
    return pathlib.PurePosixPath(folders[1]).stem if folders[0] == "vitmed" else folders[0]


def imports(path, tree):
    """Yield (line, dotted name) of every import at any depth; `from a import b` is a.b, relative ones resolved."""
    package = list(pathlib.PurePosixPath(path).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{names}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def within(name, allowed):
    return any(f"{name}.".startswith(f"{each}.") for each in allowed)


def import_fault(path, name):
    """Say why this file may not import that name; None if it may."""
    here, (top, _, below) = part(path), name.partition(".")
    if here not in MAY_IMPORT:
        return f"a new part of the house, {here}: say in MAY_IMPORT whom it may import"
    if top == "vitmed":
        if below.startswith("__") or within(below, MAY_IMPORT[here]):
            return None
        return f"{here} must not import {name}"
    if top in BESIDE:
        return None if here in BESIDE[top] else f"{here} must not import {name}"
    if top in TORCH:
        return f"nothing imports {top}"
    if top in FORBIDDEN.get(here, ()):
        return f"{here} must not import {top}"
    if here in ONLY_THESE and top not in ONLY_THESE[here] | sys.stdlib_module_names:
        return f"{here} must not import {top}"
    if top == "ml_collections" and here not in SEE_CONFIG_DICTS and path != LOOP:
        return f"only the CLIs, experiment, loop, config and configs see ml_collections, not {path}"
    return None


def mentions_config_dict(tree):
    """Yield lines that name a ConfigDict in code, also as an attribute or in a quoted annotation."""
    for node in ast.walk(tree):
        name = getattr(node, "id", None) or getattr(node, "attr", None)
        if isinstance(node, ast.arg | ast.AnnAssign) and isinstance(node.annotation, ast.Constant):
            name = str(node.annotation.value).rpartition(".")[2]
        if name in ("ConfigDict", "FrozenConfigDict", "ml_collections"):
            yield getattr(node, "lineno", 0)


def faults(sources):
    """Hold {path: source} against every rule; return a line per fault."""
    found = []
    for path, source in sources.items():
        folder, _, rest = path.partition("/")
        if pathlib.PurePosixPath(rest).name in BAD_NAMES:
            found.append(f"{path}: a file has one reason to change; name what it is about")
        num_lines, longest = len(source.splitlines()), LONGEST.get(folder, LONGEST_OTHERWISE)
        if num_lines > longest:
            found.append(f"{path}: {num_lines} lines, at most {longest}")
        if folder not in SCANNED:
            continue
        tree = ast.parse(source, filename=path)
        found += [f"{path}:{line}: {fault}" for line, name in imports(path, tree) if (fault := import_fault(path, name))]
        if part(path) not in SEE_CONFIG_DICTS and path != LOOP:
            found += [f"{path}:{line}: takes plain arguments, not a ConfigDict" for line in mentions_config_dict(tree)]
    return found


def ours():
    """Read every Python file of the project."""
    files = [file for folder in (*SCANNED, "tests") for file in sorted((ROOT / folder).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def test_the_house_rules_hold():
    sources = ours()
    assert "vitmed/cost.py" in sources, "the checker reads the wrong folder"
    found = faults(sources)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "says"),
    [
        ("vitmed/data/a.py", "from vitmed import models", "data must not import vitmed.models"),
        ("vitmed/data/a.py", "from vitmed.models import vit", "data must not import vitmed.models.vit"),
        ("vitmed/data/a.py", "import vitmed.models.vit as v", "data must not import"),
        ("vitmed/data/a.py", "from vitmed import cost, training", "data must not import vitmed.training"),
        ("vitmed/data/a.py", "from ..models import vit", "data must not import vitmed.models.vit"),
        ("vitmed/data/a.py", "from .. import runs", "data must not import vitmed.runs"),
        ("vitmed/data/a.py", "def f():\n    if 1:\n        from vitmed import runs", "a.py:3: data must not import vitmed.runs"),
        ("vitmed/data/a.py", "import importlib\nimportlib.import_module('vitmed.runs')", "data must not import"),
        ("vitmed/data/a.py", "__import__('jax')", "data must not import jax"),
        ("vitmed/data/a.py", "import vitmed", "data must not import vitmed"),
        ("vitmed/data/a.py", "import jax.numpy as jnp", "data must not import jax"),
        ("vitmed/study/a.py", "from jax import numpy", "study must not import jax"),
        ("vitmed/study/a.py", "from vitmed.runs import checkpoint", "study must not import vitmed.runs.checkpoint"),
        ("vitmed/study/a.py", "from vitmed import runs", "study must not import vitmed.runs"),
        ("vitmed/study/a.py", "from vitmed.runs import folder_of_others", "study must not import"),
        ("vitmed/models/a.py", "import optax", "models must not import optax"),
        ("vitmed/models/a.py", "import grain.python", "models must not import grain"),
        ("vitmed/models/a.py", "from vitmed import runs", "models must not import vitmed.runs"),
        ("vitmed/models/a.py", "import ml_collections", "see ml_collections"),
        ("vitmed/runs/a.py", "from vitmed.training import loop", "runs must not import vitmed.training.loop"),
        ("vitmed/training/a.py", "from vitmed import experiment", "training must not import vitmed.experiment"),
        ("vitmed/training/a.py", "from vitmed import study", "training must not import vitmed.study"),
        ("vitmed/training/step.py", "from ml_collections import ConfigDict", "see ml_collections"),
        ("vitmed/training/step.py", "def f(config: 'ml_collections.ConfigDict'): ...", "not a ConfigDict"),
        ("vitmed/training/step.py", "def f(x): return isinstance(x, config.ml_collections.ConfigDict)", "not a ConfigDict"),
        ("vitmed/experiment.py", "from vitmed import main", "experiment must not import vitmed.main"),
        ("vitmed/config.py", "from vitmed import metrics", "config must not import vitmed.metrics"),
        ("vitmed/cost.py", "from vitmed import metrics", "cost must not import vitmed.metrics"),
        ("vitmed/cost.py", "import numpy", "cost must not import numpy"),
        ("vitmed/metrics.py", "import sklearn.metrics", "metrics must not import sklearn"),
        ("vitmed/main.py", "def f():\n    import torch", "nothing imports torch"),
        ("vitmed/data/medmnist.py", "from medmnist import INFO", "nothing imports medmnist"),
        ("benchmarks/a.py", "import torch", "nothing imports torch"),
        ("configs/a.py", "from vitmed.training import loop", "configs must not import"),
        ("vitmed/models/a.py", "import benchmarks.a", "models must not import benchmarks.a"),
        ("vitmed/main.py", "from tests import test_x", "main must not import tests.test_x"),
        ("vitmed/server.py", "import os", "a new part of the house, server"),
        ("vitmed/__init__.py", "from vitmed import models", "__init__ must not import"),
        ("vitmed/data/utils.py", "", "one reason to change"),
        ("tests/helpers.py", "", "one reason to change"),
        ("vitmed/data/a.py", "\n" * 301, "301 lines, at most 300"),
        ("tests/test_a.py", "\n" * 501, "501 lines, at most 500"),
    ],
)
def test_the_checker_finds(path, source, says):
    found = faults({path: source})
    assert len(found) >= 1
    assert says in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "vitmed/data/a.py",
            "import grain\nimport numpy\nfrom vitmed import config, cost\nfrom vitmed.data import sources\nfrom . import folder",
        ),
        ("vitmed/models/a.py", "import flax.linen as nn\nimport jax\nfrom vitmed.models import vit\nfrom vitmed import config"),
        ("vitmed/runs/checkpoint.py", "import jax\nimport orbax.checkpoint as ocp\nfrom vitmed.runs import folder"),
        ("vitmed/study/a.py", "from vitmed.runs import folder\nfrom vitmed.runs.folder import RunFolder\nfrom vitmed import metrics"),
        ("vitmed/training/a.py", "import optax\nfrom vitmed.training import tasks\nfrom vitmed import data, models, runs"),
        ("vitmed/training/loop.py", "import ml_collections\ndef f(config: ml_collections.ConfigDict): ..."),
        ("vitmed/experiment.py", "import ml_collections\nfrom vitmed import training, study, cost"),
        ("vitmed/main.py", "import ml_collections\nfrom vitmed import experiment, report, __version__\nfrom vitmed.study import page"),
        ("vitmed/metrics.py", "import dataclasses\nimport numpy as np\nfrom vitmed import config"),
        ("vitmed/data/a.py", "'torch and ConfigDict may be spoken of'\nrun_config = config.load  # torch"),
        ("configs/a.py", "import ml_collections\nfrom vitmed import config"),
        ("launch/a.py", "from launch import sweep\nfrom vitmed import experiment"),
        ("benchmarks/a.py", "import jax\nfrom vitmed.training import step"),
        ("tests/test_a.py", "import torch\n" + "\n" * 400),
    ],
)
def test_the_checker_lets_pass(path, source):
    assert faults({path: source}) == []
