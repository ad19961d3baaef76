"""Run folders with made-up predictions, as a finished run leaves them: what tests of studies read."""

import pathlib

import numpy as np

from vitmed import config as config_lib
from vitmed import cost, metrics
from vitmed.runs import folder

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def labels_of(task, *, num_images=60, num_classes=3, seed=0):
    """Labels [N, L] in which every class occurs."""
    rng = np.random.default_rng(seed)
    if task == "multi-label":
        return (rng.random((num_images, num_classes)) < 0.3).astype(np.int64)
    return np.resize(np.arange(2 if task == "binary" else num_classes), num_images)[rng.permutation(num_images), None]


def probabilities_of(task, labels, *, num_seeds, skill, num_classes=3, seed=0):
    """float32 [R, N, K] that lean towards the labels: not at all at skill 0, nearly always at 4."""
    rng = np.random.default_rng(seed)
    if task == "multi-label":
        logits = rng.normal(size=(num_seeds, *labels.shape)) + skill * (labels - 0.5)
        return (1 / (1 + np.exp(-logits))).astype(np.float32)
    logits = rng.normal(size=(num_seeds, len(labels), 2 if task == "binary" else num_classes))
    logits += skill * (labels == np.arange(logits.shape[-1]))
    powers = np.exp(logits)
    return (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)


def write(
    path, *, dataset="breastmnist", task="binary", patch="7", rank=2, seeds=(0, 1, 2), failed=(), skill=1.0, labels=None, epochs=4, **fields
):
    """Write a finished run into `path`; `fields` are overrides of its config with __ for the dot. Returns labels and probabilities."""
    config = config_lib.load(f"{CONFIGS}/vit{rank}d.py:dataset={dataset},patch={patch},pretrained=")
    config.seeds = seeds
    for name, value in fields.items():
        config_lib.override(config, name.replace("__", "."), str(value))
    labels = labels_of(task) if labels is None else labels
    probabilities = probabilities_of(task, labels, num_seeds=len(seeds), skill=skill, seed=sum(map(ord, f"{dataset}{patch}{fields}")))
    for index, seed in enumerate(seeds):
        if seed in failed:
            probabilities[index] = np.nan
    run = folder.RunFolder(path)
    run.create(config.to_dict())
    for split in ("val", "test"):
        run.write_predictions(split, labels=labels, probabilities=probabilities, seeds=seeds)
    measured = [metrics.compute(task, labels, one).values for one in probabilities]
    scored = {name: [one[name] for one in measured] for name in metrics.metric_names(task)}
    scored["loss"] = [None if seed in failed else 1.0 / (1.0 + skill) + 0.01 * seed for seed in seeds]
    losses = [[1 / epoch] * len(seeds) for epoch in range(1, epochs + 1)]
    run.write_metrics([{"epoch": epoch, "train_loss": each, "val": {"loss": each}} for epoch, each in enumerate(losses, start=1)])
    patch_size = config_lib.per_axis("patch", config.model.patch_size, rank)
    image_size = (28,) * rank
    num_tokens = cost.num_tokens(image_size, patch_size)
    if views := [view for view in config.model.views.split(",") if view]:
        num_tokens = 28 * len(views) * cost.num_tokens(image_size[1:], patch_size[1:])
    run.write_result(
        {
            "schema_version": 1,
            "dataset": dataset,
            "data_md5": None,
            "task": task,
            "image_size": image_size,
            "patch_size": patch_size,
            "variant": "vit_ti",
            "pretrained": None,
            "normalisation": {"mean": [0.5], "std": [0.5]},
            "seeds": list(seeds),
            "failed_seeds": list(failed),
            "num_tokens": num_tokens,
            "num_params": 1000,
            "num_trainable_params": 1000,
            "gmacs_forward": 0.01 * num_tokens,
            "test": scored,
            "val": scored,
            "best_epoch": [epochs] * len(seeds),
            "train_seconds": 10.0,
            "compile_seconds": 2.0,
            "train_images_per_second": 100.0,
            "test_milliseconds_per_image": 0.5,
            "peak_memory_bytes": 2**30,
            "device": "cpu",
            "versions": {"jax": "0.10.2"},
            "config_digest": folder.digest(config.to_dict()),
        }
    )
    return labels, probabilities
