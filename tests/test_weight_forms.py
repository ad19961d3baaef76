"""Every form of ViT and every naming that weights come in, against what timm and transformers compute (tests/golden)."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from vitmed import config, models
from vitmed.models import weights

GOLDEN = pathlib.Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import made_up  # noqa: E402

FORMS = json.loads((GOLDEN / "timm_forms.json").read_text())


def write(folder, shapes, *, name="weights", **changed):
    """A file of made-up weights of these shapes, some of them changed; None takes a tensor away."""
    tensors = {key: value for key, value in (made_up.state(shapes) | changed).items() if value is not None}
    path = folder / f"{name}.{'npz' if 'embedding/kernel' in shapes else 'safetensors'}"
    np.savez(path, **tensors) if path.suffix == ".npz" else safetensors.numpy.save_file(tensors, path)
    return str(path)


def loaded(file, *, patch_size=(4, 4), image_size=(12, 12), **more):
    return models.from_pretrained(file, image_size=image_size, patch_size=patch_size, num_heads=2, **more)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_gives_what_its_makers_code_gives(tmp_path, form):
    module, params = loaded(write(tmp_path, FORMS[form]["shapes"]))
    ours, theirs = jax.jit(module.apply)({"params": params}, made_up.images()), np.array(FORMS[form]["outputs"])
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("deit", {"pooling": "cls", "final_norm": True, "layer_scale": False, "prefix_positions": True}),
        ("deit3", {"pooling": "cls", "layer_scale": True, "prefix_positions": False}),
        ("dinov2_reg", {"num_registers": 4, "prefix_positions": False, "layer_scale": True}),
        ("facebook_dinov2_reg", {"num_registers": 4, "prefix_positions": False}),
        ("hf_dinov2_swiglu", {"swiglu": True, "mlp_width": 48}),
        ("mae", {"pooling": "mean", "final_norm": False, "fc_norm": True}),
        ("gap_reg", {"pooling": "mean", "class_token": False, "num_registers": 4, "final_norm": True}),
        ("map_cls", {"pooling": "map", "class_token": True}),
        ("distilled", {"pooling": "distilled", "num_registers": 1, "prefix_positions": True}),
    ],
)
def test_the_architecture_is_read_from_the_tensors(tmp_path, form, expected):
    described = weights.describe(write(tmp_path, FORMS[form]["shapes"]), num_heads=2)
    assert {name: getattr(described.architecture, name) for name in expected} == expected
    assert (described.architecture.width, described.architecture.depth, described.grid) == (16, 2, (3, 3))


def test_a_file_of_googles_tells_its_heads(tmp_path):
    file = write(tmp_path, FORMS["google_npz"]["shapes"])
    assert weights.describe(file).architecture.num_heads == 2
    with pytest.raises(config.InputError, match="2 heads, not the 4 that were asked for"):
        weights.describe(file, num_heads=4)


def test_the_heads_default_to_width_over_64(tmp_path):
    shapes = {name: [64 * n // 16 if n in (16, 48, 64) else n for n in shape] for name, shape in FORMS["dinov2"]["shapes"].items()}
    assert weights.describe(write(tmp_path, shapes)).architecture.num_heads == 1
    with pytest.raises(config.InputError, match="give num_heads, a divisor of the width"):
        weights.describe(write(tmp_path, FORMS["dinov2"]["shapes"]))


@pytest.mark.parametrize("form", ["deit", "distilled", "map", "hf_deit"])
def test_a_fresh_classifier_is_zero_and_the_old_one_is_reported(tmp_path, capsys, form):
    module, params = loaded(write(tmp_path, FORMS[form]["shapes"]), num_classes=7)
    assert module.num_classes == 7
    assert params["head"]["kernel"].shape == (16, 7)
    logits = jax.jit(module.apply)({"params": params}, made_up.images())
    assert not np.any(logits)
    said = capsys.readouterr().err
    assert "fresh: head." in said
    assert "ignored: head (2)" in said


def test_what_was_not_used_is_said(tmp_path, capsys):
    loaded(write(tmp_path, FORMS["hf_mae"]["shapes"]), patch_size=(2, 6))
    said = capsys.readouterr().err
    assert "resized: patch_embed 4x4 -> 2x6, pos_embed 3x3 -> 6x2" in said
    assert "decoder (" in said
    loaded(write(tmp_path, FORMS["deit"]["shapes"]), patch_size=(3, 4, 4), image_size=(12, 12, 12))
    assert "inflated: patch_embed (average), pos_embed (copy)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "changed", "says"),
    [
        ("deit", {"blocks.1.attn.proj.weight": None}, "lacks blocks.1.attn.proj.weight; only the classifier may be missing"),
        ("deit", {"norm.bias": None}, "lacks norm.bias"),
        ("deit", {"blocks.0.attn.q_norm.weight": np.ones(8, "f")}, "blocks.0.attn.q_norm.weight has no place"),
        ("deit", {"norm_pre.weight": np.ones(16, "f")}, "norm_pre.weight has no place"),
        ("deit", {"blocks.0.norm1.bias": np.ones(17, "f")}, "blocks.0.norm1.bias has shape [17]; expected [16]"),
        ("deit", {"blocks.0.norm1.bias": np.ones((16, 1), "f")}, "blocks.0.norm1.bias has shape [16, 1]"),
        ("deit", {"patch_embed.proj.weight": np.ones((16, 48), "f")}, "patch_embed.proj.weight has shape [16, 48]; expected [width"),
        ("deit", {"pos_embed": np.ones((1, 9 + 3, 16), "f")}, "12 positions, which with 1 prefix tokens make no grid"),
        ("deit", {"pos_embed": np.ones((10, 16), "f")}, "pos_embed has shape [10, 16]; expected [1, tokens, 16]"),
        ("deit", {"cls_token": np.ones((16,), "f")}, "cls_token has shape [16]"),
        ("deit", {"blocks.0.mlp.fc1.weight": np.ones((65, 16), "f")}, "do not fit together"),
        ("deit", {"norm.weight": np.full(16, np.nan, "f")}, "norm.weight holds NaN or infinite values"),
        ("deit", {"blocks.1.mlp.fc2.bias": np.full(16, np.inf, "f")}, "blocks.1.mlp.fc2.bias holds NaN or infinite values"),
        ("hf_vit", {"vit.encoder.layer.0.attention.attention.key.weight": None}, "lacks blocks.0.attn.qkv.weight"),
        ("google_npz", {"Transformer/encoderblock_1/LayerNorm_2/bias": None}, "lacks blocks.1.norm2.bias"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, form, changed, says):
    with pytest.raises(config.InputError) as caught:
        loaded(write(tmp_path, FORMS[form]["shapes"], **changed))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_architecture_is_refused_by_what_it_lacks(tmp_path):
    resnet = {"conv1.weight": [64, 3, 7, 7], "bn1.weight": [64], "layer1.0.conv1.weight": [64, 64, 1, 1], "fc.weight": [10, 64]}
    with pytest.raises(
        config.InputError, match=r"no Vision Transformer .* lacks patch_embed.proj.weight and holds bn1.weight, conv1.weight"
    ):
        loaded(write(tmp_path, resnet))


@pytest.mark.parametrize(
    ("form", "pooling", "says"),
    [
        ("gap", "cls", "no CLS token"),
        ("deit", "map", "only weights that have it"),
        ("deit", "max", "did you mean map"),
    ],
)
def test_a_pooling_that_the_weights_do_not_allow(tmp_path, form, pooling, says):
    with pytest.raises(config.InputError, match=says):
        loaded(write(tmp_path, FORMS[form]["shapes"]), pooling=pooling)


@pytest.mark.parametrize(("form", "pooling"), [("deit", "mean"), ("mae", "cls"), ("map_cls", "cls"), ("distilled", "mean")])
def test_another_pooling_of_the_same_tokens(tmp_path, form, pooling):
    module, params = loaded(write(tmp_path, FORMS[form]["shapes"]), pooling=pooling, num_classes=2)
    assert module.pooling == pooling
    features = module.clone(num_classes=None)
    params = {name: leaf for name, leaf in params.items() if not name.startswith("head")}
    assert np.isfinite(jax.jit(features.apply)({"params": params}, made_up.images())).all()


MEASURED = """
import os, resource, sys
import jax
from vitmed import models
file = sys.argv[1]
jax.block_until_ready(jax.numpy.zeros(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
models.from_pretrained(file, image_size=(28, 28), patch_size=(7, 7), num_heads=2)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / os.path.getsize(file))
"""


def test_loading_takes_less_than_two_and_a_half_times_the_file(tmp_path):
    shapes = {name: [1024 * n // 16 if n in (16, 48, 64) else n for n in shape] for name, shape in FORMS["deit"]["shapes"].items()}
    file = write(tmp_path, shapes)
    assert pathlib.Path(file).stat().st_size > 90e6
    done = subprocess.run([sys.executable, "-c", MEASURED, file], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 2.5


def test_no_classes_are_features(tmp_path):
    form = next(iter(FORMS))
    file = write(tmp_path, FORMS[form]["shapes"])
    module, params = loaded(file, num_classes=0)
    assert module.apply({"params": params}, made_up.images()).shape[1] == module.width
    assert "head" not in params


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"in_channels": 0}, "in_channels=0: must be at least 1"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"patch_size": 4}, "patch_size=4: must be a tuple"),
        ({"inflation": "x"}, "inflation=x: unknown"),
        ({"depth_positions": "x"}, "depth_positions=x: unknown"),
        ({"position_resize": "x"}, "position_resize=x: unknown"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, given, says):
    file = write(tmp_path, FORMS[next(iter(FORMS))]["shapes"])
    with pytest.raises(config.InputError, match=says):
        loaded(file, **given)


@pytest.mark.parametrize(
    ("kernel", "says"), [(np.zeros((16, 3, 0, 4), np.float32), "holds nothing"), (np.full((8, 3, 4, 4), 3e38, np.float32), "too large")]
)
def test_kernels_that_are_damaged(tmp_path, kernel, says):
    shapes = FORMS[next(iter(FORMS))]["shapes"]
    kernel = np.broadcast_to(kernel[:1], (shapes[weights.KERNEL][0], *kernel.shape[1:])).copy()
    with pytest.raises(config.InputError, match=says):
        loaded(write(tmp_path, shapes, **{weights.KERNEL: kernel}), patch_size=(2, 2))
