"""Pretrained weights at any patch size, in 2D and 3D: from a file's tensors to a model and its parameters.

`load` reads the tensors that `weights.describe` has found, resizes what depends on the patch, and says what became of each;
`from_pretrained` is both. Shapes: `*P` pixels of a patch, `*G` grid of patches, `C` channels, `D` width.
"""

import collections
import dataclasses
import math
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vitmed import config, cost
from vitmed.models import build, exported, names, resample, tensors, vit
from vitmed.models import weights as weights_lib

# A tensor of these parts that the model has no place for changes what the network computes; others (a decoder, a mask token) do not.
TRUNK = ("patch_embed", "blocks", "norm_pre")
TOKENS = ("cls_token", "reg_token", "dist_token", "attn_pool.latent", "head_pool.latent")
HEADS = ("head", "head_dist")
FRESH = "head_pool"  # a part that only a fine-tuned network has: drawn where it is trained


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a file's tensors, by timm's names; `resized` and `inflated` are among the `loaded`."""

    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    inflated: tuple[str, ...]
    fresh: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what in ("resized", "inflated", "fresh", "ignored"):
            if listed := getattr(self, what):
                parts.append(f"{what}: {', '.join(listed)}")
        return "; ".join(parts)


def from_pretrained(
    path_or_name: str,
    *,
    image_size: tuple[int, ...],
    patch_size: tuple[int, ...],
    num_classes: int | None = None,
    in_channels: int = 3,
    num_heads: int | None = None,
    kernel_size: tuple[int, ...] | None = None,
    pooling: str = "auto",
    inflation: str = "average",
    depth_positions: str = "copy",
    position_resize: str = "bicubic",
) -> tuple[vit.ViT, Any]:
    """A model and its float32 parameters from a file, a run's folder or a name such as timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k.

    The length of `image_size` and `patch_size` is the rank. `num_classes=None` keeps the file's classifier, or gives features [B, D]
    where it has none; a number gives a fresh one of zeros, 0 features. Call `model.apply({"params": params}, images)` with images
    [B, *S, C] float32 that are normalised by `preprocessing(path_or_name)`. `in_channels=1` on RGB weights equals a normalised gray image
    given to all three channels; where mean and std differ by colour, normalise it by their averages. `num_heads` is needed where the file
    does not tell and width / 64 is wrong. `kernel_size` are the pixels that a token is computed from, the patch's unless given.
    `inflation` and `depth_positions` say how 2D weights come to depth, `position_resize` how positions come to another grid: see
    `resample`. What was loaded, resized, fresh and ignored is said on stderr. InputError for whatever does not fit.
    """
    config.require(in_channels >= 1, "in_channels", in_channels, "at least 1")
    config.require(num_classes is None or num_classes >= 0, "num_classes", num_classes, "None, 0 or more")
    for name, sizes in (("image_size", image_size), ("patch_size", patch_size), ("kernel_size", kernel_size or patch_size)):
        config.require(isinstance(sizes, tuple | list), name, sizes, "a tuple with one entry per axis")
    weights = weights_lib.describe(path_or_name, num_heads=num_heads)
    weights = dataclasses.replace(weights, architecture=build.pooled(weights.architecture, pooling))
    params, report = load(
        weights,
        image_size=tuple(image_size),
        patch_size=tuple(patch_size),
        num_classes=num_classes,
        in_channels=in_channels,
        kernel_size=kernel_size and tuple(kernel_size),
        inflation=inflation,
        depth_positions=depth_positions,
        position_resize=position_resize,
    )
    print(f"vitmed: {weights.path.name}: {report}", file=sys.stderr)
    classes = weights.num_classes if num_classes is None else num_classes or None
    sizes = {"patch_size": tuple(patch_size), "kernel_size": kernel_size and tuple(kernel_size)}
    model = build.model(weights.architecture, **sizes, num_classes=classes)
    if weights.architecture.pooling == "attention":  # whose pool is fresh where the file has none
        fresh = build.initialise(model, jax.random.key(0), image_size=tuple(image_size), in_channels=in_channels)
        params = {"head_pool": fresh["head_pool"]} | params
    return model, params


def load(
    weights: weights_lib.Weights,
    *,
    image_size: tuple[int, ...],
    patch_size: tuple[int, ...],
    num_classes: int | None,
    in_channels: int,
    kernel_size: tuple[int, ...] | None = None,
    inflation: str = "average",
    depth_positions: str = "copy",
    position_resize: str = "bicubic",
) -> tuple[Any, Report]:
    """Read the parameters for a model of any patch size and rank (2 or 3), and say what became of each tensor.

    Of a pooling `attention` that the file does not have there are none: whoever trains draws them.
    Tensors are read, checked and converted one by one, so that little more than the parameters is held. InputError where anything but
    the classifier is missing, has another shape, or is not finite.
    """
    grid = cost.grid(image_size, patch_size, kernel_size)
    config.one_of("inflation", inflation, resample.INFLATIONS)
    config.one_of("depth_positions", depth_positions, resample.DEPTH_POSITIONS)
    config.one_of("position_resize", position_resize, resample.POSITION_RESIZES)
    whole = resample.uncut_grid(image_size, patch_size, kernel_size) if position_resize == "cut" else grid
    if len(image_size) not in (2, 3):
        raise config.InputError(f"image_size {image_size} has {len(image_size)} axes; weights are for 2 or 3")
    keep = num_classes is None
    classes = weights.num_classes if keep else num_classes or None
    model = build.model(weights.architecture, patch_size=patch_size, kernel_size=kernel_size, num_classes=classes)
    init = jax.eval_shape(lambda: build.initialise(model, jax.random.key(0), image_size=image_size, in_channels=in_channels))
    params, used, fresh = {}, [], []
    with tensors.opened(weights.path) as file, np.errstate(over="ignore"):  # what grows beyond float32 is refused below
        found = names.to_timm(file.tensors)
        for path, leaf in traverse_util.flatten_dict(init).items():
            name = exported.timm_name(path, distilled="dist_token" in found)
            if not keep and path[0] in HEADS:
                params[path] = jnp.zeros(leaf.shape, jnp.float32)
                fresh.append(name)
                continue
            if name not in found and path[0] == FRESH:
                fresh.append(name)
                continue
            values = _read(weights.path, found, name)
            if name == weights_lib.KERNEL:
                old = values.transpose(*range(2, values.ndim), 1, 0)
                values = resample.kernel(old, patch_size=kernel_size or patch_size, in_channels=in_channels, inflation=inflation)
            elif name == weights_lib.POSITIONS:
                how = {"depth_positions": depth_positions, "position_resize": position_resize}
                values = _positions(weights, values[0], grid=whole, num_patches=math.prod(grid), **how)
            else:
                values = _turned(weights, values, name, leaf.shape)
                if name == "cls_token" and 0 < weights.num_positions < weights.architecture.num_prefix_tokens:
                    # DINOv2 with registers gives CLS a position and the registers none: it becomes a part of the token.
                    values = values + _read(weights.path, found, weights_lib.POSITIONS)[0, :1]
            if values.shape != leaf.shape:
                raise config.InputError(f"{weights.path}: {name} has shape {list(values.shape)}; expected {list(leaf.shape)}")
            if name in (weights_lib.KERNEL, weights_lib.POSITIONS) and not np.isfinite(values).all():
                raise config.InputError(f"{weights.path}: {name} is too large to be resized in float32; take an undamaged file")
            params[path] = jnp.asarray(values)
            used.append(name)
    ignored = _ignored(weights.path, found, used)
    resized, inflated = _changes(
        weights,
        kernel_size=kernel_size or patch_size,
        grid=whole,
        inflation=inflation,
        depth_positions=depth_positions,
        positions="" if position_resize == "bicubic" else f" linearly, the first {math.prod(grid)} of {math.prod(whole)} taken",
    )
    report = Report(tuple(used), resized, inflated, tuple(fresh), ignored)
    return traverse_util.unflatten_dict(params), report


def _read(path: pathlib.Path, found: names.Tensors, name: str) -> np.ndarray:
    if name not in found:
        raise config.InputError(f"{path}: lacks {name}; only the classifier may be missing")
    values = found[name].read()
    if not np.isfinite(values).all():
        raise config.InputError(f"{path}: {name} holds NaN or infinite values; take an undamaged file")
    return values


def _turned(weights: weights_lib.Weights, values: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor in linen's layout: linear layers [in, out], tokens without the batch axis."""
    if name in TOKENS and values.ndim == len(shape) + 1 and len(values) == 1:
        return values[0]
    if values.ndim != len(shape):
        raise config.InputError(f"{weights.path}: {name} has shape {list(values.shape)}; expected {len(shape)} axes")
    return values.T if values.ndim == 2 and name.endswith(".weight") else values


def _positions(
    weights: weights_lib.Weights, table: np.ndarray, *, grid: tuple[int, ...], num_patches: int, depth_positions: str, position_resize: str
) -> np.ndarray:
    """A file's table [prefix + N, D] -> the model's, the patches' part resized to a grid of which the model takes the first rows."""
    prefix, patches = np.split(table, [weights.num_positions])
    patches = patches.reshape(*weights.grid, -1)
    patches = resample.positions(patches, grid=grid, depth_positions=depth_positions, position_resize=position_resize)[:num_patches]
    placed = weights.architecture.num_prefix_tokens and weights.architecture.prefix_positions
    return np.concatenate([prefix, patches]) if placed else patches


def _changes(
    weights: weights_lib.Weights,
    *,
    kernel_size: tuple[int, ...],
    grid: tuple[int, ...],
    inflation: str,
    depth_positions: str,
    positions: str,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What of the patch embedding and the positions was (resized, inflated), in words; `positions`: how, where it is not as usual."""
    rank, old_rank = len(kernel_size), len(weights.kernel_size)
    common = min(rank, old_rank)
    resized = []
    for what, old, new, how in (
        ("patch_embed", weights.kernel_size, kernel_size, ""),
        (weights_lib.POSITIONS, weights.grid, grid, positions),
    ):
        if old[-common:] != new[-common:] or rank < old_rank or how:
            resized.append(f"{what} {'x'.join(map(str, old))} -> {'x'.join(map(str, new[-common:]))}{how}")
    inflated = (f"patch_embed ({inflation})", f"{weights_lib.POSITIONS} ({depth_positions})") if rank > old_rank else ()
    return tuple(resized), inflated


def _ignored(path: pathlib.Path, found: names.Tensors, used: list[str]) -> tuple[str, ...]:
    """What the file has besides, counted by its first name; InputError where it belongs to the network itself."""
    left = [name for name in found if name not in set(used)]
    strange = [name for name in left if name.split(".")[0] in TRUNK]
    if strange:
        raise config.InputError(f"{path}: {strange[0]} has no place in the ViTs that are known here; this is another architecture")
    counts = collections.Counter(re.split(r"[./]", name)[0] for name in left)
    return tuple(f"{name} ({count})" if count > 1 else name for name, count in counts.items())
