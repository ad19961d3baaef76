"""A split through the compiled prediction: every example once, and what is measured of it.

Shapes: `R` runs (seeds), `N` examples, `B` batch, `L` labels, `Q` classes.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vitmed import metrics
from vitmed.data import pipeline, sources

# Batches sent to the device before the oldest result is fetched: enough to keep it busy, few enough to bound memory.
IN_FLIGHT = 4


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What R runs say of N examples: probabilities [R, N, Q] and losses [R, N], float32."""

    probabilities: np.ndarray
    losses: np.ndarray


def predict(
    program: Callable[..., Any],
    params: Any,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    check: Callable[[], None] = lambda: None,
    own: np.ndarray | slice = slice(None),
) -> Predictions:
    """Images uint8 [N, *S, C] and labels [N, L] through `program`, in batches whose fillers are left out again.

    `check` is called before every batch; what it raises ends the pass. `own` are the examples of a batch that this process feeds.
    """
    pending: collections.deque = collections.deque()
    probabilities, losses = [], []

    def fetch() -> None:
        (batch_probabilities, batch_losses), real = pending.popleft()
        probabilities.append(np.asarray(batch_probabilities)[:, :real])
        losses.append(np.asarray(batch_losses)[:, :real])

    for batch, real in pipeline.evaluation_batches(images, labels, batch_size=batch_size, own=own):
        check()
        pending.append((program(params, batch), real))
        if len(pending) > IN_FLIGHT:
            fetch()
    while pending:
        fetch()
    return Predictions(np.concatenate(probabilities, axis=1), np.concatenate(losses, axis=1))


def predict_split(program: Callable[..., Any], params: Any, split: sources.Split, **how: Any) -> Predictions:
    """`predict` of a split."""
    return predict(program, params, split.images, split.labels, **how)


def mean_losses(predictions: Predictions) -> np.ndarray:
    """The mean over examples of each run's loss, [R] float64."""
    return predictions.losses.astype(np.float64).mean(axis=1)


def measure(
    task: str,
    labels: np.ndarray,
    *,
    probabilities: np.ndarray,
    losses: np.ndarray,
    class_names: Sequence[str],
    failed: Sequence[bool],
) -> tuple[dict[str, list[float | None]], list[str]]:
    """Metrics of labels [N, L] under probabilities [R, N, Q], beside the mean losses [R], and warnings that say what is undefined.

    Each metric is a list with one entry per run: null where it is undefined or the run failed.
    """
    table: dict[str, list[float | None]] = collections.defaultdict(list)
    warnings: list[str] = []
    for run, of_run in enumerate(probabilities):
        measured = metrics.compute(task, labels, of_run, class_names=class_names)
        for name, value in {"loss": float(losses[run]), **measured.values}.items():
            table[name].append(None if failed[run] or value is None or not np.isfinite(value) else value)
        if not failed[run]:
            warnings += [warning for warning in measured.warnings if warning not in warnings]
    return dict(table), warnings
