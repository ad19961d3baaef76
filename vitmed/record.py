"""What a finished training leaves in its folder: predictions, weights, calibration, and the record of it all, result.json."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from vitmed import config as config_lib
from vitmed import cost, planning
from vitmed.data import sources
from vitmed.models import exported
from vitmed.runs import files, folder, machine
from vitmed.study import operating
from vitmed.training import outcome as outcomes


def leave_all(
    experiment: planning.Experiment,
    run_folder: folder.RunFolder,
    *,
    dataset: sources.Dataset,
    found: Sequence[outcomes.Outcome],
    base: Any,
) -> dict[str, Any]:
    """Write what a run leaves; of several patch sizes each in a folder that is as a run's of that size alone, save for checkpoints."""
    for number, (form, outcome) in enumerate(zip(experiment.forms, found, strict=True)):
        if form.patch_size != experiment.patch_size and run_folder.writes:
            inside = run_folder.at_patch(config_lib.patch_text(form.patch_size))
            inside.create(form.config.to_dict())
            inside.write_model(run_folder.read_model())
            if run_folder.examples.exists():
                files.write_whole(inside.examples, files.read(run_folder.examples))
            rows = run_folder.read_metrics()
            inside.write_metrics([{name: row[name] for name in row if name != "forms"} | row["forms"][number] for row in rows])
            leave(form, inside, dataset=dataset, outcome=outcome, base=base)
    return leave(experiment, run_folder, dataset=dataset, outcome=found[experiment.own], base=base)


def leave(
    experiment: planning.Experiment, run_folder: folder.RunFolder, *, dataset: sources.Dataset, outcome: outcomes.Outcome, base: Any
) -> dict[str, Any]:
    """Write all of it, result.json last, which then says that the rest is there; return what that says.

    Parameters of a frozen `base` are counted and not written: of a plugin the checkpoint is all that is kept, as of a network of slices.
    """
    for split, predictions in outcome.predictions.items():
        labels = dataset.splits[split].labels
        run_folder.write_predictions(split, labels=labels, probabilities=predictions.probabilities, seeds=experiment.seeds)
    if experiment.gives_weights:
        write_weights(experiment, run_folder, outcome)
    task, labels, predictions = experiment.description.task, dataset.splits["val"].labels, outcome.predictions["val"]
    run_folder.write_calibration(operating.fit(task, labels, predictions.probabilities, seeds=experiment.seeds))
    said = result(experiment, dataset, outcome, num_frozen=sum(leaf.size for leaf in jax.tree.leaves(base)))
    run_folder.write_result(said)
    return said


def result(experiment: planning.Experiment, dataset: sources.Dataset, outcome: outcomes.Outcome, *, num_frozen: int = 0) -> dict[str, Any]:
    """What result.json says of a finished run."""
    config, description, network = experiment.config, experiment.description, experiment.network
    examples = len(dataset.splits["train"].labels)
    trainable = sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(outcome.best_params))  # of one seed
    # Of several patch sizes what is trained and kept serves all, and the network of one of them has a kernel and positions of its own.
    resized = cost.num_params(**experiment.shape) - cost.num_params(**experiment.shape | dataclasses.asdict(experiment.kept))
    return {
        "schema_version": folder.SCHEMA_VERSION,
        "dataset": description.name,
        "data_md5": dataset.md5,
        "task": description.task,
        "image_size": experiment.image_size,
        "patch_size": experiment.patch_size,
        "variant": config.model.variant,
        "pretrained": config.model.pretrained or None,
        "normalisation": {"mean": network.mean, "std": network.std},
        "seeds": experiment.seeds,
        "failed_seeds": outcome.failed_seeds,
        "num_tokens": experiment.num_slices * experiment.num_tokens,
        "num_params": trainable + num_frozen + resized,
        "num_trainable_params": trainable,
        "gmacs_forward": experiment.gmacs_forward,
        **{split: outcome.measured[split] for split in ("test", "val")},
        "best_epoch": outcome.best_epoch,
        "train_seconds": outcome.train_seconds,
        "compile_seconds": outcome.compile_seconds,
        "train_images_per_second": examples * outcome.epochs * len(experiment.seeds) / outcome.train_seconds,
        "test_milliseconds_per_image": 1e3 * outcome.test_seconds / (len(dataset.splits["test"].labels) * len(experiment.seeds)),
        "peak_memory_bytes": machine.peak_memory_bytes(experiment.mesh.devices.flat),
        "device": machine.device_name(experiment.mesh.devices.flat),
        "versions": machine.versions(),
        "config_digest": folder.digest(config.to_dict()),
    }


def write_weights(experiment: planning.Experiment, run_folder: folder.RunFolder, outcome: outcomes.Outcome) -> None:
    """The best parameters of each seed that has not failed, as a file that other runs and other programs can start from."""
    for index, seed in enumerate(experiment.seeds):
        if seed not in outcome.failed_seeds:
            params = experiment.computed_with(jax.tree.map(lambda leaf, run=index: leaf[run], outcome.best_params))
            run_folder.write_weights(seed, packed(experiment, params, seed=seed, val_loss=outcome.measured["val"]["loss"][index]))


def packed(experiment: planning.Experiment, params: Any, *, seed: int, val_loss: float) -> bytes:
    """The .safetensors file of one seed's parameters."""
    network = experiment.network
    return exported.pack(
        params,
        architecture=network.architecture,
        **dataclasses.asdict(experiment.geometry),
        mean=network.mean,
        std=network.std,
        seed=seed,
        val_loss=val_loss,
    )


def shown(run_folder: folder.RunFolder) -> tuple[Any, Any]:
    """A finished run's tables and figures; what draws them is imported only where somebody looks."""
    from vitmed.study import outline

    return outline.of_run(run_folder.path)
