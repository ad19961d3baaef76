"""What a file of weights holds, told from names and shapes alone: sizes, prefix tokens, form of the blocks, pooling, preprocessing.

Shapes: `*P` pixels of a patch, `*G` grid of patches, `C` channels, `D` width, `N` tokens.
"""

import dataclasses
import hashlib
import math
import pathlib
import re

import numpy as np

from vitmed import config
from vitmed.models import build, exported, hub, names, tensors

KERNEL, POSITIONS = "patch_embed.proj.weight", "pos_embed"


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a file holds, by its names and shapes.

    `kernel_size` are the pixels that a token is computed from, which are those of a patch save in some runs of ours, whose `grid` tells.
    `num_positions` counts what stands before the patches in its position table.
    """

    path: pathlib.Path
    architecture: build.Architecture
    kernel_size: tuple[int, ...]
    grid: tuple[int, ...]
    num_positions: int
    in_channels: int
    num_classes: int | None


def preprocessing(path_or_name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the pixel values in [0, 1] that the weights were trained with, one entry or one per channel."""
    path = exported.of_run(hub.find(path_or_name))
    with tensors.opened(path) as file:
        own = exported.facts(file.metadata, path)
    return (tuple(own["mean"]), tuple(own["std"])) if own else hub.preprocessing(path_or_name)


def digest(weights: "Weights") -> str:
    """SHA-256 of all tensors but the classifier's, by timm's names, as float32: the same for the same network in any form of file."""
    sha = hashlib.sha256()
    with tensors.opened(weights.path) as file:
        for name, tensor in sorted(names.to_timm(file.tensors).items()):
            if not name.startswith("head"):
                sha.update(f"{name} {tensor.shape}".encode())
                sha.update(np.ascontiguousarray(tensor.read()).data)
    return sha.hexdigest()


def describe(path_or_name: str, *, num_heads: int | None = None, expected: build.Architecture | None = None) -> Weights:
    """What the weights are, without reading them; InputError where they are no ViT's, or of a form that is not known here.

    `expected` is an architecture whose width, depth and heads they must have.
    """
    path = exported.of_run(hub.find(path_or_name))
    with tensors.opened(path) as file:
        own = exported.facts(file.metadata, path)
        found = names.to_timm(file.tensors)
        known_heads = own["num_heads"] if own else names.num_heads(file.tensors)
    for name in (KERNEL, POSITIONS, "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"):
        if name not in found:
            some = ", ".join(list(found)[:3]) or "nothing"
            raise config.InputError(f"{path}: no Vision Transformer that is known here: it lacks {name} and holds {some}, ...")
    kernel = found[KERNEL].shape
    if len(kernel) not in (4, 5):
        raise config.InputError(f"{path}: {KERNEL} has shape {list(kernel)}; expected [width, channels, height, width] or one axis more")
    if 0 in kernel:
        raise config.InputError(f"{path}: {KERNEL} has shape {list(kernel)}, which holds nothing; take an undamaged file")
    width, in_channels, *kernel_size = kernel
    if expected is not None:
        _check_sizes(path, width, _depth(found), expected)
        num_heads = expected.num_heads
    architecture = _architecture(path, found, _num_heads(path, width, known=known_heads, given=num_heads))
    if own and own["pooling"] in ("cls", "mean", "attention"):  # all of these have the same tensors but for the pool of a head
        architecture = dataclasses.replace(architecture, pooling=own["pooling"])
    known_grid = exported.grid(own, tuple(kernel_size), path) if own else None
    grid, num_positions = _grid(path, found[POSITIONS].shape, architecture, known_grid, len(kernel_size))
    if architecture.num_prefix_tokens:
        architecture = dataclasses.replace(architecture, prefix_positions=num_positions == architecture.num_prefix_tokens)
    head = found.get("head.weight")
    has_head = head is not None and len(head.shape) == 2 and head.shape[1] == width and head.shape[0] > 0
    return Weights(
        path=path,
        architecture=architecture,
        kernel_size=tuple(kernel_size),
        grid=grid,
        num_positions=num_positions,
        in_channels=in_channels,
        num_classes=head.shape[0] if has_head else None,
    )


def _num_heads(path: pathlib.Path, width: int, *, known: int | None, given: int | None) -> int:
    if known is not None and given is not None and known != given:
        raise config.InputError(f"{path}: its attention has {known} heads, not the {given} that were asked for; take {known}")
    heads = known or given or (width // 64 if width % 64 == 0 else 0)
    if heads < 1 or width % heads:
        came = f"num_heads={given}" if given else "its tensors do not tell how many heads it has"
        raise config.InputError(f"{path}: {came}, and its width is {width}; give num_heads, a divisor of the width")
    return heads


def _depth(found: names.Tensors) -> int:
    return 1 + max(int(match[1]) for name in found if (match := re.match(r"blocks\.(\d+)\.", name)))


def _check_sizes(path: pathlib.Path, width: int, depth: int, expected: build.Architecture) -> None:
    if (width, depth) != (expected.width, expected.depth):
        same = [name for name, one in build.VARIANTS.items() if (one.width, one.depth) == (width, depth)]
        mend = f"take variant={same[0]}" if same else "no variant has these"
        asked = f"the variant asked for has width {expected.width} and depth {expected.depth}"
        raise config.InputError(f"{path}: the weights are of width {width} and depth {depth}, {asked}; {mend}, or other weights")


def _architecture(path: pathlib.Path, found: names.Tensors, num_heads: int) -> build.Architecture:
    """The form, from which tensors there are and their sizes."""
    hidden_in, hidden_out = found["blocks.0.mlp.fc1.weight"].shape, found["blocks.0.mlp.fc2.weight"].shape
    if len(hidden_in) != 2 or len(hidden_out) != 2 or hidden_in[0] not in (hidden_out[1], 2 * hidden_out[1]):
        raise config.InputError(f"{path}: the MLP's layers have shapes {list(hidden_in)} and {list(hidden_out)}, which do not fit together")
    distilled = "dist_token" in found
    registers = found["reg_token"].shape[-2] if "reg_token" in found and len(found["reg_token"].shape) > 1 else 0
    if distilled and (registers or "cls_token" not in found):
        raise config.InputError(f"{path}: a distillation token goes with a CLS token and no registers; this form is not known here")
    class_token, fc_norm = "cls_token" in found, "fc_norm.weight" in found
    pooling = "map" if "attn_pool.latent" in found else "distilled" if distilled else "mean" if fc_norm or not class_token else "cls"
    return build.Architecture(
        width=found[KERNEL].shape[0],
        depth=_depth(found),
        num_heads=num_heads,
        mlp_width=hidden_out[1],
        class_token=class_token,
        num_registers=1 if distilled else registers,
        swiglu=hidden_in[0] != hidden_out[1],
        layer_scale="blocks.0.ls1.gamma" in found,
        pooling=pooling,
        final_norm="norm.weight" in found,
        fc_norm=fc_norm,
    )


def _grid(
    path: pathlib.Path,
    table: tuple[int, ...],
    architecture: build.Architecture,
    known: tuple[int, ...] | None,
    rank: int,
) -> tuple[tuple[int, ...], int]:
    """The grid of a position table [1, N, D], and how many positions stand before it: one for each prefix token, for CLS alone, or none.

    Where it is not `known` it has equal sides.
    """
    if len(table) != 3 or table[0] != 1 or table[2] != architecture.width:
        raise config.InputError(f"{path}: {POSITIONS} has shape {list(table)}; expected [1, tokens, {architecture.width}]")
    prefix = architecture.num_prefix_tokens
    registers = architecture.num_registers and architecture.pooling != "distilled"
    for before in (0, 1, prefix) if registers else (prefix, 0):
        count = table[1] - before
        equal = (round(max(count, 0) ** (1 / rank)),) * rank
        grid = known or equal
        if count > 0 and math.prod(grid) == count:
            return grid, before
    raise config.InputError(f"{path}: {POSITIONS} has {table[1]} positions, which with {prefix} prefix tokens make no grid of equal sides")
