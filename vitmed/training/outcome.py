"""How far a training has come, a line for every epoch, and what it leaves in the end.

Shapes: `R` runs (seeds).
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vitmed.data import pipeline, sources
from vitmed.training import evaluation


@dataclasses.dataclass
class Progress:
    """How far a run has come, saved with every checkpoint: `losses` of the current epoch so far and `failed`, both for each run.

    `chunk` is the next chunk's number; `rows` are the lines of metrics.jsonl; seconds add up over restarts.
    """

    chunk: int
    losses: list[list[float]]
    failed: list[bool]
    rows: list[dict[str, Any]]
    train_seconds: float
    compile_seconds: float
    data_md5: str | None

    @property
    def number(self) -> int:
        """The checkpoint's number: how many chunks and validations lie behind it, so that no two states share one."""
        return self.chunk + len(self.rows)

    def spent(self, patience: int) -> list[bool]:
        """Whether each run had no better validation loss for `patience` epochs (0: never); nothing later counts for it, nor a failure."""
        best = self.rows[-1]["best_epoch"] if self.rows else [0] * len(self.failed)
        return [0 < patience <= len(self.rows) - epoch for epoch in best]

    def ended(self, plan: pipeline.Plan, patience: int) -> bool:
        """Whether no step is left: all are made or, with `patience`, no run can become better; an epoch that has begun is completed."""
        over = patience > 0 and all(bad or spent for bad, spent in zip(self.failed, self.spent(patience), strict=True))
        return self.chunk == plan.num_chunks or (over and self.chunk == plan.chunks_per_epoch * len(self.rows))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished training leaves: epochs made, the best ones [R] and their parameters (on the host), failures, predictions, times."""

    epochs: int
    best_epoch: list[int]
    failed_seeds: list[int]
    best_params: Any
    predictions: dict[str, evaluation.Predictions]
    measured: dict[str, dict[str, list[float | None]]]
    train_seconds: float
    compile_seconds: float
    test_seconds: float


def _measure(
    dataset: sources.Dataset, split: str, predictions: evaluation.Predictions, failed: list[bool]
) -> tuple[dict[str, list[float | None]], list[str]]:
    return evaluation.measure(
        dataset.description.task,
        dataset.splits[split].labels,
        probabilities=predictions.probabilities,
        losses=evaluation.mean_losses(predictions),
        class_names=dataset.description.class_names,
        failed=failed,
    )


def epoch_row(
    progress: Progress,
    predictions: Sequence[evaluation.Predictions],
    own: int,
    best_epoch: list[int],
    *,
    dataset: sources.Dataset,
    plan: pipeline.Plan,
    learning_rate: Callable[[int], float],
) -> dict[str, Any]:
    """An epoch's line of metrics.jsonl: a function of config and data alone, so it holds no time.

    Of several patch sizes, each with its predictions, `val` is that of the run's `own` one, and `forms` says of all what their own steps
    lost (null where an epoch has none) and how they do in validation.
    """
    measured = [_measure(dataset, "val", of_form, progress.failed)[0] for of_form in predictions]  # warnings come once, at the end
    steps = plan.steps_before(progress.chunk)
    # The last batch holds fewer examples than the others and counts for as many as it has.
    counts = np.full(plan.steps_per_epoch, plan.batch_size)
    counts[-1] = plan.num_examples - plan.batch_size * (plan.steps_per_epoch - 1)
    losses = np.asarray(progress.losses, np.float64)
    made_at = np.concatenate(
        [np.full(stop - first, plan.form(chunk, len(measured))) for chunk, first, stop in plan.chunks_of_epoch(len(progress.rows))]
    )
    forms = [
        {"train_loss": _mean_losses(losses[:, made_at == form], counts[made_at == form]), "val": of_form}
        for form, of_form in enumerate(measured)
    ]
    return {
        "epoch": len(progress.rows) + 1,
        "step": steps,
        "learning_rate": float(learning_rate(steps - 1)),
        "train_loss": _mean_losses(losses, counts),
        "val": measured[own],
        "best_epoch": best_epoch,
        **({"forms": forms} if len(forms) > 1 else {}),
    }


def _mean_losses(losses: np.ndarray, counts: np.ndarray) -> list[float | None]:
    """Each run's mean of losses [R, K] of steps with so many examples [K]; None where it is not finite or there is no step."""
    if not counts.size:
        return [None] * len(losses)
    return [float(loss) if np.isfinite(loss) else None for loss in np.average(losses, axis=1, weights=counts)]


def conclude(
    progress: Progress,
    predict: Callable[[sources.Split], evaluation.Predictions],
    best_epoch: np.ndarray,
    best_params: Any,
    *,
    dataset: sources.Dataset,
    seeds: Sequence[int],
    note: Callable[[str], None],
) -> Outcome:
    """The best parameters, with which `predict` does so, meet validation and, once, the test split."""
    predictions, measured, seconds = {}, {}, {}
    for name in ("val", "test"):
        started = time.perf_counter()
        predictions[name] = predict(dataset.splits[name])
        seconds[name] = time.perf_counter() - started
        measured[name], warnings = _measure(dataset, name, predictions[name], progress.failed)
        for warning in warnings:
            note(f"vitmed: {name}: {warning}")
    return Outcome(
        epochs=len(progress.rows),
        # A run that failed before its first epoch's end has no best one; its parameters are those of the beginning.
        best_epoch=np.maximum(best_epoch, 1).tolist(),
        failed_seeds=[seed for seed, bad in zip(seeds, progress.failed, strict=True) if bad],
        best_params=best_params,
        predictions=predictions,
        measured=measured,
        train_seconds=progress.train_seconds,
        compile_seconds=progress.compile_seconds,
        test_seconds=seconds["test"],
    )
