"""The fields of a config held against their limits, before data or devices are touched: each fault is one InputError."""

import ml_collections

from vitmed import config as config_lib
from vitmed.training import augment

MOST = 10**6  # epochs, images in a batch


def training(config: ml_collections.ConfigDict) -> None:
    """What `train` and `eval` say."""
    train = config.train
    whole = {name: train[name] for name in ("epochs", "batch_size", "lr_step_epochs")}
    for name, value in ({f"train.{name}": value for name, value in whole.items()} | {"eval.batch_size": config.eval.batch_size}).items():
        config_lib.require(1 <= value <= MOST, name, value, f"from 1 to {MOST}")
    for name in ("learning_rate", "weight_decay", "lr_gamma", "epsilon", "checkpoint_seconds"):
        config_lib.finite(f"train.{name}", train[name], least=0.0)
    for name in ("beta1", "beta2"):
        config_lib.require(0 <= train[name] < 1, f"train.{name}", train[name], "from 0 to less than 1")


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
