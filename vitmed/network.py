"""What a run's network is, what it is fed, and the weights that it starts from: the `model` section of a config, checked and resolved.

A run records it (model.json), so that it is resumed, evaluated and used without the weights it started from.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from vitmed import config as config_lib
from vitmed.data import sources
from vitmed.models import build, pretrained, resample, vit
from vitmed.models import weights as weights_lib

# A network from scratch takes the preprocessing of the AugReg weights that the study starts from.
DEFAULT_MEAN = DEFAULT_STD = (0.5,)


@dataclasses.dataclass(frozen=True)
class Network:
    """An architecture, the mean and std that its input is normalised by, and what it starts from: described weights, or None."""

    architecture: build.Architecture
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: weights_lib.Weights | None = None
    description: sources.Description | None = None  # of the data; None of a run that an older version recorded
    base: str | None = None  # SHA-256 of the weights that a run whose base is frozen stands on, as it recorded it

    def record(self, report: pretrained.Report | None) -> dict[str, Any]:
        """What model.json says: enough to build the network again, and what became of the weights."""
        return {
            "architecture": dataclasses.asdict(self.architecture),
            "mean": self.mean,
            "std": self.std,
            "data": None if self.description is None else dataclasses.asdict(self.description),
            "base": self.base,
            "weights": None
            if report is None
            else {"file": self.weights.path.name, **dataclasses.asdict(report), "loaded": len(report.loaded)},
        }


def of_record(record: Mapping[str, Any], where: str) -> Network:
    """The network of a run from its model.json; InputError where that is broken."""
    fields = {field.name: field.type for field in dataclasses.fields(build.Architecture)}
    said = record.get("architecture")
    good = isinstance(said, dict) and {name: type(value) for name, value in said.items()} == fields
    for name in ("mean", "std"):
        numbers = record.get(name)
        good = good and isinstance(numbers, list) and bool(numbers) and all(isinstance(number, float) for number in numbers)
    if not good:
        raise config_lib.InputError(f"{where} is not what this version writes; restore it from a copy or run into another folder")
    data = record.get("data")
    try:
        description = None if data is None else sources.of_record(data)
    except (LookupError, TypeError, ValueError) as error:
        raise config_lib.InputError(f"{where} does not say what its data are; restore it from a copy or run into another folder") from error
    mean, std = tuple(record["mean"]), tuple(record["std"])
    return Network(build.Architecture(**said), mean, std, description=description, base=record.get("base"))


def of_config(config: ml_collections.ConfigDict, description: sources.Description, *, look: bool = True) -> Network:
    """The network that a config asks for; weights are found, or downloaded, and their names and shapes read. InputError.

    Without a `look` at weights, the variant's own architecture stands for theirs, with a pooling that it has.
    """
    model = config.model
    config_lib.one_of("model.pooling", model.pooling, ("auto", *vit.POOLINGS))
    config_lib.one_of("model.inflation", model.inflation, resample.INFLATIONS)
    config_lib.one_of("model.depth_positions", model.depth_positions, resample.DEPTH_POSITIONS)
    config_lib.one_of("model.position_resize", model.position_resize, resample.POSITION_RESIZES)
    config_lib.one_of("model.dtype", model.dtype, build.DTYPES)
    config_lib.require(0 <= model.drop_path < 1, "model.drop_path", model.drop_path, "from 0 to less than 1")
    channels = description.num_channels
    allowed = (1, 3) if channels == 1 else (channels,)
    config_lib.require(model.in_channels in allowed, "model.in_channels", model.in_channels, f"{' or '.join(map(str, allowed))} here")
    mean, std = _normalisation(config, "mean", DEFAULT_MEAN), _normalisation(config, "std", DEFAULT_STD)
    config_lib.require(min(std) > 0, "model.std", std, "positive")
    variant = build.variant(model.variant)
    if not model.pretrained or not look:
        own = model.pooling if look or model.pooling in ("cls", "mean", "attention") else "auto"
        return Network(build.pooled(variant, own), mean, std, description=description)
    weights = weights_lib.describe(model.pretrained, expected=variant)
    if model.in_channels not in (1, weights.in_channels) and weights.in_channels != 1:
        raise config_lib.InputError(f"model.in_channels={model.in_channels}: {model.pretrained} is for {weights.in_channels} channels")
    architecture = build.pooled(weights.architecture, model.pooling)
    if "auto" in (model.mean, model.std):
        known = weights_lib.preprocessing(model.pretrained)
        mean, std = (_normalisation(config, name, auto) for name, auto in zip(("mean", "std"), known, strict=True))
    return Network(architecture, mean, std, weights, description)


def _normalisation(config: ml_collections.ConfigDict, name: str, auto: tuple[float, ...]) -> tuple[float, ...]:
    """model.mean or model.std of values in [0, 1]: one number for all channels or one for each.

    Where `auto` gives a number per colour and the network takes gray alone, it is their mean.
    """
    value, channels = config.model[name], config.model.in_channels
    numbers = value
    if value == "auto":
        numbers = auto if len(auto) in (1, channels) else (sum(auto) / len(auto),)
    good = not isinstance(numbers, str) and len(numbers) in (1, channels) and all(math.isfinite(number) for number in numbers)
    config_lib.require(good, f"model.{name}", value, f"auto, one number, or {channels} for {channels} channels")
    return tuple(float(number) for number in numbers)


def starting_params(
    network: Network,
    config: ml_collections.ConfigDict,
    *,
    image_size: tuple[int, ...],
    patch_size: tuple[int, ...],
    kernel_size: tuple[int, ...],
    num_classes: int,
) -> tuple[Any, pretrained.Report]:
    """(parameters, what became of each tensor) from the weights, with a fresh classifier; InputError where they are damaged."""
    return pretrained.load(
        dataclasses.replace(network.weights, architecture=network.architecture),
        image_size=image_size,
        patch_size=patch_size,
        kernel_size=kernel_size,
        num_classes=num_classes,
        in_channels=config.model.in_channels,
        inflation=config.model.inflation,
        depth_positions=config.model.depth_positions,
        position_resize=config.model.position_resize,
    )
