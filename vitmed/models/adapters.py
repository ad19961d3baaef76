"""Ways to fine-tune a ViT: which of its parameters are trained, and the small ones that are added beside them for it.

A network's parameters are one tree. `split` parts it into the base, which stays as it was loaded, and what is trained, which with a frozen
base is a plugin: classifier, LoRA, adapters. `join` puts both together again. LoRA (arXiv 2106.09685) is kept as a tree of its own,
{"block_00": {"attn": {"q": {"a": [in, r], "b": [r, out]}}}}, and takes effect on the weights: what it makes of them is `merged`, another
ViT of the same form, which is trained, explained and given away like any other.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from vitmed import config, cost

TUNES = ("all", "head", "last", "lora", "adaptformer")
QKV = ("q", "k", "v")  # LoRA knows the three thirds of one product as layers
LAYERS = (*QKV, "proj", "fc1", "fc2")
# First names of what is never part of a base: classifier and pooling of its own, LoRA, and what pools slices of a volume.
ADDED = ("head", "head_dist", "head_pool", "lora", "views", "fusion", "decoder")
AFTER_BLOCKS = ("norm", "fc_norm", "attn_pool")
KEY = 0x10A  # beside the keys that a ViT's own parameters are drawn from


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank updates alpha / rank * a @ b of the layers that `targets` name: see `lora_layers`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What a @ b is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What of a network is trained: one of TUNES, with the last `blocks` for `last`; everything that is added always is.

    `adapter_width` is the bottleneck of AdaptFormer's branch beside each MLP, 0 for none, and `adapter_scale` what it is multiplied by.
    """

    name: str = "all"
    blocks: int = 0
    lora: Lora | None = None
    adapter_width: int = 0
    adapter_scale: float = 0.0

    @property
    def frozen(self) -> bool:
        """Whether there is a base that is not trained."""
        return self.name != "all"

    def trains(self, path: tuple[str, ...], depth: int) -> bool:
        """Whether the parameter of this path is trained, in a network of `depth` blocks."""
        path = path[1:] if path[0] == "encoder" else path
        if self.name == "all" or path[0] in ADDED or "adapter" in path:
            return True
        return self.name == "last" and (path[0] in AFTER_BLOCKS or path[0] in block_names(depth)[depth - self.blocks :])


ALL = Tuning()


def block_names(depth: int) -> list[str]:
    """The blocks' names among the parameters, in order."""
    return [f"block_{index:02d}" for index in range(depth)]


def split(params: Any, tuning: Tuning) -> tuple[Any, Any]:
    """(base, trained): the two parts of a tree, the base empty where everything is trained."""
    flat = traverse_util.flatten_dict(params)
    depth = len({name for path in flat for name in path if name.startswith("block_") and path[0] not in ("lora", "views")})
    trained = {path: leaf for path, leaf in flat.items() if tuning.trains(path, depth)}
    base = {path: leaf for path, leaf in flat.items() if path not in trained}
    return traverse_util.unflatten_dict(base), traverse_util.unflatten_dict(trained)


def join(base: Any, trained: Any) -> Any:
    """The tree that `split` parted; where both have a parameter the trained one counts."""
    if not isinstance(base, dict) or not isinstance(trained, dict):
        return trained
    return {
        name: join(base[name], trained[name]) if name in base and name in trained else (base | trained)[name] for name in base | trained
    }


# --- LoRA -----------------------------------------------------------------------------------------------------------------------


def lora_layers(depth: int, targets: Iterable[str]) -> list[tuple[str, ...]]:
    """Paths of the layers that `targets` name: `patch_embed`, or q, k, v (all: qkv), proj, fc1, fc2 of every block, or of one of them.

    A target stands for the layers whose path ends or begins with it, such as proj, block_11 or block_00/attn/q. InputError, listing what
    there is, for one that matches nothing.
    """
    layers = [("patch_embed",)]
    for name in block_names(depth):
        layers += [(name, "attn" if layer in (*QKV, "proj") else "mlp", layer) for layer in LAYERS]
    chosen = set()
    for target in targets:
        parts = tuple(target.split("/"))
        thirds = [(*parts[:-1], third) for third in QKV] if parts[-1] == "qkv" else [parts]
        found = {layer for layer in layers for third in thirds if third in (layer[: len(third)], layer[-len(third) :])}
        if not found:
            raise config.InputError(
                f"model.lora_targets: {target!r} is no layer of the network; there are patch_embed, qkv, {', '.join(LAYERS)}, and those of "
                f"one block, {block_names(depth)[0]}/attn/q to {block_names(depth)[-1]}/mlp/fc2"
            )
        chosen |= found
    return [layer for layer in layers if layer in chosen]


def lora_sizes(params: Any, layer: tuple[str, ...]) -> tuple[int, int]:
    """(inputs, outputs) of a layer, from the tree of its network."""
    *outer, name = layer
    inside = params
    for part in outer:
        inside = inside[part]
    if name in QKV:
        inputs, outputs = inside["qkv"]["kernel"].shape
        return inputs, outputs // len(QKV)
    return inside[name]["kernel"].shape


def fresh_lora(key: jax.Array, params: Any, lora: Lora) -> Any:
    """LoRA for a ViT's parameters (or their shapes): `a` uniform within 1 / sqrt(inputs), `b` zero, so that at first nothing changes."""
    depth = sum(name.startswith("block_") for name in params)
    tree = {}
    for index, layer in enumerate(lora_layers(depth, lora.targets)):
        inputs, outputs = lora_sizes(params, layer)
        bound = inputs**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, index), (inputs, lora.rank), jnp.float32, -bound, bound)
        tree |= {(*layer, "a"): a, (*layer, "b"): jnp.zeros((lora.rank, outputs), jnp.float32)}
    return traverse_util.unflatten_dict(tree)


def merged(params: Any, tree: Any, lora: Lora) -> Any:
    """A ViT's parameters with LoRA's updates in their kernels; all other arrays are the same ones.

    On the weights and not on the tokens: it costs r products per weight and no pass over the tokens, and serves kernels of every form,
    convolutions and scanned blocks included. The gradient of a target's whole kernel is computed on the way; of other layers none is.
    """
    changed = dict(traverse_util.flatten_dict(params))
    updates = traverse_util.flatten_dict(tree)
    thirds: dict[tuple[str, ...], dict[str, jax.Array]] = {}
    for *layer, part in updates:
        if part == "a":
            update = lora.scale * (updates[*layer, "a"] @ updates[*layer, "b"])
            if layer[-1] in QKV:
                thirds.setdefault((*layer[:-1], "qkv", "kernel"), {})[layer[-1]] = update
            else:
                changed[*layer, "kernel"] += update
    for path, found in thirds.items():
        nothing = jnp.zeros_like(next(iter(found.values())))
        changed[path] += jnp.concatenate([found.get(third, nothing) for third in QKV], axis=1)
    return traverse_util.unflatten_dict(changed)


def effective(params: Any, lora: Lora | None) -> Any:
    """What a ViT computes with, of a tree that may hold its LoRA as `lora`."""
    if lora is None:
        return params
    return merged({name: value for name, value in params.items() if name != "lora"}, params["lora"], lora)


def applying(apply: Callable[..., Any], lora: Lora | None) -> Callable[..., Any]:
    """A ViT's `apply` for trees that hold its LoRA."""
    if lora is None:
        return apply
    return lambda variables, *inputs, **how: apply({"params": effective(variables["params"], lora)}, *inputs, **how)


# --- costs ----------------------------------------------------------------------------------------------------------------------


def num_trained(tuning: Tuning, *, width: int, depth: int, mlp_width: int, swiglu: bool, embedded: int) -> int:
    """Parameters that are trained on a frozen base besides the head; `embedded` are the numbers of a patch."""
    if tuning.name == "last":
        return tuning.blocks * cost.block_params(width, mlp_width, swiglu=swiglu) + 2 * width
    if tuning.lora is not None:
        sizes = {"fc1": width + mlp_width * (1 + swiglu), "fc2": mlp_width + width, "patch_embed": embedded + width}
        return tuning.lora.rank * sum(sizes.get(layer[-1], 2 * width) for layer in lora_layers(depth, tuning.lora.targets))
    return depth * (2 * width * tuning.adapter_width + tuning.adapter_width + width) if tuning.adapter_width else 0


def passes(tuning: Tuning, depth: int) -> float:
    """Forward passes that a training step costs: three where all is trained, two thirds of which are the backward pass.

    Of a frozen layer the backward pass computes the gradient of its input alone, and nothing of layers below the first that is trained;
    LoRA on the weights computes in a target the gradient of its kernel.
    """
    if tuning.lora is not None:
        return 2 + len(lora_layers(depth, tuning.lora.targets)) / (1 + depth * len(LAYERS))
    return {"all": 3.0, "head": 1.0, "last": 1 + 2 * tuning.blocks / depth, "adaptformer": 2.0}[tuning.name]


def differentiated(tuning: Tuning, depth: int) -> int:
    """Blocks that a backward pass goes through."""
    return {"head": 0, "last": tuning.blocks}.get(tuning.name, depth)
