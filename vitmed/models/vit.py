"""The Vision Transformer for images of any rank: patches become tokens, and from there 2D and 3D are the same program.

Shapes: `B` batch, `*S` spatial (H, W or D, H, W), `*G` the grid of patches, `P` pixels of a patch, `C` channels, `N` tokens, `D` width.
The patch kernel is kept flat, [P * C, D] with the patch's axes in the order of the image's, and positions as [1 + N, D] with CLS first:
a 2D model and a 3D model of depth 1 therefore have the very same parameters.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitmed.models import attention as attentions
from vitmed.models import layers

POOLINGS = ("cls", "mean")


def patchify(images: jax.Array, patch_size: tuple[int, ...]) -> jax.Array:
    """[B, *S, C] -> [B, N, P * C]: the patches in row-major order of the grid, each flattened row-major, channels last."""
    batch, *spatial, channels = images.shape
    rank = len(patch_size)
    if len(spatial) != rank or any(size % patch for size, patch in zip(spatial, patch_size, strict=True)):
        raise ValueError(f"images of shape {tuple(images.shape)} cannot be cut into patches of {patch_size}: every axis must divide")
    grid = [size // patch for size, patch in zip(spatial, patch_size, strict=True)]
    split = images.reshape(batch, *(n for pair in zip(grid, patch_size, strict=True) for n in pair), channels)
    ordered = split.transpose(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    return ordered.reshape(batch, math.prod(grid), math.prod(patch_size) * channels)


def _uniform_by_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for a convolution's kernel and bias, which timm leaves in place."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class PatchEmbed(nn.Module):
    """One matrix product per patch; equal to a convolution whose stride is its kernel, and faster nearly everywhere."""

    patch_size: tuple[int, ...]
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, *S, C] -> [B, N, D]."""
        patches = patchify(images, self.patch_size)
        init = _uniform_by_fan_in(patches.shape[-1])
        kernel = self.param("kernel", init, (patches.shape[-1], self.width))
        bias = self.param("bias", init, (self.width,))
        return patches.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


class ViT(nn.Module):
    """A ViT classifier of any rank: `model.apply({"params": params}, images)` -> logits [B, num_classes] in float32.

    Images are [B, *S, C] float32, already normalised. `num_classes=None` returns the pooled features [B, D] instead. `pooling` is `cls`
    or `mean` (over patch tokens). `drop_path` rises linearly over depth to this rate. Fresh parameters are drawn as timm draws them.
    """

    patch_size: tuple[int, ...]
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    num_classes: int | None
    pooling: str = "cls"
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = attentions.plain

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """[B, *S, C] -> [B, num_classes]; with `train` the random stream `drop_path` is read where drop_path > 0."""
        tokens = PatchEmbed(self.patch_size, self.width, self.dtype, name="patch_embed")(images)
        B, N, D = tokens.shape
        if self.has_variable("params", "pos_embed") and (known := self.get_variable("params", "pos_embed").shape[0] - 1) != N:
            raise ValueError(f"images {images.shape[1:-1]} make {N} patches, pos_embed has positions for {known}; give images of its size")
        cls_token = self.param("cls_token", nn.initializers.normal(1e-6), (1, D))
        positions = self.param("pos_embed", nn.initializers.normal(0.02), (1 + N, D))
        tokens = jnp.concatenate([jnp.broadcast_to(cls_token.astype(self.dtype), (B, 1, D)), tokens], axis=1)
        tokens = tokens + positions.astype(self.dtype)
        for index in range(self.depth):
            rate = self.drop_path * index / max(self.depth - 1, 1)
            block = layers.Block(self.num_heads, self.mlp_width, rate, self.attention, self.dtype, name=f"block_{index:02d}")
            tokens = block(tokens, train=train)
        tokens = layers.layer_norm("norm", self.dtype)(tokens)
        pooled = tokens[:, 0].astype(jnp.float32) if self.pooling == "cls" else tokens[:, 1:].mean(axis=1, dtype=jnp.float32)
        if self.num_classes is None:
            return pooled
        return nn.Dense(self.num_classes, kernel_init=layers.linear_init, name="head")(pooled)
