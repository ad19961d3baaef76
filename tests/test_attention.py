"""Forms of attention against plain attention, forward and backward; and what `auto` takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitmed import config, experiment
from vitmed.models import attention


def qkv(*, queries=50, keys=50, dtype=jnp.float32):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, n, 3, 16), dtype) for i, n in enumerate((queries, keys, keys)))
    return 3 * q, k, v  # far from uniform weights


def value_and_gradients(function, arrays):
    weights = jax.random.normal(jax.random.key(9), arrays[0].shape)

    def loss(q, k, v):
        return (function(q, k, v).astype(jnp.float32) * weights).sum()

    return function(*arrays), jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)


@pytest.mark.parametrize("queries", [50, 1])
def test_plain_is_the_librarys_attention_forward_and_backward(queries):
    arrays = qkv(queries=queries)
    ours, theirs = (value_and_gradients(function, arrays) for function in (attention.plain, jax.nn.dot_product_attention))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-5), ours, theirs)


def test_gradients_of_plain_in_bfloat16_are_those_in_float32_as_far_as_it_tells_numbers_apart():
    arrays = qkv(dtype=jnp.bfloat16)
    _, exact = value_and_gradients(attention.plain, [part.astype(jnp.float32) for part in arrays])
    _, rounded = value_and_gradients(attention.plain, arrays)
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.02 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("heads", [1, 4, 8, None])  # of six
@pytest.mark.parametrize(("queries", "block"), [(50, 64), (50, 25), (50, 16), (50, 1), (1, 16)])  # one, even, uneven, rows, a pool's query
def test_blockwise_is_plain_attention_forward_and_backward(queries, block, heads):
    arrays = qkv(queries=queries)
    ours = value_and_gradients(functools.partial(attention.blockwise, block=block, heads=heads), arrays)
    theirs = value_and_gradients(attention.plain, arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-5), ours, theirs)


def test_blockwise_in_bfloat16_is_as_exact_as_plain():
    arrays = qkv(dtype=jnp.bfloat16)
    exact = value_and_gradients(attention.plain, [part.astype(jnp.float32) for part in arrays])
    for form in (attention.plain, *(functools.partial(attention.blockwise, block=16, heads=heads) for heads in (4, None))):
        found = value_and_gradients(form, arrays)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
            assert ours.dtype == jnp.bfloat16
            np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.02 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("heads", [1, None])
def test_the_memory_of_blockwise_grows_with_tokens_and_not_with_their_square(heads):
    def memory(form, tokens):
        shape = jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.float32)
        gradient = jax.jit(jax.grad(lambda q, k, v: form(q, k, v).sum(), (0, 1, 2)))
        return gradient.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    blockwise = functools.partial(attention.blockwise, block=64, heads=heads)
    assert memory(blockwise, 8192) < 4.2 * memory(blockwise, 2048)
    assert memory(attention.plain, 8192) > 8 * memory(attention.plain, 2048)
    assert memory(blockwise, 8192) < memory(attention.plain, 8192) / 50


def test_few_heads_at_a_time_take_less_memory():
    def memory(heads):
        shape = jax.ShapeDtypeStruct((4, 512, 8, 16), jnp.float32)
        form = functools.partial(attention.blockwise, block=512, heads=heads)
        gradient = jax.jit(jax.grad(lambda q, k, v: form(q, k, v).sum(), (0, 1, 2)))
        return gradient.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    scores = 512 * 512 * 4  # bytes of one head
    assert memory(None) > 32 * scores
    assert memory(4) < 24 * scores


@pytest.mark.parametrize(
    ("platform", "dtype", "tokens", "width", "form"),
    [
        ("cpu", "float32", 50, 64, "plain"),
        ("cpu", "float32", 785, 64, "blockwise"),
        ("cpu", "bfloat16", 785, 64, "blockwise"),
        ("gpu", "float32", 785, 64, "plain"),
        ("gpu", "float32", 21953, 64, "blockwise"),
        ("gpu", "bfloat16", 50, 64, "cudnn"),
        ("gpu", "bfloat16", 50, 12, "plain"),  # vit_micro's heads
        ("tpu", "bfloat16", 21953, 64, "blockwise"),
    ],
)
def test_auto_takes_a_form_by_device_dtype_and_length(platform, dtype, tokens, width, form):
    assert attention.resolve("auto", platform=platform, dtype=dtype, num_tokens=tokens, head_width=width) == form
    assert attention.resolve("plain", platform=platform, dtype=dtype, num_tokens=tokens, head_width=width) == "plain"


@pytest.mark.parametrize(("platform", "dtype", "width"), [("cpu", "bfloat16", 64), ("gpu", "float32", 64), ("gpu", "bfloat16", 12)])
def test_cudnn_is_refused_where_it_cannot_be(platform, dtype, width):
    with pytest.raises(config.InputError, match=f"cudnn.*{platform}, {dtype}, heads of {width}; take auto"):
        attention.resolve("cudnn", platform=platform, dtype=dtype, num_tokens=50, head_width=width)


def test_a_config_decides_how_attention_is_computed():
    cfg = config.load("configs/vit2d.py:variant=vit_micro,patch=7", {"model.attention": "blockwise"})
    for arguments, form in (({}, "blockwise"), ({"model.attention": "plain"}, "plain"), ({"model.attention": "auto"}, "plain")):
        for field, value in arguments.items():
            config.override(cfg, field, value)
        assert experiment.plan(cfg).attention_form("cpu") == form
    config.override(cfg, "model.attention", "flash")
    with pytest.raises(config.InputError, match=r"model\.attention=flash"):
        experiment.plan(cfg)


@pytest.mark.parametrize(("batch_size", "num_keys", "expected"), [(8, 344, 512), (8, 21953, 509), (64, 21953, 64), (512, 262145, 64)])
def test_an_accelerator_takes_as_many_queries_at_a_time_as_a_gigabyte_of_scores_allows(batch_size, num_keys, expected):
    assert attention.block_size(batch_size=batch_size, num_heads=3, num_keys=num_keys) == expected
