"""AdamW against PyTorch's, written out in float64; the losses and probabilities of the four tasks against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from vitmed.training import optim, tasks

DECAY, BETA1, BETA2, EPSILON = 0.05, 0.9, 0.999, 1e-8


def torch_adamw(params, gradients, rates):
    """torch.optim.AdamW (single tensor, no amsgrad), one array after another, with its learning rate set before each step."""
    m, v = np.zeros_like(params), np.zeros_like(params)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        params = params * (1 - rate * DECAY)
        m = m + (gradient - m) * (1 - BETA1)
        v = v * BETA2 + (1 - BETA2) * gradient * gradient
        denominator = np.sqrt(v) / np.sqrt(1 - BETA2**step) + EPSILON
        params = params - rate / (1 - BETA1**step) * m / denominator
    return params


def test_adamw_is_pytorchs_over_30_steps_and_two_changes_of_the_rate():
    steps, rng = 30, np.random.default_rng(0)
    # Gradients as small as epsilon show where it is added; a gradient of zero leaves decay alone, which acts on scalars and vectors too.
    shapes = {"kernel": ((5, 7), 1.0), "bias": ((7,), 1e-3), "scalar": ((), 10.0), "faint": ((9,), 2e-8), "unused": ((4,), 0.0)}
    params = {name: rng.normal(size=shape) for name, (shape, _) in shapes.items()}
    gradients = {name: rng.normal(size=(steps, *shape)) * scale for name, (shape, scale) in shapes.items()}
    gradients["kernel"] *= np.geomspace(1, 1e-3, steps).reshape(-1, 1, 1)  # moments that have much to forget
    schedule = optim.step_lr(1e-2, steps_per_epoch=5, lr_step_epochs=2, lr_gamma=0.5)
    optimizer = optim.adamw(schedule, weight_decay=DECAY, beta1=BETA1, beta2=BETA2, epsilon=EPSILON)
    ours = jax.tree.map(jnp.float32, params)
    state = optimizer.init(ours)

    @jax.jit
    def update(ours, state, gradient):
        updates, state = optimizer.update(gradient, state, ours)
        return optax.apply_updates(ours, updates), state

    for step in range(steps):
        ours, state = update(ours, state, {name: jnp.float32(values[step]) for name, values in gradients.items()})
    rates = [1e-2] * 10 + [5e-3] * 10 + [2.5e-3] * 10
    for name, before in params.items():
        expected = torch_adamw(before, gradients[name], rates)
        moved = np.abs(expected - before).max()
        np.testing.assert_allclose(ours[name], expected, rtol=1e-6, atol=1e-4 * moved, err_msg=name)
    np.testing.assert_allclose(ours["unused"], params["unused"] * np.prod(1 - DECAY * np.array(rates)), rtol=1e-6)


@pytest.mark.parametrize(("steps_per_epoch", "lr_step_epochs", "gamma"), [(7, 2, 0.5), (1, 30, 0.1), (69, 1, 1.0), (3, 2, 0.0)])
def test_step_lr_changes_with_the_first_step_of_an_epoch(steps_per_epoch, lr_step_epochs, gamma):
    schedule = optim.step_lr(1e-4, steps_per_epoch=steps_per_epoch, lr_step_epochs=lr_step_epochs, lr_gamma=gamma)
    epochs = 3 * lr_step_epochs + 1
    expected = np.repeat([1e-4 * gamma ** (epoch // lr_step_epochs) for epoch in range(epochs)], steps_per_epoch)  # PyTorch's StepLR
    got = jax.jit(jax.vmap(schedule))(jnp.arange(epochs * steps_per_epoch))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert float(schedule(steps_per_epoch * lr_step_epochs)) == pytest.approx(1e-4 * gamma)  # a plain number, for the record


def test_the_four_tasks_are_named_as_in_result_json():
    assert {name: task.name for name, task in tasks.TASKS.items()} == {n: n for n in ("binary", "multi-class", "multi-label", "ordinal")}


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@pytest.mark.parametrize(("task", "K"), [("binary", 2), ("multi-class", 9), ("ordinal", 5)])
def test_one_label_is_cross_entropy_of_a_softmax(task, K, dtype):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, K)) * 4, rng.integers(0, K, (6, 1)).astype(dtype)
    expected = special.softmax(logits, axis=-1)
    task = tasks.TASKS[task]
    np.testing.assert_allclose(task.probabilities(jnp.float32(logits)), expected, rtol=1e-5)
    losses = task.loss(jnp.float32(logits), labels)
    np.testing.assert_allclose(losses, -np.log(expected[np.arange(6), labels[:, 0]]), rtol=1e-5)


def test_several_labels_are_the_mean_cross_entropy_of_their_sigmoids():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 14)) * 4, rng.integers(0, 2, (6, 14)).astype(np.uint8)
    p, task = special.expit(logits), tasks.TASKS["multi-label"]
    np.testing.assert_allclose(task.probabilities(jnp.float32(logits)), p, rtol=1e-5)
    expected = -np.where(labels == 1, np.log(p), np.log1p(-p)).mean(axis=-1)
    np.testing.assert_allclose(task.loss(jnp.float32(logits), labels), expected, rtol=1e-5)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_losses_of_a_blank_and_of_a_far_too_sure_network(task):
    many = task == "multi-label"
    task, K = tasks.TASKS[task], 2
    right, wrong = (np.array([[1, 0]]), np.array([[0, 1]])) if many else (np.array([[0]]), np.array([[1]]))
    assert float(task.loss(jnp.zeros((1, K)), wrong)[0]) == pytest.approx(np.log(2))
    np.testing.assert_allclose(task.probabilities(jnp.zeros((1, K))), 0.5)
    sure = jnp.array([[1000.0, -1000.0]])
    assert float(task.loss(sure, right)[0]) == 0
    assert float(task.loss(sure, wrong)[0]) == (1000 if many else 2000)  # and not infinite
    gradient = jax.grad(lambda logits: task.loss(logits, wrong)[0])(sure)
    np.testing.assert_allclose(gradient, np.array([[0.5, -0.5]]) if many else [[1, -1]], atol=1e-6)


@pytest.mark.parametrize("filler", [7.0, np.inf, -np.inf, np.nan])
def test_masked_mean_counts_no_filler_in_value_or_gradient(filler):
    values, mask = jnp.array([1.0, 2.0, 6.0, filler, filler]), jnp.array([True, True, True, False, False])
    mean, gradient = jax.value_and_grad(tasks.masked_mean)(values, mask, mask.sum())
    assert float(mean) == 3
    np.testing.assert_allclose(gradient, [1 / 3, 1 / 3, 1 / 3, 0, 0], rtol=1e-6)


def test_masked_mean_of_nothing_is_zero():
    assert float(tasks.masked_mean(jnp.array([np.inf, 1.0]), jnp.array([False, False]), jnp.int32(0))) == 0
