"""The ViT against plain numpy: patches by an explicit loop, the whole forward pass in float64, its fresh parameters, its size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from scipy import special, stats

from vitmed import config, cost
from vitmed.models import attention, build, layers, vit

# (image, patch): 2D, anisotropic 2D, 3D, anisotropic 3D, and one patch for the whole image.
SHAPES = [((8, 8), (4, 4)), ((6, 8), (3, 2)), ((4, 4, 4), (2, 2, 2)), ((6, 4, 10), (3, 1, 5)), ((6, 6), (6, 6))]
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # a sixth of the time to compile
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
EPSILON = 1e-6  # timm's LayerNorm


def images_of(shape, *, batch=2, channels=3, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *shape, channels)).astype(np.float32)


def micro(patch_size, *, variant="vit_micro", num_classes=5, pooling="cls", **more):
    architecture = build.pooled(build.variant(variant), pooling)
    return build.model(architecture, patch_size=patch_size, num_classes=num_classes, **more)


def initialiser(module, image_size, *, channels=3):
    return lambda: build.initialise(module, jax.random.key(0), image_size=image_size, in_channels=channels)


def made_up(init):
    """Parameters of these shapes none of which is special, so that each of them matters to the result."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), jax.eval_shape(init))


def applied(module, params, images, **more):
    return quick_jit(functools.partial(module.apply, **more))({"params": params}, images)


def patches_by_loop(images, patch_size):
    grid = [size // patch for size, patch in zip(images.shape[1:-1], patch_size, strict=True)]
    cells = [tuple(slice(at * patch, (at + 1) * patch) for at, patch in zip(cell, patch_size, strict=True)) for cell in np.ndindex(*grid)]
    return np.array([[image[cell].reshape(-1) for cell in cells] for image in images])


def normalised(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def gelu(x):
    return x * special.ndtr(x)


def attended(x, p, num_heads):
    D = x.shape[-1]
    d = D // num_heads
    qkv = linear(x, p["qkv"])
    heads = []
    for h in range(num_heads):
        q, k, v = (qkv[..., part * D + h * d : part * D + (h + 1) * d] for part in range(3))
        heads.append(special.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(d), axis=-1) @ v)
    return linear(np.concatenate(heads, axis=-1), p["proj"])


def forward_in_numpy(params, images, *, patch_size, num_heads, pooling):
    """timm's VisionTransformer, straight from its description, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = linear(patches_by_loop(images.astype(np.float64), patch_size), p["patch_embed"])
    x = np.concatenate([np.tile(p["cls_token"], (len(x), 1, 1)), x], axis=1) + p["pos_embed"]
    for name in sorted(name for name in p if name.startswith("block")):
        b = p[name]
        x = x + attended(normalised(x, b["norm1"]), b["attn"], num_heads)
        x = x + linear(gelu(linear(normalised(x, b["norm2"]), b["mlp"]["fc1"])), b["mlp"]["fc2"])
    x = normalised(x, p["norm"])
    features = x[:, 0] if pooling == "cls" else x[:, 1:].mean(axis=1)
    return features, linear(features, p["head"])


@pytest.mark.parametrize(("image_size", "patch_size"), [*SHAPES, ((12,), (3,))])
def test_patchify_is_the_explicit_loop(image_size, patch_size):
    images = images_of(image_size)
    patches = vit.patchify(jnp.asarray(images), patch_size)
    np.testing.assert_array_equal(patches, patches_by_loop(images, patch_size))


@pytest.mark.parametrize(("image_size", "patch_size"), SHAPES)
def test_patch_embedding_is_a_convolution_whose_stride_is_its_kernel(image_size, patch_size):
    images, width = images_of(image_size), 7
    module = vit.PatchEmbed(patch_size, width)
    params = module.init(jax.random.key(0), images)["params"]
    letters = "DHW"[-len(image_size) :]
    convolved = jax.lax.conv_general_dilated(
        jnp.asarray(images),
        params["kernel"].reshape(*patch_size, 3, width),
        window_strides=patch_size,
        padding="VALID",
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    )
    expected = convolved.reshape(len(images), -1, width) + params["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, images), expected, atol=1e-5)


# (image, patch, kernel, grid): overlapping, leaving pixels out, both, one axis as usual, a stride that divides nothing.
KERNELS = [
    ((9, 8), (2, 3), (5, 4), (3, 2)),
    ((9, 8), (4, 5), (1, 3), (3, 2)),
    ((9, 8), (4, 3), (2, 6), (2, 1)),
    ((6, 7, 9), (2, 4, 2), (2, 5, 3), (3, 1, 4)),
    ((6, 5, 9), (7, 2, 9), (3, 4, 2), (1, 1, 1)),
]


@pytest.mark.parametrize(("image_size", "patch_size", "kernel_size", "grid"), KERNELS)
def test_a_kernel_of_another_size_than_its_stride_is_the_explicit_loop(image_size, patch_size, kernel_size, grid):
    images, width = images_of(image_size), 7
    module = vit.PatchEmbed(patch_size, width, kernel_size=kernel_size)
    params = made_up(lambda: module.init(jax.random.key(0), images)["params"])
    corners = [[at * patch for at, patch in zip(cell, patch_size, strict=True)] for cell in np.ndindex(*grid)]
    windows = [tuple(slice(first, first + k) for first, k in zip(corner, kernel_size, strict=True)) for corner in corners]
    patches = np.array([[image[window].reshape(-1) for window in windows] for image in images.astype(np.float64)])
    got = module.apply({"params": params}, images)
    assert got.shape == (2, len(windows), width)
    np.testing.assert_allclose(got, linear(patches, params), atol=1e-4)
    assert cost.grid(image_size, patch_size, kernel_size) == grid


def test_a_kernel_of_the_patchs_size_is_the_patch_embedding_as_it_was():
    images, usual = images_of((6, 4)), vit.PatchEmbed((3, 2), 7)
    same = vit.PatchEmbed((3, 2), 7, kernel_size=(3, 2))
    params = usual.init(jax.random.key(0), images)
    jax.tree.map(np.testing.assert_array_equal, params, same.init(jax.random.key(0), images))
    traced = [str(jax.make_jaxpr(module.apply)(params, images)) for module in (usual, same)]
    assert traced[0] == traced[1]
    assert "conv_general_dilated" not in traced[0]


def test_a_kernel_larger_than_the_image_is_refused():
    for image_size in ((8, 4), (8, 8, 8)):
        with pytest.raises(ValueError, match="cannot be cut by kernels"):
            micro((2, 2), kernel_size=(5, 5)).init(jax.random.key(0), images_of(image_size))


def test_a_whole_model_with_overlapping_kernels_in_bfloat16_and_float32():
    images, exact, rough = (
        images_of((10, 8)),
        micro((4, 2), kernel_size=(6, 4)),
        micro((4, 2), kernel_size=(6, 4), dtype="bfloat16"),
    )
    params = made_up(initialiser(exact, (10, 8)))
    assert params["pos_embed"].shape == (1 + 2 * 3, 48)
    logits = applied(exact, params, images)
    assert 0 < np.abs(applied(rough, params, images) - logits).max() < 0.1 * np.abs(logits).max()


@pytest.mark.parametrize(("image_size", "patch_size"), [((8, 8), (3, 4)), ((8, 8), (4, 4, 4)), ((8, 8, 8), (4, 4))])
def test_an_image_that_cannot_be_cut_is_refused(image_size, patch_size):
    with pytest.raises(ValueError, match="cannot be cut"):
        micro(patch_size).init(jax.random.key(0), images_of(image_size))


def test_an_image_of_another_size_than_the_positions_is_refused():
    module = micro((4, 4))
    params = made_up(initialiser(module, (8, 8)))
    with pytest.raises(Exception, match="pos_embed"):
        module.apply({"params": params}, images_of((8, 12)))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(("image_size", "patch_size"), [SHAPES[1], SHAPES[3]])
def test_the_whole_forward_pass_agrees_with_numpy_in_float64(image_size, patch_size, pooling):
    module = micro(patch_size, pooling=pooling)
    params = made_up(initialiser(module, image_size))
    images = images_of(image_size)
    features, logits = forward_in_numpy(params, images, patch_size=patch_size, num_heads=3, pooling=pooling)
    got = applied(module, params, images)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, logits, rtol=1e-5, atol=1e-5 * np.abs(logits).max())
    headless = micro(patch_size, pooling=pooling, num_classes=None)
    without_head = {name: value for name, value in params.items() if name != "head"}
    np.testing.assert_allclose(applied(headless, without_head, images), features, rtol=1e-5, atol=1e-5)
    assert "head" not in jax.eval_shape(initialiser(headless, image_size))


def test_layer_norm_has_timms_epsilon():
    norm = layers.LayerNorm()
    x = np.random.default_rng(0).normal(size=(4, 64))
    for tokens in (x * 1e-3, x + 10):  # a variance as small as epsilon; a mean ten times the deviation, where one pass still suffices
        tokens = tokens.astype(np.float32)
        params = norm.init(jax.random.key(0), tokens)
        expected = normalised(tokens.astype(np.float64), {"scale": 1.0, "bias": 0.0})
        np.testing.assert_allclose(norm.apply(params, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_written_derivative_of_layer_norm_is_that_of_the_plain_formula(dtype):
    rng, dtype = np.random.default_rng(0), jnp.dtype(dtype)
    # Of the rows one is nearly constant: there epsilon counts.
    x = jnp.asarray(rng.normal(size=(2, 3, 24)) * np.array([1e-3, 1, 30])[:, None] + np.array([0, 2, 2])[:, None], dtype)
    scale, bias, wanted = (rng.normal(size=size).astype(np.float32) for size in (24, 24, x.shape))

    def plain(x, scale, bias):
        x = x.astype(jnp.float32)
        deviation = x - x.mean(axis=-1, keepdims=True)
        return deviation / jnp.sqrt(jnp.square(deviation).mean(axis=-1, keepdims=True) + EPSILON) * scale + bias

    def gradients(of):
        found = jax.grad(lambda *arguments: (of(*arguments).astype(jnp.float32) * wanted).sum(), argnums=(0, 1, 2))(x, scale, bias)
        assert [part.dtype for part in found] == [dtype, jnp.float32, jnp.float32]
        return [np.asarray(part, np.float32) for part in found]

    assert layers.normalise(x, scale, bias, dtype).dtype == dtype
    rounding = 1e-5 if dtype == jnp.float32 else 1e-2
    for ours, theirs in zip(gradients(lambda *arguments: layers.normalise(*arguments, dtype)), gradients(plain), strict=True):
        assert (np.abs(ours - theirs) <= rounding * np.abs(theirs).max(axis=-1, keepdims=True)).all()


def test_a_variance_that_rounding_made_zero_is_fixed_to_its_derivative():
    x = (1000.0 + np.arange(64)[:, None] + np.linspace(-0.05, 0.05, 24)).astype(np.float32)
    weights, unit = jnp.arange(24.0), (jnp.ones(24), jnp.zeros(24))
    normed, back = jax.vjp(lambda x: layers.normalise(x, *unit, jnp.float32), x)
    zero = np.abs(normed).max(axis=-1) > 40  # the deviation times epsilon ** -.5; of a variance that was found, 1.7 at most
    assert zero.any()
    gradient = np.asarray(back(jnp.broadcast_to(weights, x.shape))[0])[zero]
    np.testing.assert_allclose(gradient, np.broadcast_to((weights - weights.mean()) * EPSILON**-0.5, gradient.shape), rtol=1e-5)


def test_the_written_derivative_of_gelu_is_that_of_the_plain_formula():
    x = jnp.linspace(-9, 9, 1001)
    plain = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    np.testing.assert_allclose(jax.vmap(jax.grad(layers.gelu))(x), plain, atol=2e-7)
    curvature = jax.vmap(jax.grad(jax.grad(layers.gelu)))(x)  # derivatives of any order can be taken
    np.testing.assert_allclose(curvature, (2 - x**2) * jnp.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), atol=1e-6)


@pytest.mark.parametrize("sizes", [(2, 3, 4, 9), (5, 7, 32, 2)], ids=["x is the smaller", "its gradient is"])
def test_the_written_derivative_of_a_product_is_that_of_the_plain_one(sizes):
    *rows, width, features = sizes
    rng = np.random.default_rng(0)
    x, kernel, wanted = (rng.normal(size=size).astype(np.float32) for size in ((*rows, width), (width, features), (*rows, features)))

    def gradients(of):
        return jax.grad(lambda x, kernel: (of(x, kernel) * wanted).sum(), argnums=(0, 1))(x, kernel)

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), gradients(layers.product), gradients(jnp.matmul))
    np.testing.assert_allclose(layers.product(x, kernel), x @ kernel, rtol=1e-5, atol=1e-5)


def test_gelu_is_the_exact_one():
    tokens = np.random.default_rng(0).normal(size=(1, 8, 16)).astype(np.float32) * 2
    module = layers.MLP(hidden=32)
    params = made_up(lambda: module.init(jax.random.key(0), tokens)["params"])
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = linear(gelu(linear(tokens.astype(np.float64), p["fc1"])), p["fc2"])  # the tanh form is off by 5e-4 here
    np.testing.assert_allclose(module.apply({"params": params}, tokens), expected, atol=2e-5)


def test_2d_is_3d_of_depth_one():
    sizes, images = build.plain(12, 1, 3), images_of((14, 8))

    def both(pooling):
        pooled = build.pooled(sizes, pooling)
        return [build.model(pooled, patch_size=patch_size, num_classes=5) for patch_size in ((7, 4), (1, 7, 4))]

    flat, deep = both("cls")
    params, same = quick_jit(initialiser(flat, (14, 8)))(), quick_jit(initialiser(deep, (1, 14, 8)))()
    jax.tree.map(np.testing.assert_array_equal, params, same)  # also refuses another tree
    for flat, deep in map(both, ["cls", "mean"]):
        np.testing.assert_allclose(applied(deep, params, images[:, None]), applied(flat, params, images), atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "image_size", "patch_size", "kernel_size", "channels", "num_classes"),
    [
        ("vit_micro", (28, 28), (7, 7), None, 1, 2),
        ("vit_micro", (8, 28, 28), (2, 7, 4), None, 3, 11),
        ("vit_micro", (28, 28, 28), (4, 4, 4), (4, 16, 16), 3, 3),
        ("vit_micro", (28, 28), (28, 5), (16, 16), 1, 3),
        ("vit_mini", (28, 28), (28, 28), None, 3, 14),
        ("vit_ti", (28, 28), (4, 4), None, 3, 9),
        ("vit_ti", (28, 28, 28), (14, 14, 14), None, 3, 0),
        ("vit_s", (64, 64), (16, 8), None, 3, 5),
        ("vit_l", (28, 28), (14, 14), None, 3, 2),
    ],
)
def test_parameters_and_multiplications_are_those_of_cost(variant, image_size, patch_size, kernel_size, channels, num_classes):
    sizes = build.variant(variant)
    module = build.model(sizes, patch_size=patch_size, kernel_size=kernel_size, num_classes=num_classes or None)
    shapes = jax.eval_shape(initialiser(module, image_size, channels=channels))
    shape = {"image_size": image_size, "patch_size": patch_size, "in_channels": channels, "num_classes": num_classes}
    shape |= {"kernel_size": kernel_size, "width": sizes.width, "depth": sizes.depth, "mlp_width": sizes.mlp_width}
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == cost.num_params(**shape)
    image = jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32)
    for pooling, num_pooled_tokens in (("cls", 1), ("mean", None)):
        pooled = module.clone(pooling=pooling)
        traced = jax.make_jaxpr(lambda params, image, pooled=pooled: pooled.apply({"params": params}, image))(shapes, image)
        gmacs = cost.gmacs_forward(**shape, num_pooled_tokens=num_pooled_tokens)
        assert products(traced.jaxpr) / 1e9 == pytest.approx(gmacs, rel=1e-12)


def products(jaxpr):
    """The multiply-accumulates of products and convolutions in a traced program: the entries of the result times what each sums over."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval  # [*K, C, D], each of whose last sums over all others
            total += equation.outvars[0].aval.size * int(np.prod(kernel.shape[:-1]))
        total += sum(products(getattr(inner, "jaxpr", inner)) for inner in core.jaxprs_in_params(equation.params))
    return total


def test_fresh_parameters_are_distributed_as_timms():
    module = build.model(build.plain(512, 2, 4), patch_size=(4, 4), num_classes=40)
    params = quick_jit(initialiser(module, (16, 16)))()
    blocks = [params["block_00"], params["block_01"]]
    dense = [part for block in blocks for part in (block["attn"]["qkv"], block["attn"]["proj"], block["mlp"]["fc1"], block["mlp"]["fc2"])]
    for part in (*dense, params["head"]):
        values = np.asarray(part["kernel"], np.float64).ravel()
        assert values.std() == pytest.approx(0.02, rel=0.03)
        assert abs(values.mean()) < 5 * 0.02 / np.sqrt(values.size)
        assert abs(stats.kurtosis(values)) < 5 * np.sqrt(24 / values.size)  # normal: uniform has -1.2, cut at two sigma -.63
        assert not np.any(part["bias"])
    assert not np.array_equal(dense[0]["kernel"], dense[4]["kernel"])  # blocks are drawn independently
    fan_in = 4 * 4 * 3
    for name in ("kernel", "bias"):
        values = np.asarray(params["patch_embed"][name]).ravel() * np.sqrt(fan_in)
        assert stats.kstest(values, stats.uniform(-1, 2).cdf).pvalue > 1e-3, name
    assert np.std(params["cls_token"]) == pytest.approx(1e-6, rel=0.15)
    assert np.std(params["pos_embed"]) == pytest.approx(0.02, rel=0.05)
    for norm in (params["norm"], *(block[name] for block in blocks for name in ("norm1", "norm2"))):
        assert np.all(norm["scale"] == 1)
        assert not np.any(norm["bias"])


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters_and_logits():
    module = micro((4, 4), dtype="bfloat16")
    shapes = jax.eval_shape(initialiser(module, (8, 8)))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    params, images = made_up(initialiser(module, (8, 8))), images_of((8, 8))
    logits, kept = applied(module, params, images, capture_intermediates=True)
    exact = applied(micro((4, 4)), params, images)
    computed = {
        name: value["__call__"][0].dtype for name, value in kept["intermediates"].items() if name.startswith(("block", "patch", "norm"))
    }
    assert set(computed.values()) == {jnp.dtype("bfloat16")}, computed
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


def test_drop_path_drops_whole_examples_and_keeps_the_mean_and_every_branch_draws_its_own():
    rates, B = [0.0, 0.2, 0.6], 4000
    factors = np.asarray(layers.drop_path_factors(jax.random.key(0), rates, B))
    assert factors.shape == (3, 2, B)
    for rate, block in zip(rates, factors, strict=True):
        for branch in block:
            dropped = branch == 0
            np.testing.assert_allclose(branch[~dropped], 1 / (1 - rate), rtol=1e-6)
            assert abs(dropped.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / B)
    acting = factors[1:].reshape(4, B) == 0
    assert np.abs(np.corrcoef(acting)[np.triu_indices(4, 1)]).max() < 5 / np.sqrt(B)
    assert not np.array_equal(factors, layers.drop_path_factors(jax.random.key(1), rates, B))


def test_a_dropped_branch_adds_nothing_and_a_kept_one_is_rescaled():
    block = layers.Block(2, 8, attention.plain)
    tokens = images_of((4,), channels=6, batch=3)
    params = made_up(lambda: block.init(jax.random.key(0), tokens)["params"])
    factors = jnp.asarray([[0.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
    out = np.asarray(block.apply({"params": params}, tokens, factors))
    np.testing.assert_allclose(block.apply({"params": params}, tokens, factors, 2), out[:, :2], rtol=1e-6)
    np.testing.assert_array_equal(out[0], tokens[0])
    np.testing.assert_allclose(out[2], block.apply({"params": params}, tokens)[2], rtol=1e-6)
    alone = jax.tree.map(jnp.zeros_like, params["attn"]["proj"])  # attention that adds nothing
    mlp = block.apply({"params": params | {"attn": params["attn"] | {"proj": alone}}}, tokens)[1] - tokens[1]
    np.testing.assert_allclose(out[1], tokens[1] + 2 * mlp, rtol=1e-5)


def test_drop_path_rises_linearly_over_depth_in_training_only(monkeypatch):
    module = build.model(build.plain(4, 4, 1), patch_size=(2, 2), num_classes=2, drop_path=0.6)
    images, params = images_of((2, 2), batch=8), made_up(initialiser(module, (2, 2)))
    asked, real = [], layers.drop_path_factors
    monkeypatch.setattr(layers, "drop_path_factors", lambda key, rates, batch: asked.append((rates, batch)) or real(key, rates, batch))
    trained = [module.apply({"params": params}, images, train=True, rngs={"drop_path": jax.random.key(seed)}) for seed in (0, 1)]
    np.testing.assert_allclose([rates for rates, _ in asked], [[0.0, 0.2, 0.4, 0.6]] * 2)
    assert [batch for _, batch in asked] == [8, 8]
    assert not np.allclose(*trained)
    assert not np.allclose(trained[0], applied(module, params, images))
    assert len(asked) == 2


SCANS = [{"scanned": True}, {"remat": "attention"}, {"remat": "blocks"}]


@pytest.mark.parametrize("scan", SCANS, ids=["scanned", "attention", "blocks"])
def test_scanning_and_recomputing_change_neither_logits_nor_gradients_nor_names(scan):
    sizes = build.Architecture(12, 3, 2, 8, swiglu=True, layer_scale=True)
    make = functools.partial(build.model, sizes, patch_size=(4, 4), num_classes=3, drop_path=0.3)
    unrolled, looped = make(), make(**scan)
    images, params = images_of((8, 8)), made_up(initialiser(unrolled, (8, 8)))
    jax.tree.map(np.testing.assert_array_equal, made_up(initialiser(looped, (8, 8))), params)

    def loss(module, params):
        logits = module.apply({"params": params}, images, train=True, rngs={"drop_path": jax.random.key(3)})
        return jnp.sum(logits**2), logits

    (_, expected), gradient = jax.value_and_grad(loss, 1, has_aux=True)(unrolled, params)
    (_, logits), looped_gradient = jax.value_and_grad(loss, 1, has_aux=True)(looped, params)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), looped_gradient, gradient)


def test_what_is_computed_again_is_not_kept():
    images = images_of((32, 32))

    def temporary_bytes(**scan):
        module = build.model(build.plain(24, 6, 3), patch_size=(2, 2), num_classes=2, **scan)
        params = jax.eval_shape(initialiser(module, (32, 32)))
        gradient = jax.jit(jax.grad(lambda params: module.apply({"params": params}, images).sum()))
        return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes

    nothing, attention_again, blocks_again = (temporary_bytes(**scan) for scan in SCANS)
    weights = len(images) * 3 * 257**2 * 4  # of one block, in bytes
    assert nothing - attention_again > 0.9 * 5 * weights  # all but one block's
    assert blocks_again < 0.9 * attention_again


def test_an_unknown_variant_is_named_with_those_that_exist():
    with pytest.raises(config.InputError, match=r"vit_huge.*vit_ti, vit_s"):
        build.variant("vit_huge")
