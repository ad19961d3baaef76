"""From a config to what is trained: checked, described and built in one place for every CLI.

`plan` reads no data and writes nothing: whatever is wrong with a config is an InputError there. `recipe` is what the device needs,
`run` trains into a folder, `result` is the record of a finished run.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import ml_collections

from vitmed import config as config_lib
from vitmed import cost
from vitmed.data import pipeline, sources
from vitmed.models import build, inputs, vit
from vitmed.runs import folder, guard, machine
from vitmed.training import augment, loop, optim, programs, sharding, tasks

PLACEMENTS = ("auto", "device", "host")
MOST = 10**6  # epochs, images in a batch
# The preprocessing of the AugReg weights that the study starts from; a network from scratch takes the same.
DEFAULT_MEAN = DEFAULT_STD = 0.5
# A chunk should last about five seconds at most on two slow cores, so that signals and checkpoints never wait long. What a step costs is
# estimated from these rates, never measured: chunk boundaries must follow from the config alone.
CHUNK_SECONDS, GMACS_PER_SECOND, PARAMETER_BYTES_PER_SECOND = 5.0, 50.0, 5e9
CHUNK_BYTES = 2**28  # of streamed images


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config and what follows from it without reading data. Sizes are tuples, one entry per axis."""

    config: ml_collections.ConfigDict
    description: sources.Description
    variant: build.Variant
    patch_size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seeds: tuple[int, ...]
    augmentation: augment.Augmentation

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices; InputError where they do not suffice or a batch does not divide over them. The first use takes hold of them."""
        config, data = self.config, self.config.mesh.data
        config_lib.require(config.mesh.sequence == 1, "mesh.sequence", config.mesh.sequence, "1: this version splits no image's tokens")
        if data == -1:  # as many of the devices that fsdp leaves as divide the batches, so that the defaults run on any number of them
            left = max(1, jax.device_count() // max(1, config.mesh.fsdp))
            both = math.gcd(config.train.batch_size, config.eval.batch_size) // max(1, config.mesh.fsdp)
            data = next((number for number in range(left, 0, -1) if both % number == 0), 1)
        mesh = sharding.make_mesh(data=data, fsdp=config.mesh.fsdp)
        sharding.check_batch(mesh, "train.batch_size", config.train.batch_size)
        sharding.check_batch(mesh, "eval.batch_size", config.eval.batch_size)
        return mesh

    @property
    def image_size(self) -> tuple[int, ...]:
        """H, W or D, H, W of what the network sees."""
        return self.description.image_size

    @property
    def shape(self) -> dict[str, Any]:
        """The model's sizes as `cost` takes them."""
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "in_channels": self.config.model.in_channels,
            "width": self.variant.width,
            "depth": self.variant.depth,
            "mlp_width": self.variant.mlp_width,
            "num_classes": self.description.num_classes,
        }

    @property
    def label(self) -> str:
        """What a person calls this run."""
        return f"{self.description.name} patch {config_lib.patch_text(self.patch_size)}"

    def load(self) -> sources.Dataset:
        """The data, found or downloaded."""
        data = self.config.data
        return sources.load(data.name, size=data.size, root=data.root, verify=data.verify)


def plan(config: ml_collections.ConfigDict) -> Experiment:
    """Check a config and describe its run; InputError for whatever does not fit, before data are read or devices are touched."""
    config_lib.conform(config.to_dict(), "the config")
    description = sources.describe(config.data.name, config.data.size)
    if config.data.rank != description.rank:
        other = {2: "configs/vit2d.py", 3: "configs/vit3d.py"}[description.rank]
        raise config_lib.InputError(
            f"data.name={description.name} is {description.rank}D, this config is for {config.data.rank}D data; use {other}"
        )
    config_lib.one_of("data.placement", config.data.placement, PLACEMENTS)
    patch_size = config_lib.per_axis("model.patch_size", config.model.patch_size, description.rank)
    cost.num_patches(description.image_size, patch_size)
    mean = _normalisation(config, "mean", DEFAULT_MEAN)
    std = _normalisation(config, "std", DEFAULT_STD)
    config_lib.require(min(std) > 0, "model.std", std, "positive")
    _check_model(config, description.num_channels)
    _check_training(config)
    return Experiment(
        config=config,
        description=description,
        variant=build.variant(config.model.variant),
        patch_size=patch_size,
        mean=mean,
        std=std,
        seeds=_seeds(config),
        augmentation=_augmentation(config, description.image_size),
    )


def _check_model(config: ml_collections.ConfigDict, num_channels: int) -> None:
    model = config.model
    if model.pretrained:
        raise config_lib.InputError(f"model.pretrained={model.pretrained}: this version trains from scratch only; leave it empty")
    config_lib.one_of("model.pooling", model.pooling, vit.POOLINGS)
    config_lib.one_of("model.dtype", model.dtype, build.DTYPES)
    allowed = (1, 3) if num_channels == 1 else (num_channels,)
    config_lib.require(model.in_channels in allowed, "model.in_channels", model.in_channels, f"{' or '.join(map(str, allowed))} here")
    config_lib.require(0 <= model.drop_path < 1, "model.drop_path", model.drop_path, "from 0 to less than 1")


def _check_training(config: ml_collections.ConfigDict) -> None:
    train = config.train
    whole = {name: train[name] for name in ("epochs", "batch_size", "lr_step_epochs")}
    for name, value in ({f"train.{name}": value for name, value in whole.items()} | {"eval.batch_size": config.eval.batch_size}).items():
        config_lib.require(1 <= value <= MOST, name, value, f"from 1 to {MOST}")
    for name in ("learning_rate", "weight_decay", "lr_gamma", "epsilon", "checkpoint_seconds"):
        config_lib.finite(f"train.{name}", train[name], least=0.0)
    for name in ("beta1", "beta2"):
        config_lib.require(0 <= train[name] < 1, f"train.{name}", train[name], "from 0 to less than 1")


def _seeds(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    seeds = tuple(config.seeds)
    good = bool(seeds) and len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    config_lib.require(good, "seeds", seeds, "one or more different whole numbers from 0 to 2147483647")
    return seeds


def _normalisation(config: ml_collections.ConfigDict, name: str, default: float) -> tuple[float, ...]:
    """model.mean or model.std of values in [0, 1]: one number for all channels or one for each."""
    value, channels = config.model[name], config.model.in_channels
    numbers = (default,) if value == "auto" else value
    good = not isinstance(numbers, str) and len(numbers) in (1, channels) and all(math.isfinite(number) for number in numbers)
    config_lib.require(good, f"model.{name}", value, f"auto, one number, or {channels} for {channels} channels")
    return tuple(numbers)


def _augmentation(config: ml_collections.ConfigDict, image_size: tuple[int, ...]) -> augment.Augmentation:
    values = config.augment.to_dict()
    for name in ("flip_h", "flip_w", "brightness", "contrast"):
        config_lib.require(0 <= values[name] <= 1, f"augment.{name}", values[name], "from 0 to 1")
    config_lib.finite("augment.rotation_degrees", values["rotation_degrees"], least=0.0, most=180.0)
    for name in ("crop_scale", "crop_ratio"):
        good = len(values[name]) == 2 and 0 < values[name][0] <= values[name][1]
        config_lib.require(good, f"augment.{name}", values[name], "two positive numbers, the smaller first")
    config_lib.require(values["crop_scale"][1] <= 1, "augment.crop_scale", values["crop_scale"], "at most 1: the whole image")
    if values["quarter_turns"] and image_size[-1] != image_size[-2]:
        raise config_lib.InputError(f"augment.quarter_turns=True: images of {image_size} are not square; set it to False")
    return augment.Augmentation(**values)


def step_plan(experiment: Experiment, num_examples: int) -> pipeline.Plan:
    """The training's steps and chunks, from the config and the number of training examples."""
    train = experiment.config.train
    runs, shape = len(experiment.seeds), experiment.shape
    arithmetic = 3 * cost.gmacs_forward(**shape) * train.batch_size * runs / GMACS_PER_SECOND
    # An AdamW step reads and writes about eight arrays of the parameters' size.
    memory = 8 * 4 * cost.num_params(**shape) * runs / PARAMETER_BYTES_PER_SECOND
    image_bytes = math.prod(experiment.image_size) * experiment.description.num_channels
    most = min(CHUNK_SECONDS / (arithmetic + memory), CHUNK_BYTES / (runs * train.batch_size * image_bytes))
    steps_per_epoch = math.ceil(num_examples / train.batch_size)
    chunks = math.ceil(steps_per_epoch / max(1, int(most)))
    return pipeline.Plan(
        num_examples=num_examples,
        batch_size=train.batch_size,
        epochs=train.epochs,
        steps_per_chunk=math.ceil(steps_per_epoch / chunks),  # chunks of an epoch as equal as can be
    )


def recipe(experiment: Experiment, *, steps_per_epoch: int) -> programs.Recipe:
    """What the device programs are made of."""
    config, description = experiment.config, experiment.description
    model = build.model(
        experiment.variant,
        patch_size=experiment.patch_size,
        num_classes=description.num_classes,
        pooling=config.model.pooling,
        drop_path=config.model.drop_path,
        dtype=config.model.dtype,
    )
    train = config.train
    return programs.Recipe(
        init=functools.partial(build.initialise, model, image_size=experiment.image_size, in_channels=config.model.in_channels),
        apply=model.apply,
        prepare=functools.partial(inputs.prepare, in_channels=config.model.in_channels, mean=experiment.mean, std=experiment.std),
        task=tasks.TASKS[description.task],
        optimizer=optim.adamw(
            learning_rate(experiment, steps_per_epoch=steps_per_epoch),
            weight_decay=train.weight_decay,
            beta1=train.beta1,
            beta2=train.beta2,
            epsilon=train.epsilon,
        ),
        augmentation=experiment.augmentation,
        seeds=experiment.seeds,
        mesh=experiment.mesh,
        # One after another on a CPU, where the batched program is slower; together on accelerators, where one run does not fill the device.
        mapped=experiment.mesh.devices.flat[0].platform == "cpu",
    )


def learning_rate(experiment: Experiment, *, steps_per_epoch: int) -> Any:
    """The schedule: step -> learning rate."""
    train = experiment.config.train
    return optim.step_lr(train.learning_rate, steps_per_epoch=steps_per_epoch, lr_step_epochs=train.lr_step_epochs, lr_gamma=train.lr_gamma)


def result(experiment: Experiment, dataset: sources.Dataset, outcome: loop.Outcome) -> dict[str, Any]:
    """What result.json says of a finished run."""
    config, description, shape = experiment.config, experiment.description, experiment.shape
    examples = len(dataset.splits["train"].labels)
    num_params = cost.num_params(**shape)
    return {
        "schema_version": folder.SCHEMA_VERSION,
        "dataset": description.name,
        "data_md5": dataset.md5,
        "task": description.task,
        "image_size": experiment.image_size,
        "patch_size": experiment.patch_size,
        "variant": config.model.variant,
        "pretrained": config.model.pretrained or None,
        "normalisation": {"mean": experiment.mean, "std": experiment.std},
        "seeds": experiment.seeds,
        "failed_seeds": outcome.failed_seeds,
        "num_tokens": cost.num_tokens(experiment.image_size, experiment.patch_size),
        "num_params": num_params,
        "num_trainable_params": num_params,
        "gmacs_forward": cost.gmacs_forward(**shape),
        **{split: outcome.measured[split] for split in ("test", "val")},
        "best_epoch": outcome.best_epoch,
        "train_seconds": outcome.train_seconds,
        "compile_seconds": outcome.compile_seconds,
        "train_images_per_second": examples * config.train.epochs * len(experiment.seeds) / outcome.train_seconds,
        "test_milliseconds_per_image": 1e3 * outcome.test_seconds / (len(dataset.splits["test"].labels) * len(experiment.seeds)),
        "peak_memory_bytes": machine.peak_memory_bytes(experiment.mesh.devices.flat),
        "device": machine.device_name(experiment.mesh.devices.flat),
        "versions": machine.versions(),
        "config_digest": folder.digest(config.to_dict()),
    }


def run(experiment: Experiment, run_folder: folder.RunFolder) -> dict[str, Any]:
    """Train into a folder that has been checked, from the last checkpoint on, and return what result.json says.

    Devices and data are looked at before anything is written. Raises config.Stopped after a signal, with the state saved.
    """
    config, _ = experiment.config, experiment.mesh
    dataset = experiment.load()
    schedule = step_plan(experiment, len(dataset.splits["train"].labels))
    run_folder.create(config.to_dict())
    machine.cache_programs()
    with guard.lock(run_folder.path), guard.Signals() as signals, machine.memory_errors():
        run_folder.check(config.to_dict())  # again, now that nobody else can write there
        if (finished := run_folder.read_result()) is not None:
            return finished
        outcome = loop.train(
            recipe(experiment, steps_per_epoch=schedule.steps_per_epoch),
            plan=schedule,
            dataset=dataset,
            run_folder=run_folder,
            signals=signals,
            learning_rate=learning_rate(experiment, steps_per_epoch=schedule.steps_per_epoch),
            checkpoint_seconds=config.train.checkpoint_seconds,
            evaluation_batch_size=config.eval.batch_size,
            placement=config.data.placement,
            label=experiment.label,
        )
        for split, predictions in outcome.predictions.items():
            labels = dataset.splits[split].labels
            run_folder.write_predictions(split, labels=labels, probabilities=predictions.probabilities, seeds=experiment.seeds)
        record = result(experiment, dataset, outcome)
        run_folder.write_result(record)
    return record
