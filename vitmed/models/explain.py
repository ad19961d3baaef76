"""Where in an image a network looks: heat over the grid of its patches, as pure functions of (model, params, images).

Every method follows the classifier back through the blocks. It begins with the share that each token has in what is classified (CLS, the
mean of the patches, what the pooling's query attends to), and multiplies it by what each block passes on, from the last to the first.
Shapes: `B` batch, `*S` spatial, `C` channels, `N` tokens, `M` queries, `H` heads, `*G` the grid of patches, `K` classes.
"""

import functools
from collections.abc import Sequence
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


def watch(model: vit.ViT, params: Any, images: jax.Array, *, first: int = 0, added: Sequence[jax.Array] = ()) -> Watched:
    """The forward pass of images [B, *S, C], prepared for the model, with the attention weights of the blocks from number `first` on.

    What is `added` to the weights, in their order, changes the logits: a derivative by it at zero is that by the weights. The last block
    has no more queries than the classifier looks at.
    """
    kept: list[jax.Array] = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores, axis=-1)
        if added:
            weights = weights + added[len(kept)]
        kept.append(weights)
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)

    watched = model.clone(attention=attend, remat="none")

    def encode(tokens: jax.Array) -> jax.Array:
        for index, name in enumerate(model.block_names):
            block = (watched if index >= first else model).block(parent=None)
            num_queries = model.num_pooled_tokens if index == model.depth - 1 else None
            tokens = block.apply({"params": params[name]}, tokens, None, num_queries)
        return tokens

    logits = watched.apply({"params": params}, images, encode=encode)
    pool = kept.pop() if model.pooling == "map" else None
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
    """[B, *S, C] -> heat float32 [B, *G] for `classes` [B], or those of the highest logits, by Chefer et al. (arXiv 2103.15679).

    Attention weighted by the derivative of the class's logit by it: relevance R <- R + E_h[(dA * A)+] R from block to block, beginning with
    the identity; E_h is the mean over heads, and + drops what speaks against the class. The identity itself is left out of what is shown:
    of averaged patches it would be the same heat everywhere.
    """

    def chosen(added: list[jax.Array]) -> tuple[jax.Array, Watched]:
        watched = watch(model, params, images, added=added)
        wanted = watched.logits.argmax(axis=-1) if classes is None else classes
        return jnp.take_along_axis(watched.logits, wanted[:, None], axis=-1).sum(), watched

    shapes = jax.eval_shape(functools.partial(watch, model, params), images)
    every = [*shapes.blocks, *filter(lambda pool: pool is not None, [shapes.pool])]
    derivatives, watched = jax.grad(chosen, has_aux=True)([jnp.zeros(like.shape, like.dtype) for like in every])
    weighted = [_weighted(weights, by) for weights, by in zip(watched.blocks, derivatives, strict=False)]
    pool = None if watched.pool is None else _weighted(watched.pool, derivatives[-1])[:, None]
    start = share = _looked_at(model, watched._replace(pool=pool))
    for weights in reversed(weighted):
        share = share + _passed(share, weights)
    return _on_grid(model, share if pool is not None else share - start, images)


def heat(model: vit.ViT, params: Any, images: jax.Array, classes: jax.Array | None = None, *, method: str) -> jax.Array:
    """The heat of one of METHODS as shares, which sum to one over the grid of an image (to nothing where there is no heat): [B, *G]."""
    if method == "gradient":
        found = gradient(model, params, images, classes)
    else:
        found = {"attention": attention, "rollout": rollout}[method](model, params, images)
    total = found.sum(axis=tuple(range(1, found.ndim)), keepdims=True)
    return found / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)


def _weighted(weights: jax.Array, derivative: jax.Array) -> jax.Array:
    """[B, H, M, N] -> [B, M, N]: the mean over heads of what speaks for the class."""
    return jax.nn.relu(weights * derivative).mean(axis=1)


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
