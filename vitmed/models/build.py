"""From a description (variant, image, patch, classes) to a model and its fresh parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vitmed import config
from vitmed.models import attention as attentions
from vitmed.models import vit

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Variant:
    """The sizes that a variant's name stands for."""

    width: int
    depth: int
    num_heads: int

    @property
    def mlp_width(self) -> int:
        """Width of the hidden layer of every MLP: four times the model's, in all variants."""
        return 4 * self.width


VARIANTS = {
    "vit_micro": Variant(width=48, depth=2, num_heads=3),  # for tests
    "vit_mini": Variant(width=64, depth=4, num_heads=4),  # for the quickstart
    "vit_ti": Variant(width=192, depth=12, num_heads=3),
    "vit_s": Variant(width=384, depth=12, num_heads=6),
    "vit_b": Variant(width=768, depth=12, num_heads=12),
    "vit_l": Variant(width=1024, depth=24, num_heads=16),
}


def variant(name: str) -> Variant:
    """The sizes of a variant; InputError for a name that is none."""
    if name not in VARIANTS:
        raise config.InputError(f"model.variant={name}: unknown; choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def model(
    sizes: Variant,
    *,
    patch_size: tuple[int, ...],
    num_classes: int | None,
    pooling: str = "cls",
    drop_path: float = 0.0,
    dtype: str = "float32",
    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = attentions.plain,
) -> vit.ViT:
    """The linen module; the patch size has one entry per axis of the image."""
    return vit.ViT(
        patch_size=patch_size,
        **dataclasses.asdict(sizes),
        mlp_width=sizes.mlp_width,
        num_classes=num_classes,
        pooling=pooling,
        drop_path=drop_path,
        dtype=DTYPES[dtype],
        attention=attention,
    )


def initialise(module: vit.ViT, key: jax.Array, *, image_size: tuple[int, ...], in_channels: int) -> Any:
    """Fresh float32 parameters for images [*, *image_size, in_channels], drawn from `key` as timm draws them."""
    return module.init(key, jnp.zeros((1, *image_size, in_channels), jnp.float32))["params"]
