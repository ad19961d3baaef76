"""Attention as a plain function of queries, keys and values [B, N, H, d], so that the caller chooses how it is computed."""

import jax
import jax.numpy as jnp


def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v per head, [B, N, H, d]; the softmax in float32, memory grows with N squared."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * (q.shape[-1] ** -0.5), k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)
