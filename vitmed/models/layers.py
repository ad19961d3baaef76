"""The transformer encoder's parts: block, MLP, stochastic depth. They know tokens, not images.

Shapes: `B` batch, `N` tokens, `D` width, `H` heads, `d` width of a head. Parameters are float32; arithmetic is in `dtype`,
LayerNorm statistics always in float32.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# timm's LayerNorm epsilon and its initialisation of linear layers (normal with standard deviation .02, zero bias).
LAYER_NORM_EPSILON = 1e-6
linear_init = nn.initializers.normal(0.02)


def layer_norm(name: str, dtype: Any) -> nn.LayerNorm:
    """LayerNorm over the last axis with timm's epsilon.

    The variance is the mean of squares minus the squared mean, in one pass: the two-pass form doubles the time of a whole step on a CPU.
    """
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=dtype, use_fast_variance=True, name=name)


class Attention(nn.Module):
    """Multi-head self-attention [B, N, D] -> [B, N, D]; `attention` is the function of q, k, v [B, N, H, d] that does the work."""

    num_heads: int
    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Project to queries, keys and values, attend, project back."""
        B, N, D = tokens.shape
        qkv = nn.Dense(3 * D, dtype=self.dtype, kernel_init=linear_init, name="qkv")(tokens)
        q, k, v = jnp.moveaxis(qkv.reshape(B, N, 3, self.num_heads, D // self.num_heads), 2, 0)
        mixed = self.attention(q, k, v).reshape(B, N, D)
        return nn.Dense(D, dtype=self.dtype, kernel_init=linear_init, name="proj")(mixed)


class MLP(nn.Module):
    """Two linear layers around the exact (erf) GELU, token by token."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        x = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=linear_init, name="fc1")(tokens)
        x = nn.gelu(x, approximate=False)
        return nn.Dense(tokens.shape[-1], dtype=self.dtype, kernel_init=linear_init, name="fc2")(x)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training drops a residual branch per example, rescaled to keep its mean."""

    rate: float

    @nn.compact
    def __call__(self, branch: jax.Array, *, train: bool) -> jax.Array:
        """[B, N, D] -> [B, N, D]; needs the random stream `drop_path` when it acts."""
        if not train or self.rate == 0.0:
            return branch
        # linen folds the module's path into the key, so every block draws its own.
        kept = jax.random.bernoulli(self.make_rng("drop_path"), 1.0 - self.rate, (branch.shape[0], 1, 1))
        return jnp.where(kept, branch / (1.0 - self.rate), 0.0).astype(branch.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each on a residual branch."""

    num_heads: int
    mlp_width: int
    drop_path: float
    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        mixed = Attention(self.num_heads, self.attention, self.dtype, name="attn")(layer_norm("norm1", self.dtype)(tokens))
        tokens = tokens + DropPath(self.drop_path, name="drop1")(mixed, train=train)
        changed = MLP(self.mlp_width, self.dtype, name="mlp")(layer_norm("norm2", self.dtype)(tokens))
        return tokens + DropPath(self.drop_path, name="drop2")(changed, train=train)
