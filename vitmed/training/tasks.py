"""The four kinds of classification: their loss and their probabilities. The only file that knows the difference.

Shapes: `B` batch, `K` classes (2 for binary), `L` labels per example: 1, or the number of findings of a multi-label set, where K = L.
An ordinal task is trained by cross-entropy over its grades, as the study does; only its metrics know the order.
What a step minimises may be another function than a task's own loss (`objective`). Validation and test keep to the task's own, which
chooses the best epoch: runs of different objectives are measured alike.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vitmed import config


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


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step minimises: the sum of `loss` over the real examples of a batch, divided by their `total`.

    `targets(labels [B, L])` are what `loss(logits [B, K], targets)` -> [B] is asked for; `total(targets, mask [B])` is a number that needs
    no logits, so that a batch may go through the model in parts.
    """

    targets: Callable[[jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    total: Callable[[jax.Array, jax.Array], jax.Array]


def _unknown(*_: jax.Array) -> jax.Array:
    raise ValueError("train.class_weights=balanced: without the labels of the training split nothing can be trained")


UNKNOWN = Objective(_unknown, _unknown, _unknown)


def plain(task: Task) -> Objective:
    """The mean of a task's own loss."""
    return Objective(lambda labels: labels, task.loss, lambda _, mask: mask.sum())


def objective(
    task: Task,
    *,
    num_classes: int,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Objective:
    """The mean of a weighted focal loss of smoothed targets; its targets are numbers [B, K], in which it is linear: they can be mixed.

    Focal loss (arXiv 1708.02002) multiplies each -log p by (1 - p)^gamma. One label: smoothing e leaves the class 1 - e + e/K and gives
    the others e/K, each class counts `class_weights` times, and the sum is divided by the weights of the examples' own classes, as
    PyTorch's cross_entropy does. Several labels: y becomes y (1 - e) + e/2, and `class_weights` multiply the positive part of each, as
    PyTorch's binary_cross_entropy_with_logits does with pos_weight, which divides by no weights.
    """
    weights = np.ones(num_classes, np.float32) if class_weights is None else np.asarray(class_weights, np.float32)
    how = {"smoothing": label_smoothing, "gamma": focal_gamma}
    if task.name == "multi-label":
        return Objective(
            lambda labels: labels.astype(jnp.float32),
            lambda logits, targets: _sigmoid_loss(logits, targets, weights, **how),
            lambda _, mask: mask.sum(),
        )
    # The loss is the same whatever the weights' scale; the least is made 1, so that a batch with a real example has a total of 1 at least.
    weights = weights / weights.min()
    return Objective(
        lambda labels: jax.nn.one_hot(labels[:, 0], num_classes),
        lambda logits, targets: _softmax_loss(logits, targets, weights, **how),
        lambda targets, mask: jnp.where(mask, targets @ weights, 0.0).sum(),
    )


def _softmax_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array, *, smoothing: float, gamma: float) -> jax.Array:
    """sum_c w_c q_c (1 - p_c)^gamma (-log p_c) of smoothed targets q [B, K] -> [B]."""
    log_p = jax.nn.log_softmax(logits)
    smoothed = targets * (1 - smoothing) + smoothing / targets.shape[-1]
    return (weights * smoothed * _focal(log_p, gamma)).sum(axis=-1)


def _sigmoid_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array, *, smoothing: float, gamma: float) -> jax.Array:
    """The mean over labels of w y (1 - p)^gamma (-log p) + (1 - y) p^gamma (-log(1 - p)) of smoothed targets y [B, K] -> [B]."""
    smoothed = targets * (1 - smoothing) + smoothing / 2
    yes, no = _focal(jax.nn.log_sigmoid(logits), gamma), _focal(jax.nn.log_sigmoid(-logits), gamma)
    return (weights * smoothed * yes + (1 - smoothed) * no).mean(axis=-1)


def _focal(log_p: jax.Array, gamma: float) -> jax.Array:
    """(1 - p)^gamma (-log p), with a finite derivative also where p is 1."""
    if gamma == 0:
        return -log_p
    rest = jnp.maximum(-jnp.expm1(log_p), jnp.finfo(log_p.dtype).eps)  # below one half, the derivative of the power has a pole at 0
    return rest**gamma * -log_p


def balanced_weights(task: Task, labels: np.ndarray, class_names: Sequence[str]) -> tuple[float, ...]:
    """Weights that make classes count alike, from the labels [N, L] of a training split; InputError where one of them is not there.

    One label: N / (K n_k), scikit-learn's "balanced". Several: negatives / positives of each label, as PyTorch advises for pos_weight.
    """
    many = task.name == "multi-label"
    with_it = labels.sum(axis=0) if many else np.bincount(labels[:, 0], minlength=len(class_names))
    other = len(labels) - with_it
    for name, positives, negatives in zip(class_names, with_it, other, strict=True):
        if positives == 0 or (many and negatives == 0):
            which = "only" if positives else "no"
            raise config.InputError(
                f"train.class_weights=balanced: the training split has {which} examples of {config.one_line(name)}; give a number per class"
            )
    balanced = other / with_it if many else len(labels) / (len(class_names) * with_it)
    return tuple(float(weight) for weight in balanced)


def masked_mean(values: jax.Array, mask: jax.Array, count: jax.Array) -> jax.Array:
    """The sum of `values` [B] where `mask` [B] is true, over `count`: what fills up a batch counts nowhere.

    `count` is how many are true, or an objective's total, at least 1; of a part of a batch it is that of all of it.
    """
    # where, not a product: an infinite loss of a filler must not become NaN.
    return jnp.where(mask, values, 0.0).sum() / jnp.maximum(count, 1)
