"""From a description (variant, image, patch, classes) to a model and its fresh parameters."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp

from vitmed import config
from vitmed.models import attention as attentions
from vitmed.models import vit

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a ViT is made of, whatever its patches: its sizes, its prefix tokens, the form of its blocks and of its pooling.

    `mlp_width` is the width of an MLP's hidden layer (of each half with `swiglu`); `prefix_positions` says whether CLS and registers have
    learned positions; `final_norm` normalises tokens before the pooling, `fc_norm` what comes out of it. `pooling` is `cls`, `mean` (over
    patches), `map` (one query attends to the patches), `distilled` (CLS and DeiT's distillation token, the only register, each with a
    classifier) or `attention` (as `map`, without its MLP, and never a part of pretrained weights but of a fine-tuned network's head).
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    class_token: bool = True
    num_registers: int = 0
    prefix_positions: bool = True
    swiglu: bool = False
    layer_scale: bool = False
    pooling: str = "cls"
    final_norm: bool = True
    fc_norm: bool = False

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and registers."""
        return self.class_token + self.num_registers


def plain(width: int, depth: int, num_heads: int) -> Architecture:
    """The first ViT's form: CLS token, MLPs of four times the width."""
    return Architecture(width, depth, num_heads, mlp_width=4 * width)


VARIANTS = {
    "vit_micro": plain(48, 2, 3),  # for tests
    "vit_mini": plain(64, 4, 4),  # for the quickstart
    "vit_ti": plain(192, 12, 3),
    "vit_s": plain(384, 12, 6),
    "vit_b": plain(768, 12, 12),
    "vit_l": plain(1024, 24, 16),
    "vit_g": Architecture(1536, 40, 24, mlp_width=4096, swiglu=True, layer_scale=True),  # DINOv2's giant
}


def variant(name: str) -> Architecture:
    """The architecture that a variant's name stands for; InputError for a name that is none."""
    if name not in VARIANTS:
        raise config.InputError(f"model.variant={name}: unknown; choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def pooled(architecture: Architecture, pooling: str) -> Architecture:
    """The architecture with another pooling; `auto` leaves its own. InputError where it lacks what the pooling needs."""
    if pooling in ("auto", architecture.pooling):
        return architecture
    config.one_of("model.pooling", pooling, ("auto", *vit.POOLINGS))
    if pooling in ("map", "distilled"):
        raise config.InputError(
            f"model.pooling={pooling}: only weights that have it can be pooled so; these allow auto, cls, mean, attention"
        )
    if pooling == "cls" and not architecture.class_token:
        raise config.InputError("model.pooling=cls: the weights have no CLS token; take auto or mean")
    return dataclasses.replace(architecture, pooling=pooling)


def model(
    architecture: Architecture,
    *,
    patch_size: tuple[int, ...],
    num_classes: int | None,
    kernel_size: tuple[int, ...] | None = None,
    drop_path: float = 0.0,
    adapter_width: int = 0,
    adapter_scale: float = 0.0,
    dtype: str = "float32",
    attention: attentions.Attention = attentions.plain,
    scanned: bool = False,
    remat: str = "none",
    token_multiple: int = 1,
) -> vit.ViT:
    """The linen module; patch and kernel size have one entry per axis of the image, and no kernel size is the patch's."""
    return vit.ViT(
        **dataclasses.asdict(architecture),
        patch_size=patch_size,
        num_classes=num_classes,
        kernel_size=kernel_size,
        drop_path=drop_path,
        adapter_width=adapter_width,
        adapter_scale=adapter_scale,
        dtype=DTYPES[dtype],
        attention=attention,
        scanned=scanned,
        remat=remat,
        token_multiple=token_multiple,
    )


def initialise(module: vit.ViT, key: jax.Array, *, image_size: tuple[int, ...], in_channels: int) -> Any:
    """Fresh float32 parameters for images [*, *image_size, in_channels], drawn from `key` as timm draws them.

    The blocks' are drawn in a loop, which compiles in two thirds of the time that drawing them one after another takes.
    """
    key, blocks_key = jax.random.split(key)
    around = module.clone(depth=0).init(key, jnp.zeros((1, *image_size, in_channels), jnp.float32))["params"]
    block, token = module.block(parent=None), jnp.zeros((1, 1, module.width), module.dtype)
    stacked = jax.lax.map(lambda key: block.init(key, token)["params"], jax.random.split(blocks_key, module.depth))
    blocks = {name: jax.tree.map(operator.itemgetter(index), stacked) for index, name in enumerate(module.block_names)}
    return around | blocks
