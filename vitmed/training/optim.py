"""The optimiser of the recipe: AdamW with a stepwise learning rate, PyTorch's arithmetic written in optax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def step_lr(learning_rate: float, *, steps_per_epoch: int, lr_step_epochs: int, lr_gamma: float) -> Callable[[jax.Array], jax.Array]:
    """Step -> learning rate, times `lr_gamma` after every `lr_step_epochs` epochs (PyTorch's StepLR)."""
    return lambda step: learning_rate * jnp.asarray(lr_gamma, jnp.float32) ** (step // (steps_per_epoch * lr_step_epochs))


def adamw(
    schedule: Callable[[jax.Array], jax.Array], *, weight_decay: float, beta1: float, beta2: float, epsilon: float
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) with decay on every parameter, as torch.optim.AdamW does when given all of them."""
    return optax.adamw(schedule, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay)
