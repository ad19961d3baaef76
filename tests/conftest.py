"""What several test files share: where real data lie, and a small config that trains in seconds."""

import importlib.util
import os
import pathlib
import sys
import types

import jax
import killing
import pytest

from vitmed import cli
from vitmed import config as config_lib

cli.compile_calls_once()  # as every command does, before JAX looks for devices
ROOT = pathlib.Path(__file__).parent.parent
SHARED = pathlib.Path(os.environ.get("VITMED_SHARED", ROOT.parent / "shared"))

# The smallest run that still goes through everything: two seeds, three steps an epoch of which the last is not full.
SMALL = {
    "model.variant": "vit_micro",
    "train.epochs": "2",
    "train.batch_size": "250",
    "seeds": "0,1",
}


@pytest.fixture(scope="session", autouse=True)
def _programs(tmp_path_factory):
    """Compile every program of the session once, in this process and in those it starts."""
    folder = str(tmp_path_factory.mktemp("programs"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _shared(folder: str, witness: str) -> pathlib.Path:
    if not (SHARED / folder / witness).exists():
        pytest.skip(f"no {witness} in {SHARED / folder}; set VITMED_SHARED to the folder that holds {folder}/")
    return SHARED / folder


@pytest.fixture
def shared_data() -> pathlib.Path:
    """The folder of real MedMNIST files, or a skip that says where they were looked for."""
    return _shared("data", "breastmnist.npz")


@pytest.fixture
def shared_fixtures() -> pathlib.Path:
    """The folder of what timm computes, or a skip."""
    return _shared("fixtures", "micro_vit.safetensors")


@pytest.fixture
def vit_tiny() -> str:
    """The file of the real ImageNet ViT-Tiny, or a skip."""
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    return str(_shared("weights", name) / name)


@pytest.fixture
def small_config():
    """A function of extra overrides: the quickstart on phantom2d, as small as it gets."""

    def make(argument: str = "patch=14", **overrides: str):
        return config_lib.load(f"{ROOT}/configs/quickstart.py:{argument}", SMALL | {k.replace("__", "."): v for k, v in overrides.items()})

    return make


@pytest.fixture(scope="session")
def runs2d(tmp_path_factory):
    """An undisturbed run of 2D phantoms, and what it takes to disturb others like it."""
    return killing.Runs(2, tmp_path_factory.mktemp("runs2d"))


@pytest.fixture(scope="session")
def runs3d(tmp_path_factory):
    """The same of 3D phantoms."""
    return killing.Runs(3, tmp_path_factory.mktemp("runs3d"))


@pytest.fixture(scope="session")
def evaluator():
    """Load medmnist/evaluator.py by path: `import medmnist` would import torch, and its info.py makes ~/.medmnist."""
    package = types.ModuleType("medmnist")
    info = types.ModuleType("medmnist.info")
    info.INFO, info.DEFAULT_ROOT = {}, None
    folder = pathlib.Path(importlib.util.find_spec("medmnist").origin).parent
    spec = importlib.util.spec_from_file_location("medmnist_evaluator", folder / "evaluator.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "medmnist", package)
        patch.setitem(sys.modules, "medmnist.info", info)
        spec.loader.exec_module(module)
    return module
