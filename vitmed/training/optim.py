"""The optimiser of the recipe: AdamW and the schedules of its learning rate, PyTorch's arithmetic written in optax."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array], jax.Array]
SCHEDULES = ("step", "cosine", "constant")
EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token", "registers")  # what comes before the first block
BLOCK = re.compile(r"block_(\d+)")


def step_lr(learning_rate: float, *, steps_per_epoch: int, lr_step_epochs: int, lr_gamma: float) -> Schedule:
    """Step -> learning rate, times `lr_gamma` after every `lr_step_epochs` epochs (PyTorch's StepLR)."""
    return lambda step: learning_rate * jnp.asarray(lr_gamma, jnp.float32) ** (step // (steps_per_epoch * lr_step_epochs))


def schedule(
    name: str,
    learning_rate: float,
    *,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0.0,
    lr_step_epochs: int = 1,
    lr_gamma: float = 1.0,
) -> Schedule:
    """Step (from 0) -> learning rate, by one of SCHEDULES; over `warmup_epochs`, rounded to whole steps, it rises linearly from 0.

    `cosine` (arXiv 1608.03983, without restarts) falls from the end of the warm-up and is 0 once the last step is made. `step` is `step_lr`
    times what has been reached of the warm-up: its epochs count from the beginning.
    """
    steps = epochs * steps_per_epoch
    warmup = min(round(warmup_epochs * steps_per_epoch), steps - 1)
    if name == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps=warmup, decay_steps=steps)
    if name == "step":
        after = step_lr(learning_rate, steps_per_epoch=steps_per_epoch, lr_step_epochs=lr_step_epochs, lr_gamma=lr_gamma)
    else:
        after = optax.constant_schedule(learning_rate)
    if not warmup:
        return after
    reached = optax.linear_schedule(0.0, 1.0, warmup)
    return lambda step: reached(step) * after(step)


def adamw(
    schedule: Schedule,
    *,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    layer_decay: float = 1.0,
    depth: int | None = None,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) with decay on every parameter, as torch.optim.AdamW does when given all of them.

    With `layer_decay` below 1 the learning rate of a parameter is multiplied by its `layer_scale` in a network of `depth` blocks, of which
    not all need be trained, and so is its weight decay, which AdamW multiplies by the learning rate: as timm's parameter groups do.
    """
    optimizer = optax.adamw(schedule, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay)
    if layer_decay == 1:
        return optimizer
    if depth is None:
        raise ValueError(f"layer_decay={layer_decay} goes by the network's depth; give depth")
    return optax.chain(optimizer, optax.stateless(lambda updates, _: _scaled_by_layer(updates, depth=depth, layer_decay=layer_decay)))


def layer_scale(names: tuple[str, ...], *, depth: int, layer_decay: float) -> float:
    """layer_decay ** (depth + 1 - layer) of the parameter of that path: the embeddings are layer 0, block i is i + 1, the rest depth + 1.

    As in BEiT and MAE (arXiv 2106.08254, 2111.06377); the rest, which keeps its rate, are final norms, pooling and classifier.
    """
    blocks = [int(found.group(1)) for name in names if (found := BLOCK.fullmatch(name))]
    layer = blocks[0] + 1 if blocks else 0 if any(name in EMBEDDINGS for name in names) else depth + 1
    return layer_decay ** (depth + 1 - layer)


def _scaled_by_layer(updates: Any, *, depth: int, layer_decay: float) -> Any:
    """Updates of a tree of parameters, each times its layer's scale."""

    def scaled(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = tuple(str(getattr(key, "key", key)) for key in path)
        return layer_scale(names, depth=depth, layer_decay=layer_decay) * leaf

    return jax.tree_util.tree_map_with_path(scaled, updates)
