"""The fields of a config held against their limits, before data or devices are touched: each fault is one InputError."""

import dataclasses
import math

import ml_collections

from vitmed import config as config_lib
from vitmed import cost
from vitmed import fields as fields_lib
from vitmed.data import folder, pipeline, preparation, sources
from vitmed.models import adapters, resample, slices
from vitmed.training import augment, optim, writers

MOST = 10**6  # epochs, images in a batch
MOST_PIXELS = 2**12  # along an axis of a resized image
# Fields that only own data have a use for; data.cache may stand anywhere, as may data.root.
OWN = tuple(f"data.{name}" for name in ("spacing", "window", "task", "classes", "shares", "split_seed", "folds", "fold"))


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The image that the network sees, the patch it is cut into, and the pixels of a token's kernel: one entry per axis each."""

    image_size: tuple[int, ...]
    patch_size: tuple[int, ...]
    kernel_size: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tracked:
    """Where a run is shown while it trains, the project it belongs to there, and its name (empty: that of its folder)."""

    writers: tuple[str, ...]
    project: str
    name: str


def geometry(config: ml_collections.ConfigDict, description: sources.Description) -> Geometry:
    """What `data.resize`, `model.patch_size` and `model.kernel_size` say, for images of a set."""
    rank, resize = description.rank, config.data.resize
    config_lib.require(0 <= resize <= MOST_PIXELS, "data.resize", resize, f"from 1 to {MOST_PIXELS}, or 0 for images as they are")
    patch_size = config_lib.per_axis("model.patch_size", config.model.patch_size, rank)
    given = config_lib.per_axis("model.kernel_size", config.model.kernel_size, rank, zero=True)
    if config.model.views:
        patch_size, given = (
            _of_slices(name, config.model[name], sizes) for name, sizes in (("patch_size", patch_size), ("kernel_size", given))
        )
    shapes = Geometry(
        image_size=(resize,) * rank if resize else description.image_size,
        patch_size=patch_size,
        kernel_size=tuple(kernel or patch for kernel, patch in zip(given, patch_size, strict=True)),
    )
    cost.grid(**dataclasses.asdict(shapes))
    if config.model.position_resize == "cut":
        resample.uncut_grid(**dataclasses.asdict(shapes))
    return shapes


def patch_sizes(config: ml_collections.ConfigDict, shapes: Geometry, *, num_examples: int) -> tuple[tuple[int, ...], ...]:
    """The patch sizes that `model.patch_sizes` names, each as `model.patch_size` is written; none where the network has but one.

    InputError where that is none of them, they do not go with another field, or `num_examples` do not make a step for each.
    """
    text, model, rank = config.model.patch_sizes, config.model, len(shapes.patch_size)
    if not text:
        return ()
    name = f"model.patch_sizes={text}"
    found = [config_lib.parse("model.patch_sizes", part.strip(), (0,)) for part in text.split(",")]
    config_lib.require(not any(isinstance(size, str) for size in found), "model.patch_sizes", text, "numbers, such as 28,14,7; or empty")
    whole = [config_lib.per_axis("model.patch_sizes", size, rank) for size in found]
    for size in whole:
        cost.grid(shapes.image_size, size)
    several = len(whole) > 1 and len(set(whole)) == len(whole)
    config_lib.require(several, "model.patch_sizes", text, "two or more that each come once, such as 28,14,7; or empty")
    if shapes.patch_size not in whole:
        raise config_lib.InputError(f"model.patch_size={config_lib.patch_text(shapes.patch_size)}: must be one of {name}")
    needs = {
        "model.views": (model.views, ""),
        "model.kernel_size": (model.kernel_size, (0,)),
        "model.position_resize": (model.position_resize, "bicubic"),
        "mesh.sequence": (config.mesh.sequence, 1),  # of large patches there are few tokens
        # A central slice, and codes of the depth, are not what they were once they are resized along it.
        "model.inflation": (model.inflation, "average"),
        "model.depth_positions": (model.depth_positions, "copy"),
    }
    for field, (value, usual) in needs.items():
        config_lib.require(value == usual, field, value, f"{config_lib.example(usual) or 'empty'} with {name}")
    steps = config.train.epochs * math.ceil(num_examples / config.train.batch_size)
    if steps < len(found):
        raise config_lib.InputError(f"{name}: {steps} steps are fewer than the sizes, which take turns; train for more epochs")
    return tuple(found)


def _of_slices(name: str, value: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The patch or kernel of slices as one of volumes: one deep."""
    good = len(value) == 1 or value[0] in ((1,) if name == "patch_size" else (0, 1))
    config_lib.require(
        good, f"model.{name}", value, f"one number, or 1x{'x'.join(map(str, value[1:]))}, with model.views: slices are one deep"
    )
    return (1, *sizes[1:])


def views(config: ml_collections.ConfigDict, description: sources.Description, shapes: Geometry) -> tuple[str, ...]:
    """The views that `model.views` says, for a set; InputError where they do not go with it or with another field."""
    found, weight = slices.parse(config.model.views), config.train.mask_weight
    config_lib.finite("train.mask_weight", weight, least=0.0, most=1e6)
    if weight and not found:
        raise config_lib.InputError(f"train.mask_weight={weight}: masks supervise the slices of model.views; name views, or take 0")
    if not found:
        return ()
    if description.rank != 3:
        raise config_lib.InputError(
            f"model.views={config.model.views}: {description.name} is 2D, and views are of volumes; leave them empty"
        )
    slices.num_slices(found, shapes.image_size)
    allowed = {"model.pooling": (config.model.pooling, ("auto", "cls", "mean")), "mesh.sequence": (config.mesh.sequence, (1,))}
    for name, (value, good) in allowed.items():
        config_lib.require(value in good, name, value, f"{' or '.join(map(str, good))} with model.views: slices are pooled by a query")
    resized = weight and shapes.image_size != description.image_size
    config_lib.require(not resized, "train.mask_weight", weight, "0 with data.resize: masks are as the images are stored")
    config_lib.require(not (weight and config.train.mixup), "train.mask_weight", weight, "0 with train.mixup: masks are not mixed")
    return found


def own_data(config: ml_collections.ConfigDict) -> folder.Settings:
    """What `data` says of own data; InputError where it says something of a set that it is not for."""
    data, rank = config.data, config.data.rank
    config_lib.require(rank in (2, 3), "data.rank", rank, "2 or 3")
    if not sources.is_own(data.name):
        for name, default in {name: value for name, value in fields_lib.ADDED.items() if name in OWN}.items():
            value = data[name.removeprefix("data.")]
            usual = tuple(default) if isinstance(default, list) else default
            config_lib.require(
                value == usual, name, value, f"{config_lib.example(usual) or 'empty'} with {data.name}: it is for folder:PATH alone"
            )
    size = config_lib.per_axis("data.size", data.size, rank, zero=True)
    config_lib.require(max(size) <= MOST_PIXELS, "data.size", data.size, f"at most {MOST_PIXELS} along an axis")
    config_lib.require(len(data.spacing) in (1, rank), "data.spacing", data.spacing, f"one number, or {rank} for {rank} axes")
    for step in data.spacing:
        config_lib.finite("data.spacing", step, least=0.0, most=1e3)
    for name in ("window", "task"):  # where numbers would be taken for numbers
        config_lib.require(isinstance(data[name], str), f"data.{name}", data[name], "a word; see configs/vit2d.py")
    preparation.check_window(data.window)
    config_lib.one_of("data.task", data.task, folder.TASKS)
    good = len(data.shares) == 3 and all(math.isfinite(share) and share >= 0 for share in data.shares) and data.shares[0] > 0
    config_lib.require(good, "data.shares", data.shares, "three numbers from 0 on, of train, val and test")
    config_lib.require(data.folds == 0 or 3 <= data.folds <= 1000, "data.folds", data.folds, "0, or from 3 to 1000")
    config_lib.require(0 <= data.fold < max(1, data.folds), "data.fold", data.fold, f"from 0 to less than data.folds={data.folds}")
    return folder.Settings(
        rank=rank,
        spacing=data.spacing,
        window=data.window,
        task=data.task,
        classes=tuple(name.strip() for name in data.classes.split(",")) if data.classes else (),
        shares=data.shares,
        split_seed=data.split_seed,
        folds=data.folds,
        fold=data.fold,
        cache=data.cache,
    )


def training(config: ml_collections.ConfigDict) -> None:
    """What `train` and `eval` say."""
    train = config.train
    whole = {name: train[name] for name in ("epochs", "batch_size", "lr_step_epochs")}
    for name, value in ({f"train.{name}": value for name, value in whole.items()} | {"eval.batch_size": config.eval.batch_size}).items():
        config_lib.require(1 <= value <= MOST, name, value, f"from 1 to {MOST}")
    divides = train.micro_batch_size >= 0 and (train.micro_batch_size == 0 or train.batch_size % train.micro_batch_size == 0)
    allowed = f"0, or a divisor of train.batch_size={train.batch_size}"
    config_lib.require(divides, "train.micro_batch_size", train.micro_batch_size, allowed)
    for name in ("lr_gamma", "checkpoint_seconds"):
        config_lib.finite(f"train.{name}", train[name], least=0.0)
    # Within these AdamW's update of a parameter that a step can use (one whose square is a number in float32) is itself
    # a number wherever the gradient's squared norm is one, which is what a step looks at.
    config_lib.finite("train.learning_rate", train.learning_rate, least=0.0, most=1e15)
    config_lib.finite("train.weight_decay", train.weight_decay, least=0.0, most=1e3)
    config_lib.finite("train.epsilon", train.epsilon, least=1e-20, most=1e3)
    for name in ("beta1", "beta2"):
        config_lib.require(0 <= train[name] < 1, f"train.{name}", train[name], "from 0 to less than 1")
    config_lib.require(0 <= train.patience <= MOST, "train.patience", train.patience, f"from 0 to {MOST}")
    config_lib.one_of("train.schedule", train.schedule, optim.SCHEDULES)
    within = 0 <= train.warmup_epochs < train.epochs
    allowed = f"from 0 to less than the {train.epochs} of train.epochs"
    config_lib.require(within, "train.warmup_epochs", train.warmup_epochs, allowed)
    config_lib.require(0 < train.layer_decay <= 1, "train.layer_decay", train.layer_decay, "above 0 and at most 1")
    config_lib.require(0 <= train.ema_decay < 1, "train.ema_decay", train.ema_decay, "from 0 to less than 1")


def tuning(config: ml_collections.ConfigDict, *, depth: int) -> adapters.Tuning:
    """What is trained of a network of so many blocks; InputError where what is said of LoRA or adapters would change nothing."""
    model, (name, _, blocks) = config.model, config.train.tune.partition(":")
    config_lib.one_of("train.tune", name, adapters.TUNES)
    last = int(blocks) if blocks.isdecimal() else 0
    good = 1 <= last <= depth if name == "last" else not blocks
    allowed = f"{name}:N with N from 1 to {depth}, the network's blocks" if name == "last" else f"{name}, which takes no number"
    config_lib.require(good, "train.tune", config.train.tune, allowed)
    if name != "all" and not model.pretrained:
        raise config_lib.InputError(
            f"train.tune={config.train.tune}: needs a base that has been trained; give model.pretrained, or take all"
        )
    for part, of in (("lora", "lora"), ("adapter", "adaptformer")):
        for field, usual in fields_lib.ADDED.items():
            if field.startswith(f"model.{part}_") and name != of:
                value = model[field.removeprefix("model.")]
                config_lib.require(value == usual, field, value, f"{usual} with train.tune={name}: it is for train.tune={of} alone")
    if name == "lora":
        config_lib.require(1 <= model.lora_rank <= 1024, "model.lora_rank", model.lora_rank, "from 1 to 1024")
        config_lib.finite("model.lora_alpha", model.lora_alpha, least=0.0, most=1e6)
        lora = adapters.Lora(model.lora_rank, model.lora_alpha, tuple(part.strip() for part in model.lora_targets.split(",")))
        adapters.lora_layers(depth, lora.targets)
        return adapters.Tuning(name, lora=lora)
    if name == "adaptformer":
        config_lib.require(1 <= model.adapter_width <= 10**5, "model.adapter_width", model.adapter_width, "from 1 to 100000")
        config_lib.finite("model.adapter_scale", model.adapter_scale, least=0.0, most=1e3)
        return adapters.Tuning(name, adapter_width=model.adapter_width, adapter_scale=model.adapter_scale)
    return adapters.Tuning(name, blocks=last)


def objective(config: ml_collections.ConfigDict, description: sources.Description) -> None:
    """What `train` says of the training loss and of how often each class is seen, for a set."""
    train, number = config.train, description.num_classes
    config_lib.require(0 <= train.label_smoothing < 1, "train.label_smoothing", train.label_smoothing, "from 0 to less than 1")
    config_lib.finite("train.focal_gamma", train.focal_gamma, least=0.0, most=100.0)
    config_lib.finite("train.mixup", train.mixup, least=0.0, most=1e3)
    if isinstance(train.class_weights, str):
        config_lib.one_of("train.class_weights", train.class_weights, ("none", "balanced"))
    else:
        weights = tuple(train.class_weights)
        good = len(weights) == number and all(1e-6 <= weight <= 1e6 for weight in weights)
        allowed = f"none, balanced, or {number} numbers from 1e-06 to 1e+06, one per class ({', '.join(description.class_names)})"
        config_lib.require(good, "train.class_weights", weights, allowed)
    config_lib.one_of("train.sampler", train.sampler, pipeline.SAMPLERS)
    if train.sampler == "balanced" and description.task == "multi-label":
        raise config_lib.InputError(
            f"train.sampler=balanced: {description.name} has several labels per image, which no choice of images balances one by one; "
            "take train.class_weights=balanced instead"
        )


def tracked(config: ml_collections.ConfigDict) -> Tracked:
    """What `tracking` says."""
    config_lib.require(bool(config.tracking.project), "tracking.project", config.tracking.project, "a name")
    return Tracked(writers.parse(config.tracking.writers), config.tracking.project, config.tracking.name)


def seeds(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """The seeds."""
    seeds = tuple(config.seeds)
    good = bool(seeds) and len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    config_lib.require(good, "seeds", seeds, "one or more different whole numbers from 0 to 2147483647")
    return seeds


def augmentation(config: ml_collections.ConfigDict, image_size: tuple[int, ...]) -> augment.Augmentation:
    """What `augment` says, for images of this size."""
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
