"""What several test files share: where real data lie, and a small config that trains in seconds."""

import os
import pathlib

import jax
import pytest

from vitmed import config as config_lib

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


@pytest.fixture
def shared_data() -> pathlib.Path:
    """The folder of real MedMNIST files, or a skip that says where they were looked for."""
    folder = SHARED / "data"
    if not (folder / "breastmnist.npz").exists():
        pytest.skip(f"no real data in {folder}; set VITMED_SHARED to the folder that holds data/")
    return folder


@pytest.fixture
def small_config():
    """A function of extra overrides: the quickstart on phantom2d, as small as it gets."""

    def make(argument: str = "patch=14", **overrides: str):
        return config_lib.load(f"{ROOT}/configs/quickstart.py:{argument}", SMALL | {k.replace("__", "."): v for k, v in overrides.items()})

    return make
