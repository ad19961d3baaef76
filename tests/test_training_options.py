"""What each training option does: schedules, layer-wise rates, averages, losses, mixup, the balanced sampler.

References are closed forms, optax, and PyTorch's formulas written in numpy. Steps are those of test_step's linear classifier.
Legend: `R` runs, `K` classes, `B` batch, `N` examples.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_step as linear
from scipy import special, stats
from test_optim_tasks import torch_adamw

from vitmed import budget, config, experiment
from vitmed.data import pipeline
from vitmed.models import build
from vitmed.runs import folder, machine
from vitmed.training import augment, optim, step, tasks

ROOT = linear.__file__.rpartition("/tests/")[0]
MANY, ONE = tasks.TASKS["multi-label"], tasks.TASKS["multi-class"]

# --- the learning rate ----------------------------------------------------------------------------------------------------------


def rates(name, *, epochs=4, steps_per_epoch=5, **more):
    schedule = optim.schedule(name, 0.5, epochs=epochs, steps_per_epoch=steps_per_epoch, **more)
    return np.array([float(schedule(index)) for index in range(epochs * steps_per_epoch + 1)])


@pytest.mark.parametrize(("warmup_epochs", "warmup"), [(0.0, 0), (1.0, 5), (0.5, 2), (1.5, 8)])
def test_cosine_rises_from_0_and_falls_to_0_at_the_end(warmup_epochs, warmup):
    steps = np.arange(21)
    falling = 0.5 * 0.5 * (1 + np.cos(np.pi * (steps - warmup) / (20 - warmup)))
    expected = np.where(steps < warmup, 0.5 * steps / max(warmup, 1), falling)
    np.testing.assert_allclose(rates("cosine", warmup_epochs=warmup_epochs), expected, atol=1e-7)


@pytest.mark.parametrize("name", ["step", "constant"])
def test_warm_up_multiplies_what_the_schedule_says_without_it(name):
    steps = {"lr_step_epochs": 2, "lr_gamma": 0.1}
    plain, warmed = rates(name, **steps), rates(name, warmup_epochs=2.4, **steps)
    np.testing.assert_allclose(warmed, plain * np.minimum(1, np.arange(21) / 12), rtol=1e-6)
    np.testing.assert_allclose(plain, 0.5 if name == "constant" else np.repeat([0.5, 0.05, 0.005], 10)[:21], rtol=1e-6)


def test_without_warm_up_the_rate_is_what_it_was_to_the_bit():
    how = {"steps_per_epoch": 7, "lr_step_epochs": 3, "lr_gamma": 0.3}
    made, before = optim.schedule("step", 1e-4, epochs=20, **how), optim.step_lr(1e-4, **how)
    for index in range(140):
        assert np.float32(made(index)).tobytes() == np.float32(before(index)).tobytes()


def test_layers_far_from_the_classifier_move_and_decay_more_slowly():
    module = build.model(build.plain(12, 2, 3), patch_size=(4, 4), num_classes=3).clone(num_registers=2, pooling="map")
    shapes = jax.eval_shape(lambda: build.initialise(module, jax.random.key(0), image_size=(8, 8), in_channels=1))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    gradients = [jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes) for _ in range(3)]
    how = {"weight_decay": 0.05, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
    optimizer = optim.adamw(lambda count: jnp.float32(0.01), **how, layer_decay=0.5, depth=2)
    scales = dict.fromkeys(("patch_embed", "pos_embed", "cls_token", "registers"), 0.5**3) | {"block_00": 0.5**2, "block_01": 0.5}
    assert set(params) == {*scales, "norm", "head", "attn_pool"}

    def train(params):
        state, now = optimizer.init(params), params
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, now)
            now = optax.apply_updates(now, updates)
        return now

    after = jax.jit(jax.vmap(train), compiler_options=linear.QUICK)(
        jax.tree.map(lambda leaf: leaf[None], params)
    )  # one run of an axis of runs
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        of_step = [dict(jax.tree_util.tree_leaves_with_path(gradient))[path] for gradient in gradients]
        expected = torch_adamw(leaf.astype(np.float64), of_step, [0.01 * scales.get(path[0].key, 1.0)] * 3)
        found = dict(jax.tree_util.tree_leaves_with_path(after))[path][0]
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=str(path))


def test_a_block_keeps_its_place_where_no_later_one_is_trained():
    optimizer = optim.adamw(lambda count: 0.01, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8, layer_decay=0.5, depth=12)
    params = {"lora": {"block_03": {"attn": {"q": {"b": jnp.ones(2)}}}}, "head": {"bias": jnp.ones(2)}}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["head"]["bias"], -0.01, rtol=1e-5)  # Adam's first step is as long as the rate
    np.testing.assert_allclose(updates["lora"]["block_03"]["attn"]["q"]["b"], -0.01 * 0.5**9, rtol=1e-5)


# --- the average of parameters --------------------------------------------------------------------------------------------------


def chunk(*, mapped=True, **options):
    how = {"optimizer": linear.optimizer_of(), "augmentation": linear.OFF} | options
    train_step = functools.partial(step.train_step, apply=linear.apply, prepare=linear.prepare, task=ONE, **how)
    return jax.jit(step.make_chunk(train_step, mapped=mapped), compiler_options=linear.QUICK)


def averaged():
    return jax.vmap(lambda params: step.create(params, linear.optimizer_of(), averaged=True))(linear.params_of())


def test_the_average_begins_as_the_parameters_and_moves_a_share_of_the_way_at_every_step():
    program, batches, (state, _) = chunk(ema_decay=0.9), linear.batches_of(), averaged()
    linear.same_bytes(state.average, state.params)
    average = jax.tree.map(np.float64, state.params)
    plain, _ = linear.start()
    for _ in range(4):
        now, losses = program(state, linear.SEEDS, batches, 1, {})
        expected, plain_losses = chunk()(plain, linear.SEEDS, batches, 1, {})
        average = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * np.float64(new), average, now.params)
        np.testing.assert_allclose(losses, plain_losses, rtol=1e-6)  # training itself does not notice
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), now.params, expected.params)
        state, plain = now, expected
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.average, average)
    assert np.abs(state.average["kernel"] - state.params["kernel"]).max() > 1e-3


def test_a_failed_step_leaves_the_average_as_it_was():
    program, batches, (state, _) = chunk(ema_decay=0.9), linear.batches_of(), averaged()
    batches["images"][1, 2, 0] = 255
    before, _ = program(state, linear.SEEDS, batches, 2, {})
    after, _ = program(state, linear.SEEDS, batches, linear.K, {})
    linear.same_bytes(linear.of_run(after.average, 1), linear.of_run(before.average, 1))
    assert np.abs(after.average["kernel"][0] - before.average["kernel"][0]).max() > 1e-4


def test_the_average_is_what_is_kept_and_without_one_there_is_none():
    state, best = averaged()
    state = state.replace(average=jax.tree.map(lambda leaf: leaf + 1, state.params))
    kept = step.over_runs(step.keep_best, mapped=False, shared=(3,))(best, state, jnp.ones(linear.R), jnp.int32(1))
    linear.same_bytes(kept.params, state.average)
    plain, _ = linear.start()
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(plain)) + len(jax.tree.leaves(plain.params))


def test_memory_counts_the_average(small_config):
    gpu = machine.Device("gpu", "GPU", 1, 80 * 10**9)
    for device, copies in ((gpu, 1), (gpu._replace(platform="cpu", memory_bytes=None), 1 + budget.CHECKPOINT_COPIES)):
        without, with_one = (experiment.plan(small_config(train__ema_decay=decay)) for decay in ("0", "0.99"))
        params = sum(leaf.size for leaf in jax.tree.leaves(experiment.recipe(without, steps_per_epoch=1).abstract[1].params))
        least, likely = np.subtract(budget.memory(with_one, device), budget.memory(without, device))
        assert least == 4 * params
        assert likely >= copies * 4 * params


# --- what is minimised ----------------------------------------------------------------------------------------------------------


def torch_cross_entropy(logits, labels, *, weights, smoothing):
    """torch.nn.functional.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing), as its C++ has it."""
    log_p = special.log_softmax(logits, axis=1)
    own = weights[labels]
    nll = -(own * log_p[np.arange(len(labels)), labels]).sum() / own.sum()
    smooth = -(log_p * weights).sum() / own.sum()
    return (1 - smoothing) * nll + smoothing / logits.shape[1] * smooth


def value_of(objective, logits, labels, mask=None):
    targets, mask = objective.targets(labels), np.ones(len(labels), bool) if mask is None else mask
    return float(tasks.masked_mean(objective.loss(jnp.float32(logits), targets), mask, objective.total(targets, mask)))


def drawn(task, *, B=9, K=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (B, K)) if task is MANY else rng.integers(0, K, (B, 1))
    return rng.normal(size=(B, K)) * 3, labels.astype(np.int32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, (0.1, 0.2, 0.05, 0.4), (3.0, 1.0, 2.0, 9.0)])
def test_one_label_is_pytorchs_weighted_and_smoothed_cross_entropy(smoothing, weights):
    (logits, labels), w = drawn(ONE), np.ones(4) if weights is None else np.array(weights)
    objective = tasks.objective(ONE, num_classes=4, label_smoothing=smoothing, class_weights=weights)
    expected = torch_cross_entropy(logits[:6], labels[:6, 0], weights=w, smoothing=smoothing)
    assert value_of(objective, logits, labels, np.arange(9) < 6) == pytest.approx(expected, rel=1e-5)
    logits[7] = np.inf  # of a filler
    assert value_of(objective, logits, labels, np.arange(9) < 6) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, (0.1, 1.0, 7.0, 2.0)])
def test_several_labels_are_pytorchs_binary_cross_entropy_with_positive_weights(smoothing, weights):
    (logits, labels), w = drawn(MANY), np.ones(4) if weights is None else np.array(weights)
    y = labels * (1 - smoothing) + smoothing / 2
    expected = -(w * y * np.log(special.expit(logits)) + (1 - y) * np.log(special.expit(-logits))).mean()
    objective = tasks.objective(MANY, num_classes=4, label_smoothing=smoothing, class_weights=weights)
    assert value_of(objective, logits, labels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_of_a_softmax_and_of_sigmoids(gamma):
    logits, labels = drawn(ONE)
    p = special.softmax(logits, axis=1)[np.arange(9), labels[:, 0]]
    expected = -((1 - p) ** gamma * np.log(p)).mean()
    assert value_of(tasks.objective(ONE, num_classes=4, focal_gamma=gamma), logits, labels) == pytest.approx(expected, rel=1e-5)
    logits, labels = drawn(MANY)
    expected = optax.losses.sigmoid_focal_loss(jnp.float32(logits), labels, gamma=gamma).mean()
    assert value_of(tasks.objective(MANY, num_classes=4, focal_gamma=gamma), logits, labels) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("task", [ONE, MANY], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("gamma", [0.0, 0.2, 1.0, 2.0])
def test_a_network_that_is_far_too_sure_has_a_finite_loss_and_gradient(task, gamma):
    objective = tasks.objective(task, num_classes=2, focal_gamma=gamma, label_smoothing=0.1)
    for labels in ([[1, 0]], [[0, 1]]) if task is MANY else ([[0]], [[1]]):
        targets = objective.targets(jnp.array(labels))
        loss, gradient = jax.value_and_grad(lambda logits, targets=targets: objective.loss(logits, targets)[0])(jnp.array([[1e3, -1e3]]))
        assert np.isfinite(loss)
        assert np.all(np.isfinite(gradient))


OBJECTIVE = tasks.objective(ONE, num_classes=3, label_smoothing=0.1, focal_gamma=1.5, class_weights=(0.1, 1.0, 5.0))


def test_a_batch_in_parts_is_divided_by_the_weights_of_the_whole():
    batches, (state, _) = linear.batches_of(), linear.start()
    batches["mask"][:, 1, 3:] = False
    whole, losses = chunk(objective=OBJECTIVE, mixup=0.4)(state, linear.SEEDS, batches, linear.K, {})
    program = chunk(objective=OBJECTIVE, mixup=0.4, micro_batch_size=2, mapped=False)
    parts, of_parts = program(state, linear.SEEDS, batches, linear.K, {})
    np.testing.assert_allclose(of_parts, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), parts, whole)
    others = {name: array.copy() for name, array in batches.items()}
    others["images"][:, 1, 3:], others["labels"][:, 1, 3:] = 9, 1
    linear.same_bytes(program(state, linear.SEEDS, others, linear.K, {}), (parts, of_parts))  # fillers are nobody's partner


def test_a_step_mixes_by_seed_and_step_and_minimises_the_objective_while_a_prediction_measures_the_plain_loss():
    batches, (state, _), at, changed = linear.batches_of(), linear.start(), 7, []
    later = state.replace(step=jnp.full(linear.R, at, jnp.int32))
    _, losses = chunk(objective=OBJECTIVE, mixup=0.4)(later, linear.SEEDS, batches, 1, {})
    for run, seed in enumerate(linear.SEEDS):
        batch = {name: array[run, 0] for name, array in batches.items()}
        params = jax.tree.map(lambda leaf, run=run: leaf[run], state.params)
        images, key = linear.prepare(batch["images"]), jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), at), 2)
        mixed, targets = MIX(key, images, np.eye(3)[batch["labels"][:, 0]], batch["mask"], alpha=0.4)
        changed.append(np.abs(mixed - images).max())
        log_p = special.log_softmax(np.float64(linear.apply({"params": params}, mixed)), axis=1)
        weights = np.array([0.1, 1.0, 5.0])
        q = np.asarray(targets, np.float64) * 0.9 + 0.1 / 3
        expected = -(weights * q * (1 - np.exp(log_p)) ** 1.5 * log_p).sum() / (targets @ weights).sum()
        assert float(losses[run, 0]) == pytest.approx(float(expected), rel=1e-4)
        plain = special.log_softmax(np.float64(linear.apply({"params": params}, images)), axis=1)
        _, measured = step.predict_step(params, batch, apply=linear.apply, prepare=linear.prepare, task=ONE)
        np.testing.assert_allclose(measured, -plain[np.arange(linear.B), batch["labels"][:, 0]], rtol=1e-4)
    assert max(changed) > 0.1


def test_balanced_weights_are_scikit_learns_and_pytorchs():
    labels = np.repeat([0, 1, 2], [6, 3, 1])[:, None]
    assert tasks.balanced_weights(ONE, labels, "abc") == pytest.approx((10 / 18, 10 / 9, 10 / 3))
    assert tasks.balanced_weights(MANY, np.array([[1, 0], [0, 0], [0, 1], [1, 1], [1, 1]]), "ab") == pytest.approx((2 / 3, 2 / 3))
    with pytest.raises(config.InputError, match="the training split has no examples of c; give a number per class"):
        tasks.balanced_weights(ONE, labels[:9], "abc")
    with pytest.raises(config.InputError, match="the training split has only examples of b"):
        tasks.balanced_weights(MANY, np.array([[1, 1], [0, 1]]), "ab")


# --- mixup ----------------------------------------------------------------------------------------------------------------------


MIX = jax.jit(augment.mix, compiler_options=linear.QUICK)


def shares(key, mask, *, alpha):
    """[B, B]: how much of each image is in each mixed one; image i is the i-th unit vector, and so is its target."""
    count = len(mask)
    images, targets = MIX(key, jnp.eye(count).reshape(count, 1, count, 1), jnp.eye(count), mask, alpha=alpha)
    np.testing.assert_array_equal(images.reshape(count, count), targets)
    return np.asarray(targets)


def test_real_images_are_mixed_among_themselves_each_with_a_share_of_its_own():
    mask = jnp.array([True, False, True, True, True, False, True])
    real = np.flatnonzero(mask)
    of_all = np.array([shares(jax.random.key(index), mask, alpha=0.7) for index in range(20)])
    np.testing.assert_allclose(of_all.sum(axis=2), 1, rtol=1e-6)
    assert not of_all[:, real][:, :, ~np.asarray(mask)].any()
    mixed = of_all[:, real][:, :, real]
    own = mixed[:, np.arange(5), np.arange(5)]
    partnered = np.where(np.eye(5, dtype=bool), 0, mixed) > 0
    assert partnered.sum(axis=2).max() == partnered.sum(axis=1).max() == 1  # a permutation
    assert partnered.any(axis=0)[~np.eye(5, dtype=bool)].all()  # any other real image comes to be the partner
    assert all(len(set(row[row < 1])) == (row < 1).sum() for row in own)
    np.testing.assert_array_equal(of_all[3], shares(jax.random.key(3), mask, alpha=0.7))


@pytest.mark.parametrize("alpha", [0.2, 2.0])
def test_shares_are_of_the_beta_distribution(alpha):
    found = shares(jax.random.key(0), jnp.ones(800, bool), alpha=alpha).diagonal()
    found = found[found < 1]
    assert stats.kstest(found, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert len(found) > 700


@pytest.mark.parametrize("task", [ONE, MANY], ids=["softmax", "sigmoid"])
def test_the_loss_of_mixed_targets_is_the_mix_of_the_losses(task):
    objective = tasks.objective(task, num_classes=4, label_smoothing=0.1, focal_gamma=2.0, class_weights=(1.0, 2.0, 3.0, 0.5))
    logits, labels = drawn(task)
    one, other, share = objective.targets(labels), objective.targets(drawn(task, seed=1)[1]), np.linspace(0, 1, 9)
    of_mixed = objective.loss(logits, share[:, None] * one + (1 - share[:, None]) * other)
    np.testing.assert_allclose(of_mixed, share * objective.loss(logits, one) + (1 - share) * objective.loss(logits, other), rtol=1e-5)


# --- the sampler ----------------------------------------------------------------------------------------------------------------

CLASSES = np.random.default_rng(0).permutation(np.repeat([0, 1, 4], [70, 25, 6]))  # N = 101, K = 3 that occur


def test_the_balanced_sampler_shows_all_classes_alike_and_of_a_class_every_example_alike():
    orders = [pipeline.balanced_order(7, epoch=epoch, classes=CLASSES) for epoch in range(60)]
    for order in orders:
        counts = np.bincount(CLASSES[order])[[0, 1, 4]]
        assert len(order) == 101
        assert sorted(counts) == [33, 34, 34]
        for one in (0, 1, 4):
            seen = np.bincount(order, minlength=101)[one == CLASSES]
            assert seen.max() - seen.min() <= 1
    assert len({tuple(order) for order in orders}) == 60
    every = np.bincount(np.concatenate(orders), minlength=101)
    assert every.min() > 0  # also of the class of which an epoch shows half
    assert np.mean([CLASSES[order[:50]] == 4 for order in orders]) == pytest.approx(1 / 3, abs=0.05)  # in no order of classes
    extra = np.mean([np.bincount(CLASSES[order])[[0, 1, 4]] - 33 for order in orders], axis=0)
    np.testing.assert_allclose(extra, 2 / 3, atol=0.2)


def test_chunks_of_the_balanced_sampler_are_a_function_of_seed_and_epoch():
    plan = pipeline.Plan(101, batch_size=8, epochs=2, steps_per_chunk=5, sampler="balanced")
    chunks = list(pipeline.training_chunks(plan, (3, 4), classes=CLASSES))
    rest = list(pipeline.training_chunks(plan, (4,), start=2, classes=CLASSES))
    for whole, alone in zip(chunks[2:], rest, strict=True):
        np.testing.assert_array_equal(whole.batches["indices"][1:], alone.batches["indices"])
    for run, seed in enumerate((3, 4)):
        for epoch in range(2):
            of_epoch = chunks[epoch * 3 : epoch * 3 + 3]
            seen = np.concatenate([chunk.batches["indices"][run][chunk.batches["mask"][run]] for chunk in of_epoch])
            np.testing.assert_array_equal(seen, pipeline.balanced_order(seed, epoch=epoch, classes=CLASSES))


# --- configs --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("schedule", "cosin", "unknown; did you mean cosine"),
        ("warmup_epochs", "2", "from 0 to less than the 2 of train.epochs"),
        ("warmup_epochs", "-0.5", "from 0 to less"),
        ("layer_decay", "0", "above 0 and at most 1"),
        ("ema_decay", "1", "from 0 to less than 1"),
        ("label_smoothing", "1", "from 0 to less than 1"),
        ("focal_gamma", "-1", "a finite number from 0"),
        ("mixup", "nan", "a finite number from 0"),
        ("patience", "-1", "from 0 to"),
        ("sampler", "random", "unknown"),
        ("class_weights", "even", "choose one of none, balanced"),
        ("class_weights", "1,2,3", "none, balanced, or 2 numbers from 1e-06 to 1e\\+06, one per class"),
        ("class_weights", "1,0", "one per class"),
    ],
)
def test_options_out_of_bounds_are_refused(small_config, field, value, says):
    with pytest.raises(config.InputError, match=f"train.{field}=.*{says}"):
        experiment.plan(small_config(**{f"train__{field}": value}))


def test_several_labels_have_no_balanced_sampler():
    recipe = {"model.pretrained": "", "train.sampler": "balanced"}
    with pytest.raises(config.InputError, match=r"train.sampler=balanced: chestmnist .*take train.class_weights=balanced"):
        experiment.plan(config.load(f"{ROOT}/configs/vit2d.py:dataset=chestmnist", recipe))


def test_class_weights_are_a_word_or_numbers(small_config):
    assert small_config(train__class_weights="1,2.5").train.class_weights == (1.0, 2.5)
    given = small_config(train__class_weights="1,2.5")
    config.override(given, "train.class_weights", "balanced")
    assert given.train.class_weights == "balanced"


def test_balanced_weights_come_from_the_training_labels_and_nothing_trains_without_them(small_config):
    planned, labels = experiment.plan(small_config(train__class_weights="balanced")), np.array([[0], [1], [1], [1]])
    made = experiment.recipe(planned, steps_per_epoch=3, labels=labels).objective
    assert float(made.total(made.targets(labels), np.ones(4, bool))) == pytest.approx(
        3 + 3 * 1
    )  # 4 / (2 x 1) and 4 / (2 x 3), the least made 1
    with pytest.raises(ValueError, match="without the labels of the training split"):
        experiment.recipe(planned, steps_per_epoch=3).objective.targets(labels)


def test_a_class_that_is_not_there_is_refused_before_anything_is_written(small_config, tmp_path, monkeypatch):
    planned = experiment.plan(small_config(train__class_weights="balanced"))
    dataset = planned.load()
    splits = {name: dataclasses.replace(split, labels=np.ones_like(split.labels)) for name, split in dataset.splits.items()}
    monkeypatch.setattr(type(planned), "load", lambda _: dataclasses.replace(dataset, splits=splits))
    with pytest.raises(config.InputError, match=r"train.class_weights=balanced: the training split has no examples of "):
        experiment.run(planned, folder.RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_is_off_is_not_there(small_config):
    recipe = experiment.recipe(experiment.plan(small_config()), steps_per_epoch=3)
    assert recipe.objective is None
    assert (recipe.mixup, recipe.ema_decay, recipe.patience) == (0, 0, 0)
    assert type(recipe.abstract[0]) is step.TrainState
