"""Where in an image a network looks: heat over the grid of its patches, as pure functions of (model, params, images).

Attention and rollout begin with the share that each token has in what is classified (CLS, the mean of the patches, what the pooling's
query attends to) and follow it back, by what blocks attend to; gradient asks what a class's logit depends on.
Shapes: `B` batch, `*S` spatial, `C` channels, `N` tokens, `M` queries, `H` heads, `*G` the grid of patches, `K` classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vitmed import cost
from vitmed.models import vit

METHODS = ("attention", "rollout", "gradient")


class Watched(NamedTuple):
    """A forward pass: logits [B, K], attention weights [B, H, M, N] of the blocks watched and [B, H, 1, patches] of map pooling's query."""

    logits: jax.Array
    blocks: list[jax.Array]
    pool: jax.Array | None


def watch(model: vit.ViT, params: Any, images: jax.Array, *, first: int = 0, scale: jax.Array | None = None) -> Watched:
    """The forward pass of images [B, *S, C], prepared for the model, with the attention weights of the blocks from number `first` on.

    `scale` [B, N] multiplies the tokens before the first block. The last block has no more queries than the classifier looks at.
    """
    kept: list[jax.Array] = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
        kept.append(jax.nn.softmax(scores, axis=-1))
        return jnp.einsum("bhqk,bkhd->bqhd", kept[-1].astype(v.dtype), v)

    watched = model.clone(attention=attend, remat="none")

    def encode(tokens: jax.Array) -> jax.Array:
        tokens = tokens if scale is None else tokens * scale[..., None].astype(tokens.dtype)
        for index, name in enumerate(model.block_names):
            block = (watched if index >= first else model).block(parent=None)
            num_queries = model.num_pooled_tokens if index == model.depth - 1 else None
            tokens = block.apply({"params": params[name]}, tokens, None, num_queries)
        return tokens

    logits = watched.apply({"params": params}, images, encode=encode)
    pool = kept.pop() if model.pooling in ("map", "attention") else None
    return Watched(logits, kept, pool)


def attention(model: vit.ViT, params: Any, images: jax.Array) -> jax.Array:
    """[B, *S, C] -> heat float32 [B, *G]: what the classifier's tokens, or the pooling's query, attend to last; mean over heads.

    Where patches are averaged it is the mean over them. Raw attention leaves out what the values hold and every earlier block.
    """
    watched = watch(model, params, images, first=model.depth - 1)
    share = _looked_at(model, watched)
    if watched.pool is None:
        share = _passed(share, watched.blocks[-1].mean(axis=1))
    return _on_grid(model, share, images)


def rollout(model: vit.ViT, params: Any, images: jax.Array) -> jax.Array:
    """[B, *S, C] -> heat float32 [B, *G] by attention rollout (Abnar & Zuidema, arXiv 2005.00928): the product of 0.5 A + 0.5 I.

    A is the mean over heads; the identity stands for the residual branch. It is the same for every class.
    """
    watched = watch(model, params, images)
    share = _looked_at(model, watched)
    for weights in reversed(watched.blocks):
        share = 0.5 * share + 0.5 * _passed(share, weights.mean(axis=1))
    return _on_grid(model, share, images)


def gradient(model: vit.ViT, params: Any, images: jax.Array, classes: jax.Array | None = None) -> jax.Array:
    """[B, *S, C] -> heat float32 [B, *G] for `classes` [B], or those of the highest logits: gradient times input, of patches' tokens.

    |t . dz/dt| of each patch's token t before the first block (embedding and position) and the class's logit z: to first order what z would
    lose without the token, or gain (Shrikumar et al., arXiv 1605.01713). It goes through residual branches and MLPs as well as attention,
    so that it holds for every pooling, and needs no attention weights. Against it attention weighted by its derivative, after Chefer et al.
    (arXiv 2103.15679), was tried on phantom2d: where patches are averaged it found one of the two classes and missed the other.
    """

    def chosen(scale: jax.Array) -> jax.Array:
        logits = watch(model, params, images, first=model.depth, scale=scale).logits
        wanted = logits.argmax(axis=-1) if classes is None else classes
        return jnp.take_along_axis(logits, wanted[:, None], axis=-1).sum()

    num_tokens = model.num_prefix_tokens + cost.num_patches(images.shape[1:-1], model.patch_size, model.kernel_size)
    by_scale = jax.grad(chosen)(jnp.ones((images.shape[0], num_tokens)))  # of t s at s = 1: t . dz/dt
    return _on_grid(model, jnp.abs(by_scale), images)


def heat(model: vit.ViT, params: Any, images: jax.Array, classes: jax.Array | None = None, *, method: str) -> jax.Array:
    """The heat of one of METHODS as shares, which sum to one over the grid of an image (to nothing where there is no heat): [B, *G]."""
    if method == "gradient":
        found = gradient(model, params, images, classes)
    else:
        found = {"attention": attention, "rollout": rollout}[method](model, params, images)
    total = found.sum(axis=tuple(range(1, found.ndim)), keepdims=True)
    return found / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)


def _passed(share: jax.Array, weights: jax.Array) -> jax.Array:
    """Shares [B, N] of a block's output through weights [B, M, N], M <= N, to its input; outputs beyond M are looked at by nobody."""
    return jnp.einsum("bm,bmn->bn", share[:, : weights.shape[1]], weights)


def _looked_at(model: vit.ViT, watched: Watched) -> jax.Array:
    """[B, N]: the share of each token, after the last block, in what is classified."""
    batch, num_tokens = watched.blocks[-1].shape[0], watched.blocks[-1].shape[-1]
    prefix, looked_at = model.num_prefix_tokens, model.num_pooled_tokens
    if watched.pool is not None:
        return jnp.pad(watched.pool.mean(axis=1)[:, 0], ((0, 0), (prefix, 0)))
    first, stop = (prefix, num_tokens) if looked_at is None else (0, looked_at)
    return jnp.zeros((batch, num_tokens)).at[:, first:stop].set(1 / (stop - first))


def _on_grid(model: vit.ViT, share: jax.Array, images: jax.Array) -> jax.Array:
    """The patches' part of [B, N] as [B, *G]."""
    grid = cost.grid(images.shape[1:-1], model.patch_size, model.kernel_size)
    return share[:, model.num_prefix_tokens :].reshape(-1, *grid).astype(jnp.float32)
