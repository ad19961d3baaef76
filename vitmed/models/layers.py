"""The transformer encoder's parts: block, MLP, layer scale, stochastic depth, attention pooling. They know tokens, not images.

Shapes: `B` batch, `N` tokens, `D` width, `H` heads, `d` width of a head. Parameters are float32; arithmetic is in `dtype`,
LayerNorm statistics always in float32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# timm's LayerNorm epsilon and its initialisation of linear layers (normal with standard deviation .02, zero bias).
LAYER_NORM_EPSILON = 1e-6
linear_init = nn.initializers.normal(0.02)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), the exact (erf) GELU (arXiv 1606.08415).

    Its derivative is written down, Phi(x) + x phi(x), and computed from x alone: by rule, the function keeps three arrays of the MLP's
    hidden size for the backward pass, and a CPU takes longer to write and read one than to compute Phi.
    """
    return x * _normal_cdf(x)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    x, gradient = jax.lax.optimization_barrier((x, gradient))  # else the forward pass's Phi(x) would be found again, and kept
    density = jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    return (gradient * (_normal_cdf(x) + x * density),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] times kernel [D, F] -> [..., F].

    Its derivative is written down for the kernel's sake, x^T g: by rule it is (g^T x)^T, for which a CPU computes and writes g once more
    as its transpose, of the MLP's hidden size in one of its layers. Here it is x, or g where x is larger than it and the result.
    """
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _product_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, kernel), (x, kernel)


def _product_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    of_x = jax.lax.dot_general(gradient, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    rows = tuple(range(x.ndim - 1))
    over_rows = functools.partial(jax.lax.dot_general, dimension_numbers=((rows, rows), ((), ())))
    if x.size <= gradient.size + kernel.size:
        return of_x, over_rows(x, gradient)
    # The result is transposed as well, after the product: as one, a CPU takes a form that is slower by a third (others: not measured).
    return of_x, jax.lax.optimization_barrier(over_rows(gradient, x)).T


product.defvjp(_product_forward, _product_backward)


def dense(features: int, dtype: Any, name: str) -> nn.Dense:
    """A linear layer, initialised as timm's."""

    def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any) -> jax.Array:
        del dimension_numbers, precision  # always the last axis times the first, as is usual for the dtype
        return product(x, kernel)

    return nn.Dense(features, dtype=dtype, kernel_init=linear_init, dot_general=dot_general, name=name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: Any) -> jax.Array:
    """LayerNorm (arXiv 1607.06450) of x [..., D] over its last axis, times `scale` and plus `bias` [D], in float32 -> [..., D] in `dtype`.

    The variance is the mean of squares minus the squared mean, in one pass: the two-pass form doubles the time of a whole step on a CPU.
    Its derivative is written down: by rule, a CPU writes `scale` once more for every row before it sums over D, and compiles more kernels.
    """
    return _normalise_forward(x, scale, bias, dtype)[0]


def _normalise_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    variance = jnp.maximum(0.0, jnp.square(wide).mean(axis=-1, keepdims=True) - jnp.square(mean))  # rounded, it may be less than 0
    rate = jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    return ((wide - mean) * (rate * scale) + bias).astype(dtype), (x, mean, variance, scale)


def _normalise_backward(dtype: Any, kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, variance, scale = kept
    rate = jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    normed, gradient = (x.astype(jnp.float32) - mean) * rate, gradient.astype(jnp.float32)
    rows, scaled = tuple(range(x.ndim - 1)), gradient * scale
    # Of the gradient as it would be by mean and variance held fixed, what would move either of them is taken away. A variance that rounding
    # has made 0 is fixed.
    along = jnp.where(variance > 0, (scaled * normed).mean(axis=-1, keepdims=True), 0.0)
    of_x = rate * (scaled - scaled.mean(axis=-1, keepdims=True) - normed * along)
    return of_x.astype(x.dtype), (gradient * normed).sum(axis=rows), gradient.sum(axis=rows)


normalise.defvjp(_normalise_forward, _normalise_backward)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with timm's epsilon: [..., D] -> [..., D] in `dtype`."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return normalise(x, scale, bias, self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention [B, N, D] -> [B, M, D]; `attention` is the function of q, k, v that does the work."""

    num_heads: int
    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, num_queries: int | None = None) -> jax.Array:
        """Project to queries, keys and values, attend, project back; M = `num_queries` or N: only so many first tokens are asked for."""
        B, _, D = tokens.shape
        qkv = dense(3 * D, self.dtype, "qkv")(tokens)
        q, k, v = (part.reshape(B, -1, self.num_heads, D // self.num_heads) for part in jnp.split(qkv, 3, axis=-1))
        mixed = self.attention(q[:, :num_queries], k, v).reshape(B, -1, D)
        return dense(D, self.dtype, "proj")(mixed)


class MLP(nn.Module):
    """Two linear layers, token by token, around the exact (erf) GELU or, with `swiglu`, silu(a) * b of two halves (arXiv 2002.05202)."""

    hidden: int
    swiglu: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        x = dense(self.hidden * (1 + self.swiglu), self.dtype, "fc1")(tokens)
        if self.swiglu:
            gate, value = jnp.split(x, 2, axis=-1)
            x = nn.silu(gate) * value
        else:
            x = gelu(x)
        return dense(tokens.shape[-1], self.dtype, "fc2")(x)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (arXiv 2103.17239), from 1e-5 on as in DINOv2."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, branch: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        return branch * self.param("gamma", nn.initializers.constant(1e-5), (branch.shape[-1],)).astype(self.dtype)


def drop_path_factors(key: jax.Array, rates: Sequence[float], batch_size: int) -> jax.Array:
    """Stochastic depth (arXiv 1603.09382) for two residual branches per block: [depth, 2, B] of 0 and 1 / (1 - rate).

    A branch of block i is dropped, example by example, with probability `rates[i]` and otherwise rescaled to keep its mean.
    """
    kept = 1.0 - jnp.asarray(rates, jnp.float32)[:, None, None]
    return jax.random.bernoulli(key, kept, (len(rates), 2, batch_size)) / kept


class Adapter(nn.Module):
    """AdaptFormer's branch (arXiv 2205.13535): scale * up(relu(down(x))) through a bottleneck of `width`; `up` begins as zero."""

    width: int
    scale: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        down = nn.Dense(self.width, dtype=self.dtype, kernel_init=nn.initializers.he_uniform(), name="down")(tokens)
        up = nn.Dense(tokens.shape[-1], dtype=self.dtype, kernel_init=nn.initializers.zeros, name="up")(nn.relu(down))
        return self.scale * up


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each on a residual branch, and with an `adapter_width` a third beside the MLP."""

    num_heads: int
    mlp_width: int
    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    swiglu: bool = False
    layer_scale: bool = False
    adapter_width: int = 0
    adapter_scale: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, factors: jax.Array | None = None, num_queries: int | None = None) -> jax.Array:
        """[B, N, D] -> [B, M, D]; `factors` [2, B] multiply the branches, as `drop_path_factors` gives them.

        M = `num_queries` are the first tokens that are wanted, None for all N: the others are attended to and not computed further.
        """
        changed = Attention(self.num_heads, self.attention, self.dtype, name="attn")(self._norm(1, tokens), num_queries)
        tokens = tokens[:, :num_queries] + self._branch(1, changed, factors)
        normed = self._norm(2, tokens)
        changed = MLP(self.mlp_width, self.swiglu, self.dtype, name="mlp")(normed)
        after = tokens + self._branch(2, changed, factors)
        if not self.adapter_width:
            return after
        return after + Adapter(self.adapter_width, self.adapter_scale, self.dtype, name="adapter")(normed)

    def _norm(self, number: int, tokens: jax.Array) -> jax.Array:
        return LayerNorm(self.dtype, name=f"norm{number}")(tokens)

    def _branch(self, number: int, changed: jax.Array, factors: jax.Array | None) -> jax.Array:
        """What a residual branch adds: scaled, and by example dropped."""
        if self.layer_scale:
            changed = LayerScale(self.dtype, name=f"ls{number}")(changed)
        return changed if factors is None else changed * factors[number - 1, :, None, None].astype(self.dtype)


class AttentionPool(nn.Module):
    """One learned query attends to all tokens, an MLP follows ("map" pooling, arXiv 2106.04560; timm's AttentionPoolLatent).

    Without an `mlp_width` none does: what is attended to is projected, and that is all.
    """

    num_heads: int
    mlp_width: int
    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, D]."""
        B, N, D = tokens.shape
        heads = (self.num_heads, D // self.num_heads)
        latent = self.param("latent", nn.initializers.normal(D**-0.5), (1, D)).astype(self.dtype)
        q = dense(D, self.dtype, "q")(latent).reshape(1, 1, *heads)
        kv = dense(2 * D, self.dtype, "kv")(tokens)
        k, v = jnp.moveaxis(kv.reshape(B, N, 2, *heads), 2, 0)
        mixed = self.attention(jnp.broadcast_to(q, (B, 1, *heads)), k, v).reshape(B, D)
        x = dense(D, self.dtype, "proj")(mixed)
        if not self.mlp_width:
            return x
        return x + MLP(self.mlp_width, dtype=self.dtype, name="mlp")(LayerNorm(self.dtype, name="norm")(x))
