"""The Vision Transformer for images of any rank: patches become tokens, and from there 2D and 3D are the same program.

Shapes: `B` batch, `*S` spatial (H, W or D, H, W), `*G` the grid of patches, `P` pixels of a patch, `C` channels, `N` tokens, `D` width.
The patch kernel is kept flat, [P * C, D] with the patch's axes in the order of the image's ([K * C, D] for a kernel of `K` pixels that is
larger or smaller than the patch, its stride), and positions as [1 + N, D] with CLS first:
a 2D model and a 3D model of depth 1 therefore have the very same parameters. Prefix tokens (CLS, then registers) precede the patches'.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitmed.models import attention as attentions
from vitmed.models import layers

POOLINGS = ("cls", "mean", "map", "distilled", "attention")
STAGES = ("all", "tokens", "features", "classify")
REMATS = ("none", "attention", "blocks")


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


def convolve(images: jax.Array, kernel: jax.Array, *, stride: tuple[int, ...]) -> jax.Array:
    """[B, *S, C] with a kernel [*K, C, D] at every `stride` pixels, unpadded -> [B, N, D], row-major order of the grid."""
    rank = len(stride)
    if images.ndim != rank + 2 or any(size < pixels for size, pixels in zip(images.shape[1:-1], kernel.shape[:rank], strict=True)):
        raise ValueError(f"images of shape {tuple(images.shape)} cannot be cut by kernels of {kernel.shape[:rank]}: no axis may be smaller")
    places = (0, rank + 1, *range(1, rank + 1))
    numbers = jax.lax.ConvDimensionNumbers(places, (rank + 1, rank, *range(rank)), places)
    tokens = jax.lax.conv_general_dilated(images, kernel, window_strides=stride, padding="VALID", dimension_numbers=numbers)
    return tokens.reshape(images.shape[0], -1, kernel.shape[-1])  # not len: an exported batch is a symbol


class PatchEmbed(nn.Module):
    """One matrix product per patch; equal to a convolution whose stride is its kernel, and faster nearly everywhere.

    A kernel of another size than the patch sees the pixels of its neighbours too, or leaves some out: then it is a convolution.
    """

    patch_size: tuple[int, ...]
    width: int
    dtype: Any = jnp.float32
    kernel_size: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, *S, C] -> [B, N, D]."""
        pixels, channels = self.kernel_size or self.patch_size, images.shape[-1]
        fan_in = math.prod(pixels) * channels
        init = _uniform_by_fan_in(fan_in)
        kernel = self.param("kernel", init, (fan_in, self.width)).astype(self.dtype)
        bias = self.param("bias", init, (self.width,)).astype(self.dtype)
        if pixels == self.patch_size:
            return patchify(images, self.patch_size).astype(self.dtype) @ kernel + bias
        return convolve(images.astype(self.dtype), kernel.reshape(*pixels, channels, -1), stride=self.patch_size) + bias


class ViT(nn.Module):
    """A ViT classifier of any rank: `model.apply({"params": params}, images)` -> logits [B, num_classes] in float32.

    Images are [B, *S, C] float32, already normalised. `num_classes=None` returns the pooled features [B, D] instead. `kernel_size` are the
    pixels that a token is computed from, None for the patch's. `drop_path` rises linearly over depth to this rate. The other fields are
    those of `build.Architecture`, which says what they mean. Fresh parameters are drawn as timm draws them.

    `adapter_width` and `adapter_scale` are those of `layers.Adapter` beside every MLP, which a width of 0 leaves out.

    `scanned` compiles one block and loops over the blocks' parameters; `remat` (one of REMATS) says what the backward pass computes again
    instead of keeping it. Within the blocks tokens are filled up to a multiple of `token_multiple`, for an `attention` that needs it and
    leaves the fillers out. None of these changes what is computed, nor the parameters' names.
    """

    patch_size: tuple[int, ...]
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    num_classes: int | None
    kernel_size: tuple[int, ...] | None = None
    class_token: bool = True
    num_registers: int = 0
    prefix_positions: bool = True
    swiglu: bool = False
    layer_scale: bool = False
    pooling: str = "cls"
    final_norm: bool = True
    fc_norm: bool = False
    drop_path: float = 0.0
    adapter_width: int = 0
    adapter_scale: float = 0.0
    dtype: Any = jnp.float32
    attention: attentions.Attention = attentions.plain
    scanned: bool = False
    remat: str = "none"
    token_multiple: int = 1

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and registers."""
        return self.class_token + self.num_registers

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, encode: Callable[[jax.Array], jax.Array] | None = None, stage: str = "all"
    ) -> jax.Array:
        """[B, *S, C] -> [B, num_classes]; with `train` the random stream `drop_path` is read where drop_path > 0.

        `encode` stands for the blocks where given: [B, prefix + N, D] -> the same, or the first `num_pooled_tokens` alone. The `stage`
        (one of STAGES) `features` ends before what is fresh in a fine-tuned network, with [B, M, D] of what that looks at, `classify`
        begins there, with these for `images`, and `tokens` ends with all of the last block's, normed: [B, prefix + N, D].
        """
        if stage == "classify":
            return self._classify(images)
        tokens = self._embed(images)
        factors = None
        if train and self.drop_path:
            rates = [self.drop_path * index / max(self.depth - 1, 1) for index in range(self.depth)]
            factors = layers.drop_path_factors(self.make_rng("drop_path"), rates, len(images))
        num_queries = None if stage == "tokens" else self.num_pooled_tokens
        tokens = self._encode(tokens, factors, num_queries) if encode is None else encode(tokens)
        if self.final_norm:
            tokens = layers.LayerNorm(self.dtype, name="norm")(tokens)
        if stage == "tokens":
            return tokens
        seen = self._seen(tokens)
        return seen if stage == "features" else self._classify(seen)

    @property
    def num_pooled_tokens(self) -> int | None:
        """How many first tokens the classifier looks at, None for all of them."""
        return {"cls": 1, "distilled": 2}.get(self.pooling)

    def _encode(self, tokens: jax.Array, factors: jax.Array | None, num_queries: int | None) -> jax.Array:
        """[B, prefix + N, D] -> the same through all blocks, or no more than the first `num_queries`, which the classifier looks at.

        Of the last block the other tokens are needed as keys and values alone: its MLP, three quarters of a block, is left out for them.
        """
        names = self.block_names
        if self.is_initializing():
            for name in names:
                tokens = self.block(name=name)(tokens)
            return tokens
        block = self.block(parent=None)
        num_tokens = tokens.shape[1]
        if fillers := -num_tokens % self.token_multiple:
            tokens = jnp.pad(tokens, ((0, 0), (0, fillers), (0, 0)))

        # Jitted, so that all blocks but the last are traced as one; inlined, since what a call keeps for its derivative is copied first.
        @functools.partial(jax.jit, static_argnums=3, inline=True)
        def apply(params: Any, tokens: jax.Array, factors: jax.Array | None, num_queries: int | None = None) -> jax.Array:
            return block.apply({"params": params}, tokens, factors, num_queries)

        parts = [(self.get_variable("params", name), None if factors is None else factors[index]) for index, name in enumerate(names)]
        looped = len(names) - (num_queries is not None) if self.scanned or self.remat != "none" else 0
        if looped:
            tokens = self._scan(apply, parts[:looped], tokens)
        for index, part in list(enumerate(parts))[looped:]:
            tokens = apply(part[0], tokens, part[1], num_queries if index == len(parts) - 1 else None)
        return tokens[:, :num_tokens] if fillers else tokens

    @property
    def block_names(self) -> list[str]:
        """The blocks' names among the parameters, in order."""
        return [f"block_{index:02d}" for index in range(self.depth)]

    def block(self, **where: Any) -> layers.Block:
        """One of the blocks, as linen modules are placed: by `name`, or with `parent=None` on its own."""
        # Recomputing attention alone keeps its queries, keys and values. Within a scan nothing merges what is computed again with what was.
        attention = jax.checkpoint(self.attention, prevent_cse=False) if self.remat == "attention" else self.attention
        sizes = (self.num_heads, self.mlp_width, attention)
        adapter = {"adapter_width": self.adapter_width, "adapter_scale": self.adapter_scale}
        return layers.Block(*sizes, swiglu=self.swiglu, layer_scale=self.layer_scale, **adapter, dtype=self.dtype, **where)

    def _scan(self, apply: Callable[..., jax.Array], parts: list[tuple[Any, jax.Array | None]], tokens: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D] through blocks of these (parameters, drop-path factors), stacked and each used in turn by one loop.

        On a CPU XLA undoes `jax.checkpoint` wherever it is not in a loop: it finds the second computation equal to the first.
        """

        def step(tokens: jax.Array, part: tuple[Any, jax.Array | None]) -> tuple[jax.Array, None]:
            return apply(part[0], tokens, part[1]), None

        if self.remat == "blocks":
            step = jax.checkpoint(step, prevent_cse=False)
        return jax.lax.scan(step, tokens, jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))[0]

    def _embed(self, images: jax.Array) -> jax.Array:
        """[B, *S, C] -> [B, prefix + N, D], positions added."""
        tokens = PatchEmbed(self.patch_size, self.width, self.dtype, self.kernel_size, name="patch_embed")(images)
        B, N, D = tokens.shape
        placed = N + self.num_prefix_tokens * self.prefix_positions  # tokens that have a position
        if self.has_variable("params", "pos_embed") and (known := self.get_variable("params", "pos_embed").shape[0]) != placed:
            other = known - (placed - N)
            raise ValueError(f"images {images.shape[1:-1]} make {N} patches, pos_embed has positions for {other}; give images of its size")
        prefix = []
        if self.class_token:
            prefix.append(self.param("cls_token", nn.initializers.normal(1e-6), (1, D)))
        if self.num_registers:
            prefix.append(self.param("registers", nn.initializers.normal(1e-6), (self.num_registers, D)))
        positions = self.param("pos_embed", nn.initializers.normal(0.02), (placed, D)).astype(self.dtype)
        prefix = [jnp.broadcast_to(part.astype(self.dtype), (B, *part.shape)) for part in prefix]
        if self.prefix_positions:
            return jnp.concatenate([*prefix, tokens], axis=1) + positions
        return jnp.concatenate([*prefix, tokens + positions], axis=1)

    def _seen(self, tokens: jax.Array) -> jax.Array:
        """[B, prefix + N, D] -> [B, M, D]: what is classified, M = 1; both tokens of DeiT's; the patches where a fresh pool follows."""
        patches = tokens[:, self.num_prefix_tokens :]
        if self.pooling == "attention":
            return patches
        if self.pooling == "map":
            pool = layers.AttentionPool(self.num_heads, self.mlp_width, self.attention, self.dtype, name="attn_pool")
            pooled = pool(patches).astype(jnp.float32)[:, None]
        elif self.pooling == "mean":
            pooled = patches.mean(axis=1, dtype=jnp.float32, keepdims=True)
        else:
            pooled = tokens[:, : self.num_pooled_tokens].astype(jnp.float32)
        return pooled

    def _classify(self, seen: jax.Array) -> jax.Array:
        """[B, M, D] -> logits [B, num_classes], or features [B, D]."""
        if self.pooling == "attention":
            pool = layers.AttentionPool(self.num_heads, 0, self.attention, self.dtype, name="head_pool")
            seen = pool(seen.astype(self.dtype)).astype(jnp.float32)[:, None]
        pooled = seen[:, 0]
        if self.fc_norm:
            pooled = layers.LayerNorm(name="fc_norm")(pooled)
        distilled = seen[:, 1] if self.pooling == "distilled" else None
        if self.num_classes is None:
            return pooled if distilled is None else (pooled + distilled) / 2
        logits = nn.Dense(self.num_classes, kernel_init=layers.linear_init, name="head")(pooled)
        if distilled is None:
            return logits
        # DeiT's two classifiers, of the CLS and of the distillation token, count alike (arXiv 2012.12877).
        return (logits + nn.Dense(self.num_classes, kernel_init=layers.linear_init, name="head_dist")(distilled)) / 2
