"""From a config to what is trained: checked, described and built in one place for every CLI.

`plan` reads no data and writes nothing: whatever is wrong with a config is an InputError there (`planning`, `checks`, `network`).
`recipe` is what the device needs, `run` trains into a folder; `record` writes what a finished run leaves.
"""

import contextlib
import dataclasses
import hashlib
import math
import sys
from collections.abc import Iterable
from typing import Any

import jax
import ml_collections
import numpy as np

from vitmed import building, features, planning, record
from vitmed import config as config_lib
from vitmed import fields as fields_lib
from vitmed import network as networks
from vitmed import start as starts
from vitmed.data import pipeline, sources
from vitmed.runs import checkpoint, folder, guard, machine, processes
from vitmed.training import loop, sharding, tracking, writers
from vitmed.training import outcome as outcomes

Experiment, plan = planning.Experiment, planning.plan
build_model, recipe, learning_rate = building.build_model, building.recipe, building.learning_rate
# A chunk should last about five seconds at most on two slow cores, so that signals and checkpoints never wait long. What a step costs is
# estimated, never measured: chunk boundaries must follow from the config alone.
CHUNK_SECONDS = 5.0
CHUNK_BYTES = 2**28  # of streamed images
MIXED_STEPS = 8  # at most in a chunk at one of several patch sizes, and no more than let all have their turn within an epoch


def step_plan(experiment: Experiment, num_examples: int) -> pipeline.Plan:
    """The training's steps and chunks, from the config and the number of training examples."""
    train, runs = experiment.config.train, len(experiment.seeds)
    image_bytes = math.prod(experiment.description.image_size) * experiment.description.num_channels  # as they are stored
    most = min(CHUNK_SECONDS / experiment.step_seconds, CHUNK_BYTES / (runs * train.batch_size * image_bytes))
    steps_per_epoch = math.ceil(num_examples / train.batch_size)
    if experiment.patch_sizes:
        most = min(most, MIXED_STEPS, steps_per_epoch // len(experiment.patch_sizes))
    chunks = math.ceil(steps_per_epoch / max(1, int(most)))
    return pipeline.Plan(
        num_examples=num_examples,
        batch_size=train.batch_size,
        epochs=train.epochs,
        steps_per_chunk=math.ceil(steps_per_epoch / chunks),  # chunks of an epoch as equal as can be
        sampler=train.sampler,
    )


def run(experiment: Experiment, run_folder: folder.RunFolder) -> dict[str, Any]:
    """Train into a folder that has been checked, from the last checkpoint on, and return what result.json says.

    Devices, data and weights are looked at before anything is written. Raises config.Stopped after a signal, with the state saved.
    """
    config = experiment.config.to_dict()
    processes.by_all(lambda: sharding.check_processes(experiment.mesh))
    with contextlib.ExitStack() as held:
        signals = guard.Signals()
        if processes.count() > 1:  # of one alone, a signal may end it at once as long as there is nothing to save
            held.enter_context(signals)
        dataset, start = _inputs(experiment, run_folder)
        if processes.count() > 1:
            signals.check()
        processes.by_main(lambda: run_folder.create(config))
        machine.cache_programs()
        processes.by_main(lambda: held.enter_context(guard.lock(run_folder.path)))
        if processes.count() == 1:
            held.enter_context(signals)
        held.enter_context(machine.memory_errors())
        run_folder.check(config)  # again, now that nobody else can write there
        if (finished := processes.by_main(run_folder.read_result)) is not None:
            return finished
        run_folder.tidy()
        if not _begun(run_folder):
            run_folder.write_model(dataclasses.replace(experiment.network, base=start.sha256).record(start.report))
        if all(split.examples is not None for split in dataset.splits.values()):
            run_folder.write_examples({name: split.examples for name, split in dataset.splits.items()})
        result = _train(experiment, run_folder, dataset=dataset, signals=signals, start=start)
        processes.most(0)  # process 0 has written it before any other ends, or goes on to a sweep's next point
    return result


def _inputs(experiment: Experiment, run_folder: folder.RunFolder) -> tuple[sources.Dataset, starts.Start]:
    """The data and what the run starts from; InputError where the processes of a run have not the same."""
    dataset = processes.main_first(experiment.load)
    if dataset.words and processes.is_main():
        print(f"vitmed: {dataset.words}", file=sys.stderr)
    processes.by_all(lambda: building.objective(experiment, dataset.splits["train"].labels))
    masks, weight = dataset.splits["train"].masks, experiment.config.train.mask_weight
    if weight and (masks is None or not masks.any()):
        raise config_lib.InputError(f"train.mask_weight={weight}: {experiment.description.name} has no masks of lesions; take 0")
    start = processes.by_all(lambda: starts.of(experiment, begun=_begun(run_folder)))
    if start.report is not None and processes.is_main():
        print(f"vitmed: {experiment.network.weights.path.name}: {start.report}", file=sys.stderr)
    if processes.count() > 1:
        processes.same("settings", folder.digest(experiment.config.to_dict()))
        processes.same("data", _digest(array for split in dataset.splits.values() for array in (split.images, split.labels)))
        processes.same("pretrained weights", _digest(jax.tree.leaves((start.base, start.trained))))
    return dataset, start


def _digest(arrays: Iterable[Any]) -> str:
    """SHA-256 of arrays, in order."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.shape} {array.dtype}".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def _train(
    experiment: Experiment, run_folder: folder.RunFolder, *, dataset: sources.Dataset, signals: guard.Signals, start: starts.Start
) -> dict[str, Any]:
    """Train, and write what a finished run leaves."""
    with _followed(experiment, run_folder) as observer:
        found = _outcomes(experiment, run_folder, dataset=dataset, signals=signals, start=start, observer=observer)
        result = record.leave_all(experiment, run_folder, dataset=dataset, found=found, base=start.base)
        observer.finished(found[experiment.own].measured["test"], lambda: record.shown(run_folder))
    return result


def _followed(experiment: Experiment, run_folder: folder.RunFolder) -> tracking.Observer:
    """Whoever follows the run from outside, in the process that writes."""
    if not processes.is_main():
        return tracking.Observer()
    fields, tracked = config_lib.flatten(experiment.config.to_dict()), experiment.tracked
    names = {"project": tracked.project, "name": tracked.name}
    return writers.start(tracked.writers, run_folder.path, config=fields, seeds=experiment.seeds, **names)


def _outcomes(
    experiment: Experiment,
    run_folder: folder.RunFolder,
    *,
    dataset: sources.Dataset,
    signals: guard.Signals,
    start: starts.Start,
    observer: tracking.Observer,
) -> list[outcomes.Outcome]:
    """Train to the end, from features where they are the same in every epoch."""
    config, labels = experiment.config, dataset.splits["train"].labels
    schedule = step_plan(experiment, len(labels))
    made = recipe(experiment, steps_per_epoch=schedule.steps_per_epoch, labels=labels, base=start.base)
    kept = features.cached(experiment, made, dataset, check=signals.check)
    found = loop.train(
        kept.recipe if kept else made,
        plan=schedule,
        dataset=kept.dataset if kept else dataset,
        run_folder=run_folder,
        signals=signals,
        learning_rate=learning_rate(experiment, steps_per_epoch=schedule.steps_per_epoch),
        checkpoint_seconds=config.train.checkpoint_seconds,
        evaluation_batch_size=config.eval.batch_size,
        placement=config.data.placement,
        label=experiment.label,
        start=start.trained,
        observer=observer,
    )
    return [kept.counted(outcome) for outcome in found] if kept else found


def finished(config: ml_collections.ConfigDict, run_folder: folder.RunFolder) -> dict[str, Any] | None:
    """The result of the run that a folder holds, None where it is not finished; InputError where the folder cannot hold this run."""
    fields_lib.conform(config.to_dict(), "the config")
    run_folder.check(config.to_dict())
    return run_folder.read_result()


def recorded_network(run_folder: folder.RunFolder) -> networks.Network | None:
    """The network of a run that has a checkpoint; None of one that has none and starts over, from its config."""
    if not _begun(run_folder):
        return None
    return networks.of_record(run_folder.read_model(), str(run_folder.model))


def _begun(run_folder: folder.RunFolder) -> bool:
    return processes.by_main(lambda: checkpoint.begun(run_folder.checkpoints))
