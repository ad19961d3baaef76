"""Runs, chunks and failures, on a linear classifier small enough to follow by hand; runs against each other on a real ViT.

Legend: `R` runs, `K` steps of a chunk, `B` batch. Images are 2 x 2 x 1; a byte of 255 becomes NaN in the input (the loss is not finite), an
image of zeros has a finite loss whose gradient is not.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from vitmed.models import build, inputs
from vitmed.training import augment, optim, step, tasks

R, K, B, N, CLASSES = 3, 5, 4, 12, 3
SEEDS = jnp.array([3, 5, 7], jnp.uint32)
RATE, DECAY = 1e-2, 0.05
TASK = tasks.TASKS["multi-class"]
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # a sixth of the time to compile
OFF = augment.Augmentation()
RANDOM = augment.Augmentation(brightness=0.4)


def prepare(images, *, augment=None):
    values = inputs.prepare(images, in_channels=1, mean=(0.0,), std=(1.0,), augment=augment)
    return jnp.where(images == 255, jnp.nan, values)


def apply(variables, images, *, train=False, rngs=None):
    params, x = variables["params"], images.reshape(len(images), -1)
    root = jnp.sqrt(params["root"] * x.sum(axis=1, keepdims=True))
    noise = 0.1 * jax.random.normal(rngs["drop_path"], (len(x), 1)) if train and params["noisy"].shape[-1] else 0.0
    return x @ params["kernel"] + params["bias"] + (root + noise) * jnp.arange(CLASSES)


def params_of(*, runs=R, noisy=False):
    rng = np.random.default_rng(0)
    arrays = {"kernel": rng.normal(size=(runs, 4, CLASSES)), "bias": rng.normal(size=(runs, CLASSES)), "root": np.ones((runs, 1))}
    return jax.tree.map(jnp.float32, arrays | {"noisy": np.zeros((runs, int(noisy)))})


def optimizer_of(*, rate=RATE, decay=DECAY, epsilon=1e-8):
    return optim.adamw(lambda step: jnp.float32(rate), weight_decay=decay, beta1=0.9, beta2=0.999, epsilon=epsilon)


def start(*, noisy=False, **more):
    return jax.vmap(lambda params: step.create(params, optimizer_of(**more)))(params_of(noisy=noisy))


@functools.cache
def chunk(*, mapped, augmentation=OFF, micro=None, lanes=1, **more):
    how = {"optimizer": optimizer_of(**more), "augmentation": augmentation, "micro_batch_size": micro, "lanes": lanes}
    train_step = functools.partial(step.train_step, apply=apply, prepare=prepare, task=TASK, **how)
    return jax.jit(step.make_chunk(train_step, mapped=mapped))


def batches_of(*, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 255, (R, K, B, 2, 2, 1)).astype(np.uint8)
    return {"images": images, "labels": rng.integers(0, CLASSES, (R, K, B, 1)).astype(np.uint8), "mask": np.ones((R, K, B), bool)}


def same_bytes(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)), one, other)


def of_run(tree, run):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[run : run + 1], tree)


both = pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "vmap"])


def test_the_state_before_the_first_step():
    state, best = start()
    assert np.all(state.step == 0)
    assert np.all(state.failed_at == step.ALIVE)
    assert np.all(best.loss == np.inf)
    assert np.all(best.epoch == 0)
    same_bytes(best.params, state.params)


def test_steps_are_those_of_adamw_on_the_mean_loss_of_the_real_examples():
    state, _ = start()
    batches, steps = batches_of(), 3
    batches["mask"][:, :, 2:] = False
    after, losses = chunk(mapped=True)(state, SEEDS, batches, steps, {})
    for run in range(R):
        now = {name: np.asarray(state.params[name][run], np.float64) for name in ("kernel", "bias", "root")}
        m, v = ({name: np.zeros_like(value) for name, value in now.items()} for _ in range(2))
        for index in range(steps):
            x = batches["images"][run, index, :2].reshape(2, 4) / 255
            root = np.sqrt(now["root"] * x.sum(axis=1, keepdims=True))
            p = special.softmax(x @ now["kernel"] + now["bias"] + root * np.arange(CLASSES), axis=-1)
            wanted = np.eye(CLASSES)[batches["labels"][run, index, :2, 0]]
            assert losses[run, index] == pytest.approx(-np.log((p * wanted).sum(axis=1)).mean(), rel=1e-5)
            error = (p - wanted) / 2
            of_root = (error @ np.arange(CLASSES)) @ (root / now["root"] / 2)
            for name, gradient in {"kernel": x.T @ error, "bias": error.sum(axis=0), "root": of_root}.items():
                m[name], v[name] = 0.9 * m[name] + 0.1 * gradient, 0.999 * v[name] + 0.001 * gradient**2
                unbiased = m[name] / (1 - 0.9 ** (index + 1)), v[name] / (1 - 0.999 ** (index + 1))
                now[name] = now[name] - RATE * (unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8) + DECAY * now[name])
        for name, expected in now.items():
            np.testing.assert_allclose(after.params[name][run], expected, atol=1e-5)
    other = {name: array.copy() for name, array in batches.items()}
    other["images"][:, :, 2:], other["labels"][:, :, 2:] = 9, 1
    same_bytes(chunk(mapped=True)(state, SEEDS, other, steps, {}), (after, losses))  # fillers matter nowhere


@both
@pytest.mark.parametrize("poison", [255, 0], ids=["loss", "gradient"])
def test_a_run_that_fails_stays_as_it_was_for_good_and_the_others_do_not_notice(mapped, poison):
    run, at, program = 1, 2, chunk(mapped=mapped)
    clean, poisoned = batches_of(), batches_of()
    poisoned["images"][run, at, 0] = poison
    state, _ = start()
    good, good_losses = program(state, SEEDS, clean, K, {})
    failed, losses = program(state, SEEDS, poisoned, K, {})
    assert np.all(np.isfinite(good_losses))
    assert failed.failed_at.tolist() == [step.ALIVE, at, step.ALIVE]
    assert failed.step.tolist() == [K, at, K]
    before, _ = program(state, SEEDS, poisoned, at, {})
    same_bytes(of_run(failed.replace(failed_at=before.failed_at), run), of_run(before, run))
    np.testing.assert_array_equal(losses[run, :at], good_losses[run, :at])
    assert np.all(np.isnan(losses[run, at:]))
    for other in (0, 2):
        same_bytes(of_run((failed, losses), other), of_run((good, good_losses), other))
    later, later_losses = program(failed, SEEDS, batches_of(seed=1), K, {})  # good data come too late
    same_bytes(of_run(later, run), of_run(failed, run))
    assert np.all(np.isnan(later_losses[run]))
    assert np.all(np.isfinite(later_losses[::2]))


@both
def test_the_smallest_epsilon_and_the_highest_rate_that_a_config_allows_keep_every_update_finite(mapped):
    batches = batches_of()
    batches["images"][1, :, :, 0, 0] = 0  # a parameter without a gradient: zero over epsilon
    allowed = {"rate": 1e3, "decay": 1e3, "epsilon": 1e-20}
    state, _ = start(epsilon=allowed["epsilon"])
    after, _ = chunk(mapped=mapped, **allowed)(state, SEEDS, batches, K, {})
    assert np.all(np.isfinite(after.params["kernel"]))


@both
def test_a_chunk_makes_as_many_steps_as_it_is_told(mapped):
    program, batches = chunk(mapped=mapped), batches_of()
    state, _ = start()
    whole, losses = program(state, SEEDS, batches, K, {})
    part, part_losses = program(state, SEEDS, batches, 3, {})
    assert part.step.tolist() == [3] * R
    assert np.all(np.isnan(part_losses[:, 3:]))
    np.testing.assert_array_equal(part_losses[:, :3], losses[:, :3])
    none, none_losses = program(state, SEEDS, batches, 0, {})
    same_bytes(none, state)
    assert np.all(np.isnan(none_losses))
    # Step by step, without chunk or runs: the same numbers up to rounding.
    train_step = jax.jit(
        functools.partial(step.train_step, apply=apply, prepare=prepare, task=TASK, optimizer=optimizer_of(), augmentation=OFF)
    )
    for run in range(R):
        single = jax.tree.map(lambda leaf, run=run: leaf[run], state)
        for index in range(K):
            single, loss = train_step(single, {name: array[run, index] for name, array in batches.items()}, SEEDS[run])
            assert float(loss) == pytest.approx(float(losses[run, index]), rel=1e-5)
        jax.tree.map(lambda a, b, run=run: np.testing.assert_allclose(a, b[run], atol=1e-5), single, whole)


@both
@pytest.mark.parametrize(("micro", "lanes"), [(1, 1), (2, 1), (4, 1), (2, 2), (None, 2)])
def test_a_batch_in_parts_makes_the_step_of_the_whole(mapped, micro, lanes):
    batches = batches_of()
    batches["mask"][:, 2, 1:] = False  # an epoch's last batch: some parts hold nothing but fillers
    state, _ = start()
    whole, losses = chunk(mapped=mapped, augmentation=RANDOM)(state, SEEDS, batches, K, {})
    parts, parts_losses = chunk(mapped=mapped, augmentation=RANDOM, micro=micro, lanes=lanes)(state, SEEDS, batches, K, {})
    np.testing.assert_allclose(parts_losses, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), parts, whole)


@pytest.mark.parametrize("how", [{"micro": 1}, {"lanes": 4}], ids=str)
def test_every_part_of_a_batch_drops_paths_of_its_own(how):
    alike = jax.tree.map(lambda array: np.broadcast_to(array[:, :, :1], array.shape).copy(), batches_of())
    one = alike | {"mask": np.arange(B) == np.zeros((R, K, 1))}
    state, _ = start(noisy=True)
    _, losses = chunk(mapped=True, **how)(state, SEEDS, alike, 1, {})
    _, of_one = chunk(mapped=True, **how)(state, SEEDS, one, 1, {})
    assert np.all(np.abs(losses - of_one)[:, 0] > 1e-4)
    _, of_whole = chunk(mapped=True)(state, SEEDS, alike, 1, {})
    assert np.all(np.abs(losses - of_whole)[:, 0] > 1e-6)  # there are parts, with keys that are not the whole batch's


@both
def test_resident_and_streamed_examples_give_the_same(mapped):
    rng, batches = np.random.default_rng(0), batches_of()
    resident = {"images": rng.integers(1, 255, (N, 2, 2, 1)).astype(np.uint8), "labels": rng.integers(0, CLASSES, (N, 1)).astype(np.uint8)}
    indices = rng.integers(0, N, (R, K, B)).astype(np.int32)
    state, _ = start()
    there = chunk(mapped=mapped)(state, SEEDS, {"mask": batches["mask"], "indices": indices}, K, resident)
    streamed = {name: array[indices] for name, array in resident.items()} | {"mask": batches["mask"]}
    same_bytes(chunk(mapped=mapped)(state, SEEDS, streamed, K, {}), there)


@pytest.mark.parametrize(
    ("mapped", "noisy", "augmentation"), [(True, True, OFF), (False, False, RANDOM)], ids=["drop_path", "augmentation"]
)
def test_randomness_is_a_function_of_seed_and_step(mapped, noisy, augmentation):
    # The same images at every step and a rate of zero: what differs between losses is chance alone.
    program = chunk(mapped=mapped, augmentation=augmentation, rate=0.0, decay=0.0)
    state, _ = start(noisy=noisy, rate=0.0, decay=0.0)
    state = state.replace(params=jax.tree.map(lambda leaf: leaf[:1].repeat(R, axis=0), state.params))
    batches = {name: array[:1, :1].repeat(R, axis=0).repeat(K, axis=1) for name, array in batches_of().items()}
    _, losses = program(state, jnp.array([3, 5, 3], jnp.uint32), batches, K, {})
    assert len(np.unique(losses[:2])) == 2 * K  # seeds and steps all differ
    np.testing.assert_array_equal(losses[0], losses[2])  # the place among the runs does not matter
    _, later = program(state.replace(step=state.step + 2), jnp.array([5, 3, 9], jnp.uint32), batches, K, {})
    np.testing.assert_array_equal(later[:2, : K - 2], losses[::-1][1:, 2:])  # nor the place in the chunk


@both
def test_a_state_that_was_put_away_goes_on_as_if_nothing_had_happened(mapped):
    program, batches = chunk(mapped=mapped, augmentation=RANDOM), batches_of()
    state, _ = start(noisy=True)
    whole, losses = program(state, SEEDS, batches, K, {})
    middle, _ = program(state, SEEDS, batches, 2, {})
    middle = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).copy()), middle)
    rest = {name: np.roll(array, -2, axis=1) for name, array in batches.items()}
    end, rest_losses = program(middle, SEEDS, rest, K - 2, {})
    same_bytes(end, whole)
    np.testing.assert_array_equal(rest_losses[:, : K - 2], losses[:, 2:])


def test_keep_best_takes_only_what_is_better_and_alive():
    # Better, equal, worse, not a number, better but failed; and the first epoch, which beats infinity unless it is not finite.
    losses, best_losses = [0.4, 0.5, 0.6, np.nan, 0.4, 9.0, np.inf], [0.5] * 5 + [np.inf] * 2
    taken = [True, False, False, False, False, True, False]
    count = len(losses)
    params = {"w": jnp.arange(count * 2.0).reshape(count, 2)}
    failed_at = jnp.array([step.ALIVE] * 4 + [0] + [step.ALIVE] * 2, jnp.int32)
    state = step.TrainState(jnp.zeros(count, jnp.int32), {"w": params["w"] + 100}, (), failed_at)
    best = step.Best(params, jnp.float32(best_losses), jnp.full(count, 2, jnp.int32))
    keep = step.over_runs(step.keep_best, mapped=False, shared=(3,))
    kept = keep(best, state, jnp.float32(losses), jnp.int32(7))
    np.testing.assert_array_equal(kept.params["w"], np.where(np.array(taken)[:, None], state.params["w"], params["w"]))
    np.testing.assert_array_equal(kept.loss, np.where(taken, np.float32(losses), np.float32(best_losses)))
    np.testing.assert_array_equal(kept.epoch, np.where(taken, 7, 2))


def test_prediction_is_of_each_example_alone_and_not_augmented():
    params, batches = params_of(noisy=True), batches_of()
    batch = {name: batches[name][0, 0] for name in ("images", "labels")}
    predict = functools.partial(step.predict_step, apply=apply, prepare=prepare, task=TASK)
    probabilities, losses = step.over_runs(predict, mapped=False, shared=(1,))(params, batch)
    assert (probabilities.shape, losses.shape) == ((R, B, CLASSES), (R, B))
    for run in range(R):
        for example in range(B):
            one = {name: array[example : example + 1] for name, array in batch.items()}
            of_one = jax.tree.map(lambda leaf, run=run: leaf[run], params)
            alone = special.softmax(apply({"params": of_one}, jnp.float32(one["images"] / 255))[0])
            np.testing.assert_allclose(probabilities[run, example], alone, atol=1e-6)
            assert float(losses[run, example]) == pytest.approx(-np.log(alone[one["labels"][0, 0]]), rel=1e-4)


VIT = build.model(build.plain(12, 2, 3), patch_size=(4, 4), num_classes=CLASSES, drop_path=0.3)


@functools.cache
def vit_chunk(*, mapped):
    prepare = functools.partial(inputs.prepare, in_channels=1, mean=(0.5,), std=(0.5,))
    train_step = functools.partial(
        step.train_step, apply=VIT.apply, prepare=prepare, task=TASK, optimizer=optimizer_of(), augmentation=RANDOM
    )

    def train(params, seeds, batches):
        state = jax.vmap(lambda params: step.create(params, optimizer_of())[0])(params)
        return step.make_chunk(train_step, mapped=mapped)(state, seeds, batches, K, {})

    return jax.jit(train, compiler_options=QUICK)


def agree(state, losses, other, other_losses):
    np.testing.assert_allclose(losses, other_losses, rtol=1e-4)
    # Adam divides by what may be mere rounding: the keys' bias has no gradient, and moves all the same, by about its rate in a step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2 * K * RATE), state.params, other.params)
    drifts = [np.abs(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (state.params, other.params)), strict=True)]
    assert np.mean(np.concatenate(drifts) > 1e-3 * RATE) < 0.05


def test_three_runs_of_a_vit_are_each_run_alone_whichever_way_they_are_mapped():
    batches = batches_of()
    rng = np.random.default_rng(0)
    batches["images"] = rng.integers(0, 256, (R, K, B, 8, 8, 1)).astype(np.uint8)
    shapes = jax.eval_shape(lambda: build.initialise(VIT, jax.random.key(0), image_size=(8, 8), in_channels=1))
    params = jax.tree.map(lambda leaf: rng.normal(size=(R, *leaf.shape), scale=0.3).astype(np.float32), shapes)
    state, losses = vit_chunk(mapped=True)(params, SEEDS, batches)
    together, together_losses = vit_chunk(mapped=False)(params, SEEDS, batches)
    agree(together, together_losses, state, losses)
    for run in range(R):
        alone = vit_chunk(mapped=True)(*(jax.tree.map(lambda x, run=run: x[run : run + 1], tree) for tree in (params, SEEDS, batches)))
        agree(*alone, *of_run((state, losses), run))  # to the bit where XLA compiles one run as it does three, which is not promised


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e20], ids=["nan", "inf", "a square that overflows"])
@pytest.mark.parametrize("place", ["small", "large"])
def test_one_number_of_any_array_is_enough_to_stop_a_step(place, broken):
    arrays = {"small": np.ones((2, 3), np.float32), "other": np.full(5, 2.0, np.float32), "large": np.ones((2, step.SMALL), np.float32)}
    assert step._sum_of_squares(arrays) == 6 + 20 + 2 * step.SMALL
    assert all(step._sum_of_squares({name: array}) == np.square(array).sum() for name, array in arrays.items())  # of one kind alone
    arrays[place][1, 2] = broken
    assert not np.isfinite(step._sum_of_squares(arrays))
