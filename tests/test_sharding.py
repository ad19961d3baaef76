"""Meshes: their errors here, and in a process of its own with eight fake devices that training does not depend on them.

Run as a program it trains on every mesh and prints, as JSON, the losses and what lies on each device.
"""

import functools
import json
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitmed import config
from vitmed.models import build, inputs
from vitmed.training import augment, optim, programs, sharding, tasks

MESHES = [(1, 1), (8, 1), (1, 8), (2, 4)]  # data x fsdp
SEEDS, K, B, N = (0, 1), 5, 8, 24
# The narrowest model of which a matrix is large enough to be split: 64 x 256.
SIZES = build.plain(64, 2, 4)


def train(data, fsdp):
    """Five steps of two runs, the best kept and used: losses, predictions, and the shapes of two parameters here and per device."""
    model = build.model(SIZES, patch_size=(4, 4), num_classes=3, drop_path=0.5)
    recipe = programs.Recipe(
        init=functools.partial(build.initialise, model, image_size=(8, 8), in_channels=1),
        apply=model.apply,
        prepare=functools.partial(inputs.prepare, in_channels=1, mean=(0.5,), std=(0.5,)),
        task=tasks.TASKS["multi-class"],
        optimizer=optim.adamw(lambda step: jnp.float32(1e-3), weight_decay=0.05, beta1=0.9, beta2=0.999, epsilon=1e-8),
        augmentation=augment.Augmentation(flip_w=0.5, brightness=0.2),
        seeds=SEEDS,
        mesh=sharding.make_mesh(data=data, fsdp=fsdp),
        mapped=(data, fsdp) != (2, 4),  # one of them as one batched program
    )
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (N, 8, 8, 1)).astype(np.uint8), rng.integers(0, 3, (N, 1)).astype(np.uint8)
    batches = {"indices": rng.integers(0, N, (len(SEEDS), K, B)).astype(np.int32), "mask": np.ones((len(SEEDS), K, B), bool)}
    batches["mask"][:, -1, 5:] = False
    resident = jax.device_put({"images": images, "labels": labels}, sharding.replicated(recipe.mesh))
    state, best = programs.create(recipe)
    made = {name: describe(of.params) for name, of in (("state", state), ("best", best))} | {"moments": describe(state.opt_state[0].mu)}
    program, _ = programs.compile_chunk(recipe, batches, resident)
    before, losses = program(state, batches, 2, resident)
    state, rest = program(before, {name: np.roll(array, -2, axis=1) for name, array in batches.items()}, K - 2, resident)
    predict, _ = programs.compile_predict(recipe, images, labels, batch_size=B)
    batch = {"images": images[:B], "labels": labels[:B]}
    untrained, _ = predict(best.params, batch)  # `state` was given away; what began as its copy was not
    best = programs.keep_best(recipe)(best, state, np.array([1.0, np.inf]), 1)
    probabilities, _ = predict(best.params, batch)
    return {
        "losses": np.concatenate([losses[:, :2], rest[:, : K - 2]], axis=1).tolist(),
        "untrained": np.asarray(untrained).tolist(),
        "probabilities": np.asarray(probabilities).tolist(),
        "made": made,
        "after": describe(state.params),
        "kept": describe(best.params),
        "devices": len(state.step.sharding.device_set),
        "given_away": before.step.is_deleted(),
    }


def describe(params):
    """The shape of a large and of a small parameter as a whole and on every device."""
    leaves = {"large": params["block_00"]["mlp"]["fc1"]["kernel"], "small": params["norm"]["scale"]}
    return {name: [leaf.shape, *(shard.data.shape for shard in leaf.addressable_shards)] for name, leaf in leaves.items()}


@pytest.fixture(scope="module")
def trained():
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # a fraction of the time to compile
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "XLA_FLAGS": quick}
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return {tuple(mesh): result for mesh, result in json.loads(done.stdout)}


@pytest.mark.parametrize("mesh", MESHES)
def test_training_does_not_depend_on_the_mesh(trained, mesh):
    result, expected = trained[mesh], trained[1, 1]
    assert result["devices"] == mesh[0] * mesh[1]
    assert result["given_away"]
    losses = np.array(result["losses"])
    assert losses.shape == (len(SEEDS), K)
    assert losses[0] != pytest.approx(losses[1])
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(result["untrained"], expected["untrained"], atol=1e-6)
    np.testing.assert_allclose(result["probabilities"], expected["probabilities"], atol=1e-5)
    assert np.abs(np.subtract(*result["untrained"])).max() > 1e-3  # each seed begins elsewhere
    moved = np.abs(np.subtract(result["probabilities"], result["untrained"])).max(axis=(1, 2))
    assert moved[0] > 1e-3
    assert moved[1] == 0  # the loss of the second run was not finite: its best is still the beginning


@pytest.mark.parametrize("mesh", MESHES)
def test_large_parameters_are_split_over_fsdp_and_runs_never(trained, mesh):
    result, (data, fsdp) = trained[mesh], mesh
    for described in (*result["made"].values(), result["after"], result["kept"]):
        assert described["large"] == [[2, 64, 256]] + [[2, 64, 256 // fsdp]] * (data * fsdp)
        assert described["small"] == [[2, 64]] * (1 + data * fsdp)


def fake_mesh(data, fsdp):
    return types.SimpleNamespace(shape={"data": data, "fsdp": fsdp})


def test_the_last_of_the_largest_axes_that_divide_is_split():
    shapes = {
        "tall": (2, 512, 256),
        "wide": (2, 256, 512),
        "square": (2, 256, 256),
        "odd": (2, 4096, 255),
        "none": (2, 501, 255),
        "small": (2, 64, 64),
        "scalar": (2,),
    }
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
    places = sharding.state(mesh, {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})
    split = {name: place.spec.index("fsdp") if "fsdp" in place.spec else None for name, place in places.items()}
    assert split == {"tall": 1, "wide": 2, "square": 2, "odd": 1, "none": None, "small": None, "scalar": None}


@pytest.mark.parametrize(
    ("data", "fsdp", "words"),
    [
        (-1, 3, r"mesh\.fsdp=3 .*8 devices.* 1, 2, 4, 8"),
        (-1, 16, r"mesh\.fsdp=16 .*8 devices.* 1, 2, 4, 8"),
        (16, 1, r"mesh\.data=16 .*16 devices.*there are 8"),
        (4, 4, r"mesh\.data=4 times mesh\.fsdp=4 needs 16 devices.*there are 8"),
        (0, 1, r"mesh\.data=0.*positive"),
        (1, 0, r"mesh\.fsdp=0.*positive"),
        (-2, 1, r"mesh\.data=-2.*positive"),
        (-1, -1, r"mesh\.fsdp=-1.*positive"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_what_can(data, fsdp, words):
    with pytest.raises(config.InputError, match=words):
        sharding.make_mesh(data=data, fsdp=fsdp, devices=[object()] * 8)


def test_data_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    assert dict(mesh.shape) == {"data": len(jax.devices()), "fsdp": 1}


@pytest.mark.parametrize(
    ("data", "fsdp", "batch_size"), [(8, 1, 12), (8, 1, 9), (1, 8, 12), (1, 8, 7), (4, 2, 12), (4, 2, 18), (2, 4, 12), (2, 4, 6), (4, 2, 7)]
)
def test_a_batch_that_does_not_split_is_refused_with_advice_that_helps(data, fsdp, batch_size):
    with pytest.raises(config.InputError, match=rf"train\.batch_size={batch_size} .*8 devices.*multiple of 8") as caught:
        sharding.check_batch(fake_mesh(data, fsdp), "train.batch_size", batch_size)
    advice = {"mesh.data": data, "mesh.fsdp": fsdp}
    advice |= {name: int(value) for name, value in re.findall(r"(mesh\.(?:data|fsdp))=(\d+)", str(caught.value))}
    assert advice != {"mesh.data": data, "mesh.fsdp": fsdp}
    assert advice["mesh.data"] * advice["mesh.fsdp"] <= 8
    sharding.check_batch(fake_mesh(advice["mesh.data"], advice["mesh.fsdp"]), "train.batch_size", batch_size)


@pytest.mark.parametrize(("data", "fsdp", "batch_size"), [(8, 1, 16), (2, 4, 8), (1, 1, 7)])
def test_a_batch_that_splits_is_accepted(data, fsdp, batch_size):
    sharding.check_batch(fake_mesh(data, fsdp), "train.batch_size", batch_size)


if __name__ == "__main__":
    print(json.dumps([(mesh, train(*mesh)) for mesh in MESHES]))
