"""The weights that a finished run gives out: a .safetensors file for each seed, under timm's names.

`pack` makes the bytes of one, `of_run` finds the best one of a run's folder, `facts` reads what only a run of ours says of itself.
A 3D kernel has one axis more than timm's, [D, C, d, h, w]; otherwise a 2D file is one that timm itself can load.
"""

import json
import math
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy
from flax import traverse_util

from vitmed import config, cost
from vitmed.models import build, tensors, vit

FOLDER, RESULT, KEY = "weights", "result.json", "vitmed"
# What a run says in its metadata, each like this.
FACTS = {"image_size": [1], "num_heads": 1, "pooling": "", "mean": [0.5], "std": [0.5], "seed": 1, "val_loss": 0.5}
STRIDE = "patch_size"  # and where its kernel has not the patch's size: at how many pixels it is put


def timm_name(path: tuple[str, ...], *, distilled: bool) -> str:
    """timm's name of a parameter of ours; a distillation token is a register here."""
    first, *rest = path
    if first.startswith("block_"):
        rest = [str(int(first.removeprefix("block_"))), *rest]
        first = "blocks"
    elif first == "patch_embed":
        rest = ["proj", *rest]
    elif first == "registers":
        first = "dist_token" if distilled else "reg_token"
    name = ".".join([first, *rest])
    return name.removesuffix("kernel").removesuffix("scale") + ("weight" if path[-1] in ("kernel", "scale") else "")


def pack(
    params: Any,
    *,
    architecture: build.Architecture,
    image_size: tuple[int, ...],
    patch_size: tuple[int, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
    val_loss: float,
    kernel_size: tuple[int, ...] | None = None,
) -> bytes:
    """The .safetensors file of one seed's parameters, with what its tensors do not tell in the metadata."""
    kernel_size = kernel_size or patch_size
    arrays = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        values = np.asarray(leaf)
        if path == ("patch_embed", "kernel"):
            channels = values.shape[0] // math.prod(kernel_size)
            values = values.reshape(*kernel_size, channels, -1)
            values = values.transpose(values.ndim - 1, values.ndim - 2, *range(values.ndim - 2))
        elif path[-1] == "kernel":
            values = values.T
        elif values.ndim == 2:
            values = values[None]  # tokens and positions
        arrays[timm_name(path, distilled=architecture.pooling == "distilled")] = np.ascontiguousarray(values)
    facts = {"image_size": image_size, "num_heads": architecture.num_heads, "pooling": architecture.pooling}
    facts |= {"mean": [float(x) for x in mean], "std": [float(x) for x in std], "seed": int(seed), "val_loss": float(val_loss)}
    facts |= {STRIDE: patch_size} if kernel_size != patch_size else {}
    # One entry: the library writes several in an order of its own, and the same run would give other bytes.
    return safetensors.numpy.save(arrays, {KEY: json.dumps(facts)})


def facts(metadata: dict[str, str], path: pathlib.Path) -> dict[str, Any] | None:
    """What a run of ours says of its weights; None for files of others, InputError where it is broken."""
    if KEY not in metadata:
        return None
    try:
        said = json.loads(metadata[KEY])
        good = all(_alike(said[name], like) for name, like in FACTS.items()) and _alike(said.get(STRIDE, [1]), [1])
        numbers = (*said["mean"], *said["std"], said["val_loss"])
        good = good and all(map(math.isfinite, numbers)) and min(said["std"]) > 0 and said["pooling"] in vit.POOLINGS
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise config.InputError(f"{path}: its metadata are broken; take the file anew from the run's folder")
    return said


def grid(facts: dict[str, Any], kernel_size: tuple[int, ...], path: pathlib.Path) -> tuple[int, ...]:
    """The grid of a run's tokens, from what it says of itself; InputError where its kernel cannot lie so."""
    try:
        return cost.grid(tuple(facts["image_size"]), tuple(facts.get(STRIDE, kernel_size)), kernel_size)
    except config.InputError as error:
        raise config.InputError(f"{path}: its metadata are broken ({error}); take the file anew from the run's folder") from error


def _alike(value: Any, like: Any) -> bool:
    if isinstance(like, list):
        return isinstance(value, list) and bool(value) and all(_alike(entry, like[0]) for entry in value)
    return type(value) is type(like)


def of_run(path: pathlib.Path) -> pathlib.Path:
    """For a run's folder the weights of its seed of the lowest validation loss, else the path itself; InputError where there are none."""
    if not path.is_dir():
        return path
    finished, losses = (path / RESULT).is_file(), {}
    for file in sorted((path / FOLDER).glob("*.safetensors")):
        with tensors.opened(file) as opened:
            own = facts(opened.metadata, file)
        if own is not None:
            losses[file] = own["val_loss"]
    if not finished:
        raise config.InputError(
            f"{path}: no folder of a finished run (it holds no {RESULT}); finish it with vitmed.main, or choose another"
        )
    if not losses:
        why = "all its seeds failed, or it is a plugin of a frozen base, which vitmed.export joins to it"
        raise config.InputError(f"{path}: gives out no weights (it holds no {FOLDER}/*.safetensors): {why}; choose another")
    return min(losses, key=lambda file: losses[file])
