"""The four kinds of classification: their loss and their probabilities. The only file that knows the difference.

Shapes: `B` batch, `K` classes (2 for binary), `L` labels per example: 1, or the number of findings of a multi-label set, where K = L.
An ordinal task is trained by cross-entropy over its grades, as the study does; only its metrics know the order.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Task:
    """`loss(logits [B, K], labels [B, L])` -> [B], one value per example; `probabilities(logits)` -> [B, K]."""

    name: str
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    probabilities: Callable[[jax.Array], jax.Array]


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels[:, 0])


def _binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.losses.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype)).mean(axis=-1)


TASKS = {
    "binary": Task("binary", _cross_entropy, jax.nn.softmax),
    "multi-class": Task("multi-class", _cross_entropy, jax.nn.softmax),
    "multi-label": Task("multi-label", _binary_cross_entropy, jax.nn.sigmoid),
    "ordinal": Task("ordinal", _cross_entropy, jax.nn.softmax),
}


def masked_mean(values: jax.Array, mask: jax.Array, count: jax.Array) -> jax.Array:
    """The sum of `values` [B] where `mask` [B] is true, over `count`: what fills up a batch counts nowhere.

    `count` is how many are true, or of a part of a batch how many are true in all of it.
    """
    # where, not a product: an infinite loss of a filler must not become NaN.
    return jnp.where(mask, values, 0.0).sum() / jnp.maximum(count, 1)
