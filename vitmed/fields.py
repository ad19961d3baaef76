"""The fields of a config: which there are, of what kind, and what runs mean that were written before some of them existed."""

from collections.abc import Mapping
from typing import Any

from vitmed import config as config_lib

# Fields that configs did not always have, each with the value that does what was done before there was one: what older runs are read with.
ADDED = {
    "data.cache": "",
    "data.classes": "",
    "data.fold": 0,
    "data.folds": 0,
    "data.invert": False,
    "data.resize": 0,
    "data.shares": [0.7, 0.1, 0.2],
    "data.spacing": [0.0],
    "data.split_seed": 0,
    "data.task": "auto",
    "data.window": "auto",
    "model.adapter_scale": 0.1,
    "model.adapter_width": 64,
    "model.attention": "auto",
    "model.kernel_size": [0],
    "model.lora_alpha": 16.0,
    "model.lora_rank": 8,
    "model.lora_targets": "qkv,proj",
    "model.patch_sizes": "",
    "model.position_resize": "bicubic",
    "model.views": "",
    "tracking.name": "",
    "tracking.project": "vitmed",
    "tracking.writers": "",
    "train.class_weights": "none",
    "train.ema_decay": 0.0,
    "train.focal_gamma": 0.0,
    "train.label_smoothing": 0.0,
    "train.layer_decay": 1.0,
    "train.mask_weight": 0.0,
    "train.micro_batch_size": 0,
    "train.mixup": 0.0,
    "train.patience": 0,
    "train.remat": "auto",
    "train.sampler": "shuffled",
    "train.schedule": "step",
    "train.tune": "all",
    "train.warmup_epochs": 0.0,
}


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config read from JSON with the fields that were added after it was written; of sections that it lacks only tracking, which was."""
    complete = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    complete.setdefault("tracking", {})
    for name, value in ADDED.items():
        section, _, field = name.partition(".")
        if isinstance(complete.get(section), dict):
            complete[section].setdefault(field, value)
    data = complete.get("data")
    if isinstance(data, dict) and isinstance(data.get("size"), int) and not isinstance(data["size"], bool):  # one for all axes, once
        data["size"] = [data["size"]]
    return complete


def conform(config: Mapping[str, Any], where: str) -> None:
    """InputError unless a nested config has just the fields of configs/vit2d.py, each of its kind: no CLI meets another one later."""
    reference = config_lib.flatten(config_lib.load(str(config_lib.shipped_file("vit2d.py"))).to_dict())
    fields = config_lib.flatten(config)
    for word, names in (("lacks", reference.keys() - fields.keys()), ("has the unknown", fields.keys() - reference.keys())):
        if names:
            raise config_lib.InputError(f"{where} {word} {', '.join(sorted(names))}; take the fields of configs/vit2d.py of this version")
    for name, like in reference.items():
        value = fields[name]
        kinds = (str, tuple) if like in config_lib.WORDS else (int, float) if isinstance(like, float) else (type(like),)
        good = isinstance(value, kinds) and isinstance(value, bool) == isinstance(like, bool)
        if isinstance(value, tuple):
            number = int if isinstance(like, tuple) and isinstance(like[0], int) else (int, float)
            good = good and bool(value) and all(isinstance(entry, number) and not isinstance(entry, bool) for entry in value)
        if not good:
            raise config_lib.InputError(f"{where}: {name} is {value!r}; must be of the kind of {like!r}")
