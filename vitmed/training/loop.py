"""The one training loop, from a recipe and a data set to predictions; read it top to bottom.

Order within a chunk: stop if asked, train, validate if an epoch ended, save if due. What a checkpoint holds is therefore always the
state, the best parameters, the position in the data and the metrics of one and the same step, and resuming is restoring. A signal also
ends a validation, which then comes first when the run goes on, and the final test.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vitmed import config
from vitmed.data import pipeline, sources
from vitmed.runs import checkpoint, folder, guard, processes
from vitmed.training import evaluation, outcome, programs, sharding, step, tracking

# A training split up to this share of the device's memory lives there; where the device does not tell its memory, up to this many bytes.
RESIDENT_SHARE, RESIDENT_BYTES = 0.25, 2**31


@dataclasses.dataclass
class Training:
    """What a checkpoint holds, all of the same step."""

    state: step.TrainState
    best: step.Best
    progress: outcome.Progress

    def save(self, checkpoints: checkpoint.Checkpoints) -> None:
        """Begin to write a checkpoint of what the newest one does not have."""
        checkpoints.save(self.progress.number, state=self.state, best=self.best, progress=dataclasses.asdict(self.progress))


def train(
    recipe: programs.Recipe,
    *,
    plan: pipeline.Plan,
    dataset: sources.Dataset,
    run_folder: folder.RunFolder,
    signals: guard.Signals,
    learning_rate: Callable[[int], float],
    checkpoint_seconds: float,
    evaluation_batch_size: int,
    placement: str,
    label: str,
    start: Any = None,
    observer: tracking.Observer | None = None,
) -> list[outcome.Outcome]:
    """Train to the end, or from the last checkpoint on; raises config.Stopped when a signal came, after saving.

    The outcome is one, or of a network of several patch sizes one for each. `start` are the parameters that every run starts from, None for
    fresh ones; a run that goes on from a checkpoint does not look at it. `placement` says where the training split lives: on the `device`,
    on the `host`, or `auto`; `learning_rate(step)` is for the record.
    The `observer` is told what happens and changes nothing.
    """
    observer = observer or tracking.Observer()
    images, labels = dataset.splits["train"].images, dataset.splits["train"].labels
    arrays = {"images": images, "labels": labels} | ({"lesions": dataset.splits["train"].masks} if recipe.mask_weight else {})
    resident, streamed = place(recipe.mesh, arrays, placement)
    own = sharding.own(recipe.mesh, plan.batch_size)
    own_of_evaluation = sharding.own(recipe.mesh, evaluation_batch_size)
    keep_best = programs.keep_best(recipe)
    with checkpoint.Checkpoints(run_folder.checkpoints) as checkpoints:
        training = restore_or_create(recipe, checkpoints, start=start, data_md5=dataset.md5)
        del start  # a copy of the parameters that nothing needs any more
        progress = training.progress
        run_folder.write_metrics(progress.rows)  # what an interrupted epoch wrote beyond the checkpoint is written again
        how = {"batch_size": evaluation_batch_size, "check": signals.check, "own": own_of_evaluation}
        predictors = []
        for form in recipe.each:
            program, seconds = programs.compile_predict(form, images, labels, batch_size=evaluation_batch_size)
            progress.compile_seconds += seconds
            predictors.append(functools.partial(evaluation.predict_split, program, **how))
        train_chunks, saved_at = {}, time.monotonic()
        with tracking.Progress(
            label,
            total_steps=plan.steps_before(plan.num_chunks),
            done_steps=plan.steps_before(progress.chunk),
            quiet=not processes.is_main(),
        ) as display:

            def validate() -> None:
                predictions = [predict(training.state.measured, dataset.splits["val"]) for predict in predictors]
                losses = np.mean([evaluation.mean_losses(of_form) for of_form in predictions], axis=0)
                training.best = keep_best(training.best, training.state, losses, len(progress.rows) + 1)
                best = np.asarray(training.best.epoch).tolist()
                row = outcome.epoch_row(progress, predictions, recipe.own, best, dataset=dataset, plan=plan, learning_rate=learning_rate)
                progress.rows.append(row)
                progress.losses = [[] for _ in recipe.seeds]
                run_folder.write_metrics(progress.rows)
                display.validated(progress.rows[-1]["val"]["loss"])
                observer.validated(progress.rows[-1])

            try:
                in_validation = len(progress.rows) < progress.chunk // plan.chunks_per_epoch  # stopped in that of an epoch
                observer.begun(plan.steps_before(progress.chunk) - in_validation)
                if in_validation:
                    validate()
                chunks = pipeline.training_chunks(
                    plan, recipe.seeds, start=progress.chunk, streamed=streamed, own=own, classes=labels[:, 0]
                )
                for chunk in () if progress.ended(plan, recipe.patience) else chunks:
                    signals.check()
                    form = plan.form(chunk.number, len(recipe.each))
                    if form not in train_chunks:
                        compiled = programs.compile_chunk(recipe.each[form], chunk.batches, resident, batch_size=plan.batch_size)
                        train_chunks[form], seconds = compiled
                        progress.compile_seconds += seconds
                    advance(training, chunk, train_chunks[form], resident, recipe=recipe, plan=plan, display=display, observer=observer)
                    if plan.ends_epoch(chunk.number):
                        validate()
                    if processes.most(time.monotonic() - saved_at >= checkpoint_seconds):
                        training.save(checkpoints)
                        saved_at = time.monotonic()
                    checkpoints.poll()
                    if progress.ended(plan, recipe.patience):
                        break
                display.end(f"{label}: ended after epoch {len(progress.rows)}")
                training.save(checkpoints)
                checkpoints.finish()
                best_epoch, best_params = np.asarray(training.best.epoch), programs.whole(recipe, training.best.params)
                how = {"dataset": dataset, "seeds": recipe.seeds, "note": display.note}
                return [
                    outcome.conclude(progress, functools.partial(predict, training.best.params), best_epoch, best_params, **how)
                    for predict in predictors
                ]
            except config.Stopped:
                training.save(checkpoints)
                checkpoints.finish()
                display.note(f"{label}: stopped by a signal at step {plan.steps_before(progress.chunk)}, saved; run it again to go on")
                raise


def place(
    mesh: jax.sharding.Mesh, arrays: dict[str, np.ndarray], placement: str
) -> tuple[dict[str, jax.Array], dict[str, np.ndarray] | None]:
    """(arrays on every device, None), or ({}, the arrays on the host) where they are too large or it is asked for."""
    stats = mesh.local_devices[0].memory_stats() or {}
    limit = processes.least(int(RESIDENT_SHARE * stats["bytes_limit"] if "bytes_limit" in stats else RESIDENT_BYTES))
    if placement == "host" or (placement == "auto" and sum(array.nbytes for array in arrays.values()) > limit):
        return {}, arrays
    return sharding.put(arrays, sharding.replicated(mesh)), None


def restore_or_create(recipe: programs.Recipe, checkpoints: checkpoint.Checkpoints, *, start: Any, data_md5: str | None) -> Training:
    """The newest intact checkpoint, or the beginning; InputError where the run began with other data."""
    latest = checkpoints.latest()
    if latest is None:
        nothing = [[] for _ in recipe.seeds]
        start_of = {"losses": nothing, "failed": [False] * len(nothing), "rows": [], "train_seconds": 0, "compile_seconds": 0}
        begun = outcome.Progress(0, **start_of, data_md5=data_md5)
        return Training(*programs.create(recipe, start), begun)
    state, best = recipe.abstract
    items = checkpoints.restore(latest, state=state, best=best, progress=None)
    progress = outcome.Progress(**items["progress"])
    if progress.data_md5 != data_md5:
        raise config.InputError(f"the data have MD5 {data_md5}, this run began with {progress.data_md5}; give it its own data (data.root)")
    return Training(items["state"], items["best"], progress)


def advance(
    training: Training,
    chunk: pipeline.Chunk,
    program: Callable[..., Any],
    resident: dict[str, jax.Array],
    *,
    recipe: programs.Recipe,
    plan: pipeline.Plan,
    display: tracking.Progress,
    observer: tracking.Observer,
) -> None:
    """Make a chunk's steps, and keep and show what came of them; a run that failed in it is named."""
    progress = training.progress
    started = time.perf_counter()
    training.state, losses = program(training.state, chunk.batches, chunk.num_steps, resident)
    losses = np.asarray(losses)[:, : chunk.num_steps]  # waits for the device
    seconds = time.perf_counter() - started
    progress.chunk = chunk.number + 1
    progress.train_seconds += seconds
    progress.losses = [before + now for before, now in zip(progress.losses, losses.tolist(), strict=True)]
    spent = progress.spent(recipe.patience)
    for run, failed_at in enumerate(np.asarray(training.state.failed_at)):
        if failed_at != step.ALIVE and not progress.failed[run] and not spent[run]:
            progress.failed[run] = True
            display.note(f"vitmed: seed {recipe.seeds[run]}: loss or gradient not finite at step {failed_at}; kept as it was before")
    rate, steps = chunk.num_examples / seconds, plan.steps_before(progress.chunk)
    display.trained(steps, epoch=plan.position(chunk.number)[0] + 1, images_per_second=rate, losses=losses[:, -1])
    observer.trained(steps, losses=losses.mean(axis=1), images_per_second=rate)
