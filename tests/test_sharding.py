"""Meshes: their errors here, and in a process of its own with eight fake devices that training does not depend on them.

Run as a program it trains on every mesh and prints, as JSON, the losses and what lies on each device.
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vitmed import config
from vitmed.models import attention, build, inputs
from vitmed.runs import checkpoint
from vitmed.training import augment, optim, programs, sharding, tasks

ONE = (1, 1, 1)
MESHES = [ONE, (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]  # data x fsdp x sequence; of five tokens some devices have none
BATCHED = (2, 2, 2)  # both runs as one batched program
SEEDS, K, B, N = (0, 1), 20, 8, 24
# The narrowest model of which a matrix is large enough to be split: 64 x 256.
SIZES = build.plain(64, 2, 4)


def make_recipe(mesh, *, seeds=SEEDS, pooling="cls", image=(8, 8), patch=(4, 4), form="plain", sizes=SIZES):
    """A recipe of runs on a mesh of (data, fsdp, sequence)."""
    devices = sharding.make_mesh(**dict(zip(sharding.AXES, mesh, strict=True)))
    num_tokens = int(np.prod(np.floor_divide(image, patch))) + 1
    local = attention.choose(form, platform="cpu", num_tokens=num_tokens)
    model = build.model(
        build.pooled(sizes, pooling),
        patch_size=patch,
        num_classes=3,
        drop_path=0.5,
        attention=sharding.attention(devices, local, num_tokens=num_tokens),
        token_multiple=mesh[2],
    )
    return programs.Recipe(
        init=functools.partial(build.initialise, model, image_size=image, in_channels=1),
        apply=model.apply,
        prepare=functools.partial(inputs.prepare, in_channels=1, mean=(0.5,), std=(0.5,)),
        task=tasks.TASKS["multi-class"],
        optimizer=optim.adamw(lambda step: jnp.float32(1e-3), weight_decay=0.05, beta1=0.9, beta2=0.999, epsilon=1e-8),
        augmentation=augment.Augmentation(flip_w=0.5, brightness=0.2),
        seeds=seeds,
        mesh=devices,
        mapped=mesh != BATCHED,
    )


def examples():
    """Images and labels, and the batches of K steps of which the last is not full."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (N, 8, 8, 1)).astype(np.uint8), rng.integers(0, 3, (N, 1)).astype(np.uint8)
    batches = {"indices": rng.integers(0, N, (len(SEEDS), K, B)).astype(np.int32), "mask": np.ones((len(SEEDS), K, B), bool)}
    batches["mask"][:, -1, 5:] = False
    return {"images": images, "labels": labels}, batches


def train(mesh):
    """Twenty steps of two runs, the best kept and used: losses, predictions, and the shapes of two parameters here and per device."""
    recipe, (data, batches) = make_recipe(mesh), examples()
    resident = jax.device_put(data, sharding.replicated(recipe.mesh))
    state, best = programs.create(recipe)
    made = {name: describe(of.params) for name, of in (("state", state), ("best", best))} | {"moments": describe(state.opt_state[0].mu)}
    program, _ = programs.compile_chunk(recipe, batches, resident)
    before, losses = program(state, batches, 2, resident)
    state, rest = program(before, {name: np.roll(array, -2, axis=1) for name, array in batches.items()}, K - 2, resident)
    predict, _ = programs.compile_predict(recipe, data["images"], data["labels"], batch_size=B)
    batch = {name: array[:B] for name, array in data.items()}
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


def with_options(recipe):
    """The recipe with everything on that acts within a step."""
    how = {"weight_decay": 0.05, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "layer_decay": 0.7, "depth": SIZES.depth}
    objective = tasks.objective(recipe.task, num_classes=3, label_smoothing=0.1, focal_gamma=1.0, class_weights=(1.0, 2.0, 0.5))
    optimizer = optim.adamw(lambda step: jnp.float32(1e-3), **how)
    return dataclasses.replace(recipe, optimizer=optimizer, objective=objective, mixup=0.4, ema_decay=0.9)


def train_across(first, second, change=lambda recipe: recipe):
    """The losses of twenty steps, twelve on one mesh, a checkpoint, the rest on another; and the norms of what is then measured."""
    data, batches = examples()
    losses = []
    with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpoints(folder) as checkpoints:
        for mesh, start, stop in ((first, 0, 12), (second, 12, K)):
            recipe = change(make_recipe(mesh))
            resident = jax.device_put(data, sharding.replicated(recipe.mesh))
            state, best = programs.create(recipe)
            if start:
                items = checkpoints.restore(checkpoints.latest(), state=recipe.abstract[0], best=recipe.abstract[1])
                state, best = items["state"], items["best"]
            program, _ = programs.compile_chunk(recipe, batches, resident)
            state, found = program(state, {name: np.roll(array, -start, axis=1) for name, array in batches.items()}, stop - start, resident)
            losses.append(np.asarray(found)[:, : stop - start])
            checkpoints.save(stop, state=state, best=best, progress={})
            checkpoints.finish()
    norms = [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(programs.whole(recipe, state.measured))]
    return {"losses": np.concatenate(losses, axis=1).tolist(), "norms": norms}


def pooled(mesh):
    """The gradient of a model that takes the mean over tokens, by its squared norm and in one place."""
    recipe, (data, _) = make_recipe(mesh, seeds=(0,), pooling="mean"), examples()
    params = recipe.init(jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda params: recipe.apply({"params": params}, recipe.prepare(data["images"][:B])).std()))(params)
    return [float(optax.tree.norm(gradient, squared=True)), *np.asarray(gradient["pos_embed"][-1, :3], float)]


def memory(mesh, form):
    """Bytes per device of a training program of 344 tokens, by what XLA says of it: what it is given, and what it takes besides."""
    recipe = make_recipe(mesh, seeds=(0,), image=(28, 28, 28), patch=(4, 4, 4), form=form, sizes=build.plain(96, 2, 3))
    batches = {"indices": np.zeros((1, 1, B), np.int32), "mask": np.ones((1, 1, B), bool)}
    resident = {"images": np.zeros((B, 28, 28, 28, 1), np.uint8), "labels": np.zeros((B, 1), np.uint8)}
    program, _ = programs.compile_chunk(recipe, batches, resident)
    return [program.memory.argument_size_in_bytes, program.memory.temp_size_in_bytes]


def describe(params):
    """The shape of a large and of a small parameter as a whole and on every device."""
    leaves = {"large": params["block_00"]["mlp"]["fc1"]["kernel"], "small": params["norm"]["scale"]}
    return {name: [leaf.shape, *(shard.data.shape for shard in leaf.addressable_shards)] for name, leaf in leaves.items()}


def in_a_process(*arguments):
    """What this file prints, run as a program with eight fake devices."""
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # a fraction of the time to compile
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "XLA_FLAGS": quick}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}  # what goes on from a checkpoint is compiled already
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measured():
    return in_a_process()


@pytest.fixture(scope="module")
def trained(measured):
    return {tuple(mesh): result for mesh, result in measured["trained"]}


@pytest.mark.parametrize("mesh", MESHES)
def test_training_does_not_depend_on_the_mesh(trained, mesh):
    result, expected = trained[mesh], trained[ONE]
    assert result["devices"] == np.prod(mesh)
    assert result["given_away"]
    losses = np.array(result["losses"])
    assert losses.shape == (len(SEEDS), K)
    assert losses[0] != pytest.approx(losses[1])
    np.testing.assert_allclose(losses, expected["losses"], rtol=2e-5)
    np.testing.assert_allclose(result["untrained"], expected["untrained"], atol=1e-6)
    np.testing.assert_allclose(result["probabilities"], expected["probabilities"], atol=3e-5)
    assert np.abs(np.subtract(*result["untrained"])).max() > 1e-3  # each seed begins elsewhere
    moved = np.abs(np.subtract(result["probabilities"], result["untrained"])).max(axis=(1, 2))
    assert moved[0] > 1e-3
    assert moved[1] == 0  # the loss of the second run was not finite: its best is still the beginning


@pytest.mark.parametrize("mesh", MESHES)
def test_large_parameters_are_split_over_fsdp_and_runs_never(trained, mesh):
    result, (_, fsdp, _) = trained[mesh], mesh
    for described in (*result["made"].values(), result["after"], result["kept"]):
        assert described["large"] == [[2, 64, 256]] + [[2, 64, 256 // fsdp]] * np.prod(mesh)
        assert described["small"] == [[2, 64]] * (1 + np.prod(mesh))


def test_the_mean_of_all_tokens_leaves_fillers_out(measured):
    np.testing.assert_allclose(measured["pooled"], measured["pooled_on_one"], rtol=1e-4)


def test_a_checkpoint_of_one_mesh_goes_on_with_another(trained, measured):
    np.testing.assert_allclose(measured["across"]["losses"], trained[ONE]["losses"], rtol=2e-5)


@pytest.mark.slow  # a minute to compile
def test_neither_mesh_nor_checkpoint_changes_a_training_with_options():
    plain, on_one, across = in_a_process("options")
    np.testing.assert_allclose(across["losses"], on_one["losses"], rtol=2e-5)
    np.testing.assert_allclose(across["norms"], on_one["norms"], rtol=1e-4)
    assert np.abs(np.subtract(on_one["losses"], plain["losses"])).min(axis=1).max() > 1e-4


def test_memory_per_device_falls_with_each_axis(measured):
    """Parameters and moments fall with fsdp, what a step takes besides with all three axes, down to what no axis splits."""
    given, besides = ({tuple(mesh): found[index] for mesh, found in measured["plain"]} for index in range(2))
    data = 8 * 28**3
    assert given[1, 8, 1] - data < 0.25 * (given[ONE] - data)  # small and odd arrays are whole everywhere
    for mesh in ((8, 1, 1), (1, 1, 8)):
        assert given[mesh] == pytest.approx(given[ONE], rel=0.02)
    for mesh in ((8, 1, 1), (1, 8, 1), (1, 1, 8)):
        assert besides[mesh] < 0.3 * besides[ONE], (mesh, besides)


def test_memory_falls_where_attention_goes_block_by_block(measured):
    (_, on_one), *others = measured["blockwise"]
    for _, on_eight in others:
        assert on_eight < 0.35 * on_one


def fake_mesh(data, fsdp):
    return types.SimpleNamespace(shape={"data": data, "fsdp": fsdp, "sequence": 1})


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
    mesh = jax.sharding.AbstractMesh((2, 4, 1), sharding.AXES)
    places = sharding.state(mesh, {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})
    split = {name: place.spec.index("fsdp") if "fsdp" in place.spec else None for name, place in places.items()}
    assert split == {"tall": 1, "wide": 2, "square": 2, "odd": 1, "none": None, "small": None, "scalar": None}


@pytest.mark.parametrize(
    ("data", "fsdp", "sequence", "words"),
    [
        (-1, 3, 1, r"mesh\.fsdp=3 .*8 devices.* 1, 2, 4, 8"),
        (-1, 16, 1, r"mesh\.fsdp=16 .*8 devices.* 1, 2, 4, 8"),
        (-1, 1, 3, r"mesh\.sequence=3 .*8 devices.* 1, 2, 4, 8"),
        (-1, 4, 4, r"mesh\.sequence=4 .*2 devices that mesh\.fsdp=4 leaves.* 1, 2$"),
        (16, 1, 1, r"mesh\.data=16 .*16 devices.*there are 8"),
        (4, 4, 1, r"mesh\.data=4 times mesh\.fsdp=4 needs 16 devices.*there are 8"),
        (2, 1, 8, r"mesh\.data=2 times mesh\.sequence=8 needs 16 devices.*there are 8"),
        (0, 1, 1, r"mesh\.data=0.*positive"),
        (1, 0, 1, r"mesh\.fsdp=0.*positive"),
        (1, 1, 0, r"mesh\.sequence=0.*positive"),
        (-2, 1, 1, r"mesh\.data=-2.*positive"),
        (-1, -1, 1, r"mesh\.fsdp=-1.*positive"),
        (-1, 1, -1, r"mesh\.sequence=-1.*positive"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_what_can(data, fsdp, sequence, words):
    with pytest.raises(config.InputError, match=words):
        sharding.make_mesh(data=data, fsdp=fsdp, sequence=sequence, devices=[object()] * 8)


def test_data_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    assert dict(mesh.shape) == {"data": len(jax.devices()), "fsdp": 1, "sequence": 1}


@pytest.mark.parametrize(
    ("fsdp", "sequence", "batch_sizes", "parts"), [(1, 1, (8, 64), 8), (1, 2, (8, 64), 4), (2, 2, (8, 6), 1), (1, 1, (6, 64), 2)]
)
def test_by_default_as_many_devices_share_a_batch_as_divide_it(fsdp, sequence, batch_sizes, parts):
    assert sharding.data_parts(8, data=-1, fsdp=fsdp, sequence=sequence, batch_sizes=batch_sizes) == parts


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


if __name__ == "__main__" and sys.argv[1:] == ["options"]:
    optioned = [train_across(*meshes, with_options) for meshes in ((ONE, ONE), ((2, 2, 2), (1, 8, 1)))]
    print(json.dumps([train_across(ONE, ONE), *optioned]))
elif __name__ == "__main__":
    found = {
        "trained": [(mesh, train(mesh)) for mesh in MESHES],
        "pooled": pooled((2, 1, 4)),
        "pooled_on_one": pooled(ONE),
        "across": train_across((2, 2, 2), (1, 1, 8)),
        "plain": [(mesh, memory(mesh, "plain")) for mesh in MESHES if mesh != BATCHED],
        "blockwise": [memory(mesh, "blockwise") for mesh in (ONE, (8, 1, 1))],
    }
    print(json.dumps(found))
