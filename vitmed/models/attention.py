"""Attention as a plain function of queries, keys and values [B, N, H, d], so that the caller chooses how it is computed.

All forms compute softmax(q k^T / sqrt(d)) v per head with the softmax in float32, and agree to float tolerance. They differ in what they
keep: `plain` the whole N x N weights for the backward pass, `blockwise` and `cudnn` none of them.
Shapes: `B` batch, `N` tokens, `H` heads, `d` width of a head. There may be fewer queries than keys.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vitmed import config

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
FORMS = ("auto", "plain", "blockwise", "cudnn")
# Queries at a time: as many as make this many scores of all images and heads (1 GB), within these bounds.
SCORES, BLOCKS = 2**28, (64, 512)
# On a CPU as many as make this many scores of a head (2.5 MB), but no fewer than SMALLEST_BLOCK.
CPU_SCORES, SMALLEST_BLOCK = 640_000, 128
# Heads at a time on a CPU: one alone takes 8 % longer on two cores; more are no faster, and take memory.
CPU_HEADS = 4
# From this many tokens on `blockwise` is taken: on a CPU because it is faster there, elsewhere because the weights of a batch of 64 with
# 6 heads would be 6 GB in float32.
LONG = {"cpu": 512, "other": 2048}
CUDNN_WIDTHS = range(8, 129, 8)


@jax.custom_vjp
def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """[B, N, H, d] -> [B, N, H, d]; memory grows with N squared.

    Its derivative is written down: by rule, products come in orders that a CPU transposes again, and a step of 197 tokens takes a tenth
    longer. The sum over keys in softmax's derivative is taken over d instead, as sum_k dw w = do . o (arXiv 2205.14135, appendix B).
    """
    return _plain_forward(q, k, v)[0]


def _plain_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    q, k, v = (part.transpose(0, 2, 1, 3) for part in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v)
    return mixed.transpose(0, 2, 1, 3), (q, k, v, weights, mixed)


def _plain_backward(kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, weights, mixed = kept  # [B, H, N, d], q scaled
    gradient = gradient.transpose(0, 2, 1, 3)
    of_weights = jnp.einsum("bhqd,bhkd->bhqk", gradient, v, preferred_element_type=jnp.float32)
    along = jnp.einsum("bhqd,bhqd->bhq", gradient, mixed, preferred_element_type=jnp.float32)
    of_scores = (weights * (of_weights - along[..., None])).astype(q.dtype)
    of_q = jnp.einsum("bhqk,bhkd->bhqd", of_scores, k) * k.shape[-1] ** -0.5
    of_k = jnp.einsum("bhqk,bhqd->bhkd", of_scores, q)
    of_v = jnp.einsum("bhqk,bhqd->bhkd", weights.astype(v.dtype), gradient)
    return tuple(part.transpose(0, 2, 1, 3) for part in (of_q, of_k, of_v))


plain.defvjp(_plain_forward, _plain_backward)


def block_size(*, batch_size: int, num_heads: int, num_keys: int) -> int:
    """How many queries `blockwise` takes at a time where all images and heads are one batch."""
    least, most = BLOCKS
    return max(least, min(most, SCORES // (batch_size * num_heads * num_keys)))


def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, *, block: int | None = None, heads: int | None = None) -> jax.Array:
    """[B, N, H, d] -> [B, N, H, d], at most `block` queries at a time and each block again in the backward pass: memory grows with N.

    `heads` of all images are computed at a time, so that the scores' memory does not grow with the batch; with None all are one batch,
    which fills an accelerator. No `block` is `block_size`.
    """
    B, N, H, d = q.shape
    block = block or block_size(batch_size=B, num_heads=H, num_keys=k.shape[1])
    block = -(-N // -(-N // block))  # as many blocks, as equal as can be
    # Rows of zeros fill up the last block: they attend to everything alike and are cut off again.
    q = jnp.pad(q * d**-0.5, ((0, 0), (0, -N % block), (0, 0), (0, 0)))
    mixed = _blocks(*(part.transpose(0, 2, 1, 3).reshape(B * H, -1, d) for part in (q, k, v)), block, heads)
    return mixed.reshape(B, H, -1, d)[:, :, :N].transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _blocks(q: jax.Array, k: jax.Array, v: jax.Array, block: int, heads: int | None) -> jax.Array:
    """Heads [A, N, d], q scaled and N a multiple of `block` -> [A, N, d].

    The derivative is written down (arXiv 2205.14135): of the weights the forward pass keeps log(sum(exp(scores))), so that the backward
    pass has them again by one exponential, and of softmax's derivative the sum over keys is do . o. By rule both passes go over a block's
    scores more often.
    """
    return _blocks_forward(q, k, v, block, heads)[0]


def _over_heads(of_head: Callable[..., Any], arrays: tuple[jax.Array, ...], heads: int | None) -> Any:
    return jax.vmap(of_head)(*arrays) if heads is None else jax.lax.map(lambda head: of_head(*head), arrays, batch_size=heads)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("qd,kd->qk", q, k, preferred_element_type=jnp.float32)


def _blocks_forward(q: jax.Array, k: jax.Array, v: jax.Array, block: int, heads: int | None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def of_head(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        def of_block(q: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores = _scores(q, k)
            largest = scores.max(axis=-1)
            exponentials = jnp.exp(scores - largest[:, None])
            total = exponentials.sum(axis=-1)
            mixed = jnp.einsum("qk,kd->qd", exponentials.astype(v.dtype), v, preferred_element_type=jnp.float32) / total[:, None]
            return mixed.astype(v.dtype), largest + jnp.log(total)

        mixed, logs = jax.lax.map(of_block, q.reshape(-1, block, q.shape[-1]))
        return mixed.reshape(q.shape), logs.reshape(-1)

    mixed, logs = _over_heads(of_head, (q, k, v), heads)
    return mixed, (q, k, v, mixed, logs)


def _blocks_backward(block: int, heads: int | None, kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
    def of_head(
        q: jax.Array, k: jax.Array, v: jax.Array, mixed: jax.Array, logs: jax.Array, gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        along = jnp.einsum("qd,qd->q", gradient, mixed, preferred_element_type=jnp.float32)

        def add(sums: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            (of_k, of_v), (q, gradient, logs, along) = sums, part
            weights = jnp.exp(_scores(q, k) - logs[:, None])
            of_scores = (weights * (_scores(gradient, v) - along[:, None])).astype(q.dtype)
            # [d, K]: a CPU multiplies by the scores as they lie a third faster than by their transpose.
            of_v += jnp.einsum("qd,qk->dk", gradient, weights.astype(v.dtype), preferred_element_type=jnp.float32)
            of_k += jnp.einsum("qd,qk->dk", q, of_scores, preferred_element_type=jnp.float32)
            return (of_k, of_v), of_scores @ k

        parts = [array.reshape(-1, block, *array.shape[1:]) for array in (q, gradient, logs, along)]
        nothing = (jnp.zeros(k.shape[::-1], jnp.float32), jnp.zeros(v.shape[::-1], jnp.float32))
        (of_k, of_v), of_q = jax.lax.scan(add, nothing, tuple(parts))
        return of_q.reshape(q.shape), of_k.T.astype(k.dtype), of_v.T.astype(v.dtype)

    return _over_heads(of_head, (*kept, gradient), heads)


_blocks.defvjp(_blocks_forward, _blocks_backward)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """[B, N, H, d] -> [B, N, H, d] by cuDNN's fused kernel: NVIDIA GPUs, bfloat16, heads of a width that it takes."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def resolve(form: str, *, platform: str, dtype: Any, num_tokens: int, head_width: int) -> str:
    """A form of FORMS, or what `auto` comes to: the fastest for the device, the dtype and the length. InputError where it cannot be.

    `platform` is JAX's: cpu, gpu, tpu.
    """
    config.one_of("model.attention", form, FORMS)
    fits = platform == "gpu" and jnp.dtype(dtype) == jnp.bfloat16 and head_width in CUDNN_WIDTHS
    if form == "cudnn" and not fits:
        have = f"{platform}, {jnp.dtype(dtype).name}, heads of {head_width}"
        raise config.InputError(
            f"model.attention=cudnn needs an NVIDIA GPU, bfloat16 and heads of 8, 16 ... 128, this is {have}; take auto"
        )
    if form != "auto":
        return form
    return "cudnn" if fits else "blockwise" if num_tokens >= LONG.get(platform, LONG["other"]) else "plain"


def choose(form: str, *, platform: str, num_tokens: int) -> Attention:
    """The function of a form that `resolve` gave, tuned to the platform."""
    if form == "blockwise" and platform == "cpu":
        return functools.partial(blockwise, block=max(SMALLEST_BLOCK, CPU_SCORES // num_tokens), heads=CPU_HEADS)
    return {"plain": plain, "blockwise": blockwise, "cudnn": cudnn}[form]
