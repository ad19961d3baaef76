"""The arithmetic of cost against the study's table, published counts and closed forms."""

import math

import pytest

from benchmarks import communication
from vitmed import config, cost

WIDTHS = {"Ti": 192, "S": 384, "B": 768}
# GMACs per forward pass as the study's table prints them, by patch size.
TABLE_2D = {
    28: (2, {"Ti": ".011", "S": ".043", "B": ".17"}),
    14: (5, {"Ti": ".027", "S": ".106", "B": ".43"}),
    7: (17, {"Ti": ".092", "S": ".364", "B": "1.45"}),
    4: (50, {"Ti": ".277", "S": "1.09", "B": "4.29"}),
    2: (197, {"Ti": "1.23", "S": "4.54", "B": "17.4"}),
    1: (785, {"Ti": "7.01", "S": "22.3", "B": "78.0"}),
}
TABLE_3D = {
    28: (2, {"Ti": ".011", "S": ".04"}),
    14: (9, {"Ti": ".05", "S": ".19"}),
    7: (65, {"Ti": ".36", "S": "1.42"}),
    4: (344, {"Ti": "2.37", "S": "8.39"}),
    2: (2745, {"Ti": "49.3", "S": "128"}),
    1: (21953, {"Ti": "2337", "S": "4908"}),
}


def vit(image_size, patch_size, *, width, in_channels=3, **more):
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "width": width,
        "depth": 12,
        "mlp_width": 4 * width,
        **more,
    }


def last_digit(text):
    """One unit of the last printed digit."""
    return 10.0 ** -len(text.partition(".")[2])


@pytest.mark.parametrize("patch", TABLE_2D)
def test_the_studys_table_in_2d(patch):
    tokens, row = TABLE_2D[patch]
    assert cost.num_tokens((28, 28), (patch, patch)) == tokens
    for name, printed in row.items():
        gmacs = cost.gmacs_forward(**vit((28, 28), (patch, patch), width=WIDTHS[name]), num_classes=2)
        # The table mixes counts with and without the patch embedding, which moves .1073 to its .106 and .3645 to its .364.
        assert gmacs == pytest.approx(float(printed), abs=1.5 * last_digit(printed)), name


@pytest.mark.parametrize("patch", TABLE_3D)
def test_the_studys_table_in_3d_is_the_blocks_alone(patch):
    tokens, row = TABLE_3D[patch]
    assert cost.num_tokens((28,) * 3, (patch,) * 3) == tokens
    for name, printed in row.items():
        gmacs = cost.gmacs_forward(**vit((28,) * 3, (patch,) * 3, width=WIDTHS[name]), num_classes=0)
        embedding = 28**3 * 3 * WIDTHS[name] / 1e9  # each voxel meets one kernel entry per output, whatever the patch
        digits = len(printed.partition(".")[2])
        assert f"{gmacs - embedding:.{digits}f}".lstrip("0") == printed, name


def test_a_3d_patch_embedding_is_more_than_half_of_the_cost_of_one_patch():
    total = cost.gmacs_forward(**vit((28,) * 3, (28,) * 3, width=192), num_classes=0)
    assert total == pytest.approx(0.0233, abs=5e-5)
    gray = cost.gmacs_forward(**vit((28,) * 3, (28,) * 3, width=192, in_channels=1), num_classes=0)
    assert total - gray == pytest.approx(2 * 28**3 * 192 / 1e9)


@pytest.mark.parametrize(("name", "params", "gmacs"), [("Ti", 5_717_416, 1.3), ("S", 22_050_664, 4.6), ("B", 86_567_656, 17.6)])
def test_published_counts_at_224(name, params, gmacs):
    """Parameters as timm prints them for patch16_224 with 1000 classes; GMACs from the DeiT paper, one digit."""
    size = vit((224, 224), (16, 16), width=WIDTHS[name], num_classes=1000)
    assert cost.num_params(**size) == params
    assert cost.gmacs_forward(**size) == pytest.approx(gmacs, abs=0.051)


def test_params_of_a_small_model_counted_tensor_by_tensor():
    kernel, cls, positions = 2 * 7 * 7 * 1 * 8 + 8, 8, (1 + 14 * 4 * 4) * 8
    block = (8 + 8) + (8 * 24 + 24) + (8 * 8 + 8) + (8 + 8) + (8 * 20 + 20) + (20 * 8 + 8)
    head = 8 * 3 + 3
    sizes = {"image_size": (28, 28, 28), "patch_size": (2, 7, 7), "in_channels": 1, "width": 8, "depth": 2, "mlp_width": 20}
    assert cost.num_params(**sizes, num_classes=3) == kernel + cls + positions + 2 * block + (8 + 8) + head
    with_registers = cost.num_params(**sizes, num_classes=3, num_prefix_tokens=5)
    assert with_registers - cost.num_params(**sizes, num_classes=3) == 2 * 4 * 8  # each is a token and a position


def test_macs_of_a_small_model_product_by_product():
    n, d, m = 5, 8, 20
    block = n * d * 3 * d + n * n * d + n * n * d + n * d * d + n * d * m + n * m * d
    expected = 4 * (14 * 14 * 3) * d + 2 * block + d * 7
    sizes = {"image_size": (28, 28), "patch_size": (14, 14), "in_channels": 3, "width": d, "depth": 2, "mlp_width": m}
    assert cost.gmacs_forward(**sizes, num_classes=7) == pytest.approx(expected / 1e9, rel=1e-12)


def test_patches_of_any_rank():
    assert cost.grid((28, 28, 28), (1, 7, 14)) == (28, 4, 2)
    assert cost.num_patches((28, 28, 28), (1, 7, 14)) == 28 * 4 * 2
    assert cost.num_patches((12,), (3,)) == 4
    assert cost.num_patches([64, 32], [8, 8]) == 32
    assert cost.num_tokens((28, 28), (7, 7), num_prefix_tokens=5) == 21
    assert cost.divisors(28) == [1, 2, 4, 7, 14, 28]


@pytest.mark.parametrize(
    ("image_size", "patch_size", "says"),
    [
        ((28, 28), (5, 7), "5 does not divide the 28 pixels of axis height .* allowed there: 1, 2, 4, 7, 14, 28$"),
        ((28, 30), (7, 7), "axis width .* allowed there: 1, 2, 3, 5, 6, 10, 15, 30$"),
        ((9, 28, 28), (2, 7, 7), "axis depth .* allowed there: 1, 3, 9$"),
        ((28, 28), (56, 56), "56 does not divide"),
        ((28, 28), (0, 7), "0 does not divide"),
        ((28, 28), (-7, 7), "-7 does not divide"),
        ((28, 28), (7, 7, 7), "has 3 entries and image_size .* has 2"),
        ((0, 28), (1, 1), "at least 1"),
        ((), (), "one per axis"),
    ],
)
def test_a_patch_that_does_not_divide_is_refused_with_those_that_do(image_size, patch_size, says):
    for refuses in (cost.grid, cost.num_patches, cost.num_tokens):
        with pytest.raises(config.InputError, match=says):
            refuses(image_size, patch_size)


def as_released(patch):
    """The study's 3D code never resizes its kernel in the plane."""
    return {"image_size": (28,) * 3, "patch_size": (patch,) * 3, "kernel_size": (patch, 16, 16)}


@pytest.mark.parametrize(
    ("patch", "tokens", "seen"), [(28, 1, 0.327), (14, 2, 0.327), (7, 16, 0.675), (4, 112, 1), (2, 686, 1), (1, 4732, 1)]
)
def test_the_tokens_of_the_released_3d_code(patch, tokens, seen):
    """The study's table of what its code computes; the share of voxels that any token sees tells where the kernels lie."""
    assert cost.num_patches(**as_released(patch)) == tokens
    grid = cost.grid(**as_released(patch))
    covered = [{at * patch + k for at in range(n) for k in range(kernel)} for n, kernel in zip(grid, (patch, 16, 16), strict=True)]
    assert all(max(axis) < 28 for axis in covered)
    assert len(covered[0]) * len(covered[1]) * len(covered[2]) / 28**3 == pytest.approx(seen, abs=5e-4)


def test_a_kernel_of_another_size_counts_its_own_pixels():
    sizes = as_released(7) | {"in_channels": 3, "width": 8, "depth": 2, "mlp_width": 20}
    block = (8 + 8) + (8 * 24 + 24) + (8 * 8 + 8) + (8 + 8) + (8 * 20 + 20) + (20 * 8 + 8)
    kernel = 7 * 16 * 16 * 3 * 8 + 8
    assert cost.num_params(**sizes, num_classes=3) == kernel + 8 + 17 * 8 + 2 * block + (8 + 8) + 8 * 3 + 3
    blocks = 2 * (17 * (4 * 8 * 8 + 2 * 8 * 20) + 2 * 17**2 * 8)
    assert cost.gmacs_forward(**sizes, num_classes=3) == pytest.approx((16 * (7 * 16 * 16 * 3) * 8 + blocks + 8 * 3) / 1e9, rel=1e-12)
    more = {**sizes, "num_heads": 2}
    assert cost.activations_per_example(**more) == (28**3 * 3 + 2 * (8 * 17 * 8 + 2 * 17 * 20) + 2 * 17 * 8, 2 * 2 * 17**2, 0)
    linear = 28**3 * 3 + 2 * (8 * 17 * 8 + 2 * 17 * 20) + 2 * 17 * 8
    assert cost.activations_per_example(**more, attention="cudnn") == (linear, 0, 0)
    assert cost.activations_per_example(**more, attention="blockwise") == (linear, 0, 2 * 4 * 17 * 8)
    assert cost.activations_per_example(**more, attention="blockwise", remat="blocks").copies == 4 * 17 * 8
    assert cost.activations_per_example(**more, swiglu=True).linear == linear + 2 * 17 * 20


def test_the_patchs_own_kernel_changes_nothing():
    assert cost.grid((28, 28), (7, 4), (7, 4)) == cost.grid((28, 28), (7, 4))
    assert cost.num_tokens((28, 28), (7, 7), kernel_size=(7, 7)) == 17


@pytest.mark.parametrize(
    ("image_size", "patch_size", "kernel_size", "says"),
    [
        ((28, 28), (7, 7), (16,), r"kernel_size \(16,\) has 1 entries and image_size .* has 2"),
        ((28, 28), (7, 7), (7, 29), "does not fit axis width .* from 1 to 28 there"),
        ((28, 28), (7, 7), (0, 16), "does not fit axis height"),
        ((28, 28), (0, 7), (16, 16), "the patch positive"),
        ((28, 28, 28), (5, 5, 5), (5, 16, 16), "5 does not divide the 28 pixels of axis depth"),
    ],
)
def test_a_kernel_that_does_not_fit_is_refused(image_size, patch_size, kernel_size, says):
    with pytest.raises(config.InputError, match=says):
        cost.grid(image_size, patch_size, kernel_size)


def test_training_memory_by_hand():
    sizes = {"image_size": (28, 28), "patch_size": (14, 14), "in_channels": 1, "width": 8, "depth": 2, "mlp_width": 32}
    n, d, m, heads = 5, 8, 32, 2
    around, block, weights = 28 * 28 + 2 * n * d, 8 * n * d + 2 * n * m, heads * n * n
    made = {remat: cost.activations_per_example(**sizes, num_heads=heads, remat=remat) for remat in ("none", "attention", "blocks")}
    assert made["none"] == (around + 2 * block, 2 * weights, 0)
    assert made["attention"] == (around + 2 * block, weights, 0)
    assert made["blocks"] == (around + 2 * n * d + block, weights, 0)
    params, kept = cost.num_params(**sizes, num_classes=3), sum(made["none"][:2])
    step = {"num_params": params, "activations": made["none"], "block_attention_weights": weights, "num_tokens": n}
    step |= {"width": d, "batch_size": 16, "eval_batch_size": 1}
    assert cost.training_memory(**step).least == 16 * params + 16 * kept * 4
    assert cost.training_memory(**step, num_runs=3).least == 3 * (16 * params + 16 * kept * 4)
    assert cost.training_memory(**step, num_runs=3, mapped=True).least == 3 * 16 * params + 16 * kept * 4
    assert cost.training_memory(**step, bytes_per_activation=2).least == 16 * params + 16 * kept * 2
    assert cost.training_memory(**step, split_bytes=10**6).least == 16 * params + 16 * kept * 4 + 10**6
    few = {**step, "batch_size": 1, "activations": cost.Activations(1, 0)}
    assert cost.training_memory(**few).least == 5 * 4 * params  # gradients, where they are more than activations


# What XLA (jax 0.10.2, CPU) says of the compiled training step with 256 images: arguments, temporaries and the best parameters, in MB.
COMPILED = [
    ("Ti", (28, 28), 28, 3, True, 8, "none", "plain", 579.5),
    ("Ti", (28, 28), 4, 1, True, 8, "none", "plain", 167.7),
    ("Ti", (28, 28), 4, 3, True, 8, "none", "plain", 596.7),
    ("Ti", (28, 28), 4, 3, False, 8, "none", "plain", 556.9),
    ("Ti", (28, 28), 2, 3, True, 8, "none", "plain", 851.4),
    ("Ti", (28, 28), 1, 1, True, 8, "none", "plain", 2027.1),
    ("S", (28, 28), 7, 3, True, 8, "none", "plain", 2138.5),
    ("Ti", (28, 28, 28), 7, 3, True, 8, "none", "plain", 647.6),
    ("Ti", (28, 28, 28), 4, 1, True, 8, "none", "plain", 732.7),
    ("Ti", (28, 28), 4, 1, True, 16, "attention", "plain", 274.5),
    ("Ti", (28, 28), 2, 1, True, 8, "attention", "plain", 418.1),
    ("Ti", (28, 28, 28), 4, 1, True, 4, "attention", "plain", 391.1),
    ("Ti", (28, 28), 4, 1, True, 16, "blocks", "plain", 151.4),
    ("Ti", (28, 28), 2, 1, True, 8, "blocks", "plain", 177.0),
    ("Ti", (28, 28, 28), 4, 1, True, 4, "blocks", "plain", 180.9),
    ("Ti", (28, 28), 2, 3, False, 8, "none", "plain", 1480.9),
    ("Ti", (28, 28), 1, 1, False, 8, "none", "blockwise", 1582.3),
    ("Ti", (28, 28), 2, 1, True, 32, "none", "plain", 1543.0),
    ("S", (28, 28), 2, 1, True, 8, "none", "plain", 1015.4),
    ("S", (28, 28), 2, 1, True, 8, "blocks", "plain", 607.3),
    ("Ti", (28, 28), 1, 1, True, 8, "blocks", "blockwise", 338.0),
]


@pytest.mark.parametrize(("name", "image_size", "patch", "runs", "mapped", "batch_size", "remat", "attention", "megabytes"), COMPILED)
def test_training_memory_against_what_the_compiler_takes(name, image_size, patch, runs, mapped, batch_size, remat, attention, megabytes):
    """Should the model or the compiler change: compile the steps anew, read memory_analysis() and fit the factors of training_memory."""
    sizes = vit(image_size, (patch,) * len(image_size), width=WIDTHS[name])
    tokens, heads = cost.num_tokens(image_size, sizes["patch_size"]), WIDTHS[name] // 64
    estimate = cost.training_memory(
        num_params=cost.num_params(**sizes, num_classes=2),
        activations=cost.activations_per_example(**sizes, num_heads=heads, remat=remat, attention=attention),
        block_attention_weights=0,
        num_tokens=tokens,
        width=WIDTHS[name],
        batch_size=batch_size,
        eval_batch_size=0,
        num_runs=runs,
        mapped=mapped,
        scanned=remat != "none",
        split_bytes=256 * math.prod(image_size),
    )
    assert 0.92 < estimate.likely / 1e6 / megabytes < 1.14
    assert estimate.least / 1e6 < 0.95 * megabytes


def test_the_memory_of_a_prediction_counts_where_it_is_more_than_that_of_a_step():
    step = {
        "num_params": 10,
        "activations": cost.Activations(1, 12),
        "block_attention_weights": 3,
        "num_tokens": 3,
        "width": 5,
        "batch_size": 1,
    }
    small, large = (cost.training_memory(**step, eval_batch_size=size) for size in (1, 100))
    assert large.likely == 16 * 10 + 100 * 4 * (14 * 3 * 5 + 2 * 3)
    assert small.likely < large.likely
    assert small.least == large.least


def test_the_time_of_a_step_grows_with_arithmetic_and_with_parameters():
    step = {"gmacs_forward": 1.0, "num_params": 10**6, "batch_size": 8, "num_runs": 2}
    assert cost.step_seconds(**step) == pytest.approx(3 * 8 * 2 / 50 + 8 * 4 * 1e6 * 2 / 5e9)
    assert cost.step_seconds(**{**step, "num_runs": 4}) == pytest.approx(2 * cost.step_seconds(**step))


def test_the_attention_matrix_is_what_small_patches_cost():
    kept = {p: cost.activations_per_example(**vit((28, 28), (p, p), width=192, num_heads=3)) for p in (4, 1)}
    assert kept[4].attention_weights < 0.05 * sum(kept[4])
    assert kept[1].attention_weights > 0.4 * sum(kept[1])


def test_what_a_step_computes_again():
    assert cost.training_gmacs(linear=2.0, attention=1.0) == 3 * 2 + 3
    assert cost.training_gmacs(linear=2.0, attention=1.0, keeps_weights=False) == 3 * 2 + 3.5
    assert cost.training_gmacs(linear=2.0, attention=1.0, remat="attention") == 3 * 2 + 4
    assert cost.training_gmacs(linear=2.0, attention=1.0, remat="blocks", keeps_weights=False) == 4 * 2 + 4.5


@pytest.mark.parametrize("pooled", [None, 1])
def test_attentions_part_is_what_grows_with_the_square_of_the_tokens(pooled):
    """Doubling the tokens doubles all else, but for the head: 4 a + 2 l - 2 (a + l) = 2 a, and of one query 2 a - 2 a = 0."""
    few, many = (
        cost.gmacs_forward(**vit((size,), (1,), width=192), num_classes=0, num_prefix_tokens=0, num_pooled_tokens=pooled)
        for size in (50, 100)
    )
    blocks = 12 if pooled is None else 11  # the last one's attention of a single query grows as its linear layers do
    expected = cost.attention_gmacs(num_tokens=50, width=192, depth=blocks)
    of_one_query = 0 if pooled is None else 192 * (192 + 8 * 192) / 1e9  # which is there once, however many tokens
    assert many - 2 * few == pytest.approx(2 * expected - of_one_query, rel=1e-9)


def test_attention_at_262145_tokens_by_hand():
    """N^2 = 2^36 + 2^19 + 1 = 68,720,001,025; times 192 channels and two products 26.4 TMAC a block, 12 of them 6.33e14 FLOP."""
    assert cost.num_tokens((64, 64, 64), (1, 1, 1)) == 262_145
    gmacs = cost.attention_gmacs(num_tokens=262_145, width=192, depth=12)
    assert gmacs == pytest.approx(12 * 2 * 192 * 68_720_001_025 / 1e9, rel=1e-12)
    assert 2e9 * gmacs == pytest.approx(6.333e14, rel=1e-4)


def test_bytes_of_collectives_by_hand():
    assert communication.gathered_bytes(100, 4) == 75  # each has a quarter and receives three
    assert communication.summed_bytes(100, 4) == 150
    assert communication.gathered_bytes(100, 1) == communication.summed_bytes(100, 1) == 0


def test_communication_of_a_step_by_hand():
    step = {"num_params": 10**6, "num_tokens": 5, "width": 8, "depth": 3, "batch_size": 16}
    assert communication.communication(**step) == (0, 0, 0)
    assert communication.communication(**step, data=4) == (2 * 3 / 4 * 4e6, 0, 0)
    assert communication.communication(**step, fsdp=4) == (0, 3 * 3 / 4 * 4e6, 0)
    # 5 tokens are filled up to 6; keys and values of a block 2 x 16 x 6 x 8 numbers of 4 bytes, half of them from the other device.
    assert communication.communication(**step, sequence=2) == (2 * 1 / 2 * 4e6, 0, 3 * 2 * 6144 / 2)
    assert communication.communication(**step, sequence=2, recomputed=True).tokens == 3 * 3 * 6144 / 2
    assert communication.communication(**step, sequence=2, bytes_per_activation=2).tokens == 3 * 2 * 3072 / 2
    # Together: a device's part of the parameters is 1e6 bytes, summed over 2 x 2; a batch of 16 / (2 x 4) = 2 images.
    mixed = {"data": 2, "fsdp": 4, "sequence": 2}
    assert communication.communication(**step, **mixed) == (2 * 3 / 4 * 1e6, 3 * 3 / 4 * 4e6, 3 * 2 * 768 / 2)
    assert communication.communication(**step, **mixed, num_runs=3) == tuple(
        3 * part for part in communication.communication(**step, **mixed)
    )
