"""Volumes seen slice by slice: what a slice, a view and a stack's order are to the network, its heat, its masks, and whole runs."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
import safetensors.numpy
from test_explain import contrast
from test_pretrained_runs import ROOT, VIT2D, VIT3D, tensors_of_a_micro_model

from vitmed import cli, config, evaluate, experiment, export, inference, main, planning, predict
from vitmed import start as starts
from vitmed.data import sources
from vitmed.models import adapters, build, explain, pixels, slices
from vitmed.runs import folder
from vitmed.training import augment, programs

LORA = adapters.Lora(rank=2, alpha=4.0, targets=("patch_embed", "qkv", "proj"))
SIZE = (6, 8, 8)


def made(views=("axial",), *, size=SIZE, lora=None, decodes=False, pooling="cls", moved=True):
    """A network of volumes with parameters that are all different from their first values, or (`moved=False`) as they begin."""
    encoder = build.model(build.pooled(build.plain(12, 2, 2), pooling), patch_size=(4, 4), num_classes=None)
    model = slices.SliceViT(encoder, image_size=size, views=views, num_classes=3, lora=lora, decodes=decodes)
    first = functools.partial(model.initialise, jax.random.key(0), in_channels=1)
    if not moved:
        return model, first()
    generator = np.random.default_rng(9)

    def drawn(path, leaf):
        return jnp.asarray((path[-1].key == "scale") + generator.normal(0, 0.3, leaf.shape), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(drawn, jax.eval_shape(first))


def volumes(size=SIZE, count=2, seed=1):
    return jax.random.normal(jax.random.key(seed), (count, *size, 1))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("stage", "masks"))
def applied(model, params, given, **how):
    """What the model makes of volumes, as one program: call by call, its operations take ten times as long to compile."""
    return model.apply({"params": params}, given, **how)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def heat_of(model, params, given, classes=None, *, method):
    return model.heat(params, given, classes, method=method)


@functools.partial(jax.jit, static_argnums=0)
def weights_of(model, params, given):
    return model.weights(params, given)


# --- the network ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_order_of_slices_says_nothing_and_that_of_rows_does(pooling):
    model, params = made(pooling=pooling)
    given = volumes()
    logits = applied(model, params, given)
    order = jnp.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_allclose(applied(model, params, given[:, order]), logits, atol=1e-5)
    assert np.abs(applied(model, params, given[:, :, ::-1]) - logits).max() > 1e-2


def test_a_stack_of_one_picture_is_what_the_2d_network_makes_of_it():
    model, params = made()
    picture = jax.random.normal(jax.random.key(2), (2, 1, 8, 8, 1))
    feature = applied(model.encoder, params["encoder"], picture[:, 0])
    expected = feature @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(applied(model, params, jnp.repeat(picture, 6, axis=1)), expected, atol=1e-5)


def test_slices_are_weighed_by_the_softmax_of_their_products_with_the_query():
    model, params = made()
    given = volumes()
    features = np.stack([applied(model.encoder, params["encoder"], given[:, index]) for index in range(6)], axis=1)
    scores = features @ np.asarray(params["views"]["axial"]["query"]) / np.sqrt(12)
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    found, of_views = weights_of(model, params, given)
    np.testing.assert_allclose(found["axial"], weights, atol=1e-5)
    np.testing.assert_array_equal(of_views, np.ones((2, 1)))
    expected = (weights[..., None] * features).sum(axis=1) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(applied(model, params, given), expected, atol=1e-4)


def test_a_view_is_the_axial_one_of_the_volume_turned():
    size = (8, 8, 8)
    model, params = made(size=size)
    given = volumes(size)
    for view, turned in (("coronal", given.transpose(0, 2, 1, 3, 4)), ("sagittal", given.transpose(0, 3, 1, 2, 4))):
        other, _ = made((view,), size=size)
        renamed = params | {"views": {view: params["views"]["axial"]}}
        np.testing.assert_allclose(applied(other, renamed, given), applied(model, params, turned), atol=1e-5)


def test_each_view_has_a_query_of_its_own_and_another_fuses_them():
    views = ("coronal", "axial")
    model, params = made(views)
    given = volumes()
    features = np.asarray(applied(model, params, given, stage="features"), np.float64)
    pooled = []
    for view, part in zip(views, (features[:, :8], features[:, 8:]), strict=True):
        scores = part @ np.asarray(params["views"][view]["query"]) / np.sqrt(12)
        weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(weights_of(model, params, given)[0][view], weights, atol=1e-5)
        pooled.append((weights[..., None] * part).sum(axis=1))
    scores = np.stack(pooled, axis=1) @ np.asarray(params["fusion"]["query"]) / np.sqrt(12)
    of_views = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights_of(model, params, given)[1], of_views, atol=1e-5)
    expected = (of_views[..., None] * np.stack(pooled, axis=1)).sum(axis=1) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(applied(model, params, given), expected, atol=1e-4)


def test_slices_of_another_size_are_resized_without_aliasing():
    stripes = jnp.tile(jnp.array([0.0, 1.0]), 8)[None, :, None, None, None] * jnp.ones((1, 16, 8, 8, 1))
    found = slices.stacked(stripes, "coronal")
    assert found.shape == (1, 8, 8, 8, 1)
    np.testing.assert_allclose(found[:, :, 1:-1], 0.5, atol=0.05)  # every other row alone would be 0 or 1
    np.testing.assert_allclose(slices.stacked(stripes[:, :8], "coronal")[0, 0, :, 0, 0], stripes[0, :8, 0, 0, 0])


def test_several_views_are_fused_by_a_query_and_each_has_its_own_lora():
    views = ("axial", "coronal", "sagittal")
    model, params = made(views, lora=LORA)
    given = volumes()
    logits = applied(model, params, given)
    of_slices, of_views = weights_of(model, params, given)
    assert {name: weights.shape for name, weights in of_slices.items()} == {"axial": (2, 6), "coronal": (2, 8), "sagittal": (2, 8)}
    for weights in (*of_slices.values(), of_views):
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-6)
    for view in views:
        changed = jax.tree.map(lambda leaf: leaf, params)
        changed["views"][view]["lora"]["block_00"]["attn"]["q"]["b"] += 1.0
        moved, _ = weights_of(model, changed, given)
        same = [np.allclose(moved[name], of_slices[name], atol=1e-6) for name in views]
        assert same == [name != view for name in views]
        assert not np.allclose(applied(model, changed, given), logits, atol=1e-5)


def test_lora_that_has_not_moved_is_the_base_and_one_more_copy_of_it_is_none():
    with_lora, params = made(lora=LORA, moved=False)
    without, bare = made(moved=False)
    params["head"]["kernel"] = jax.random.normal(jax.random.key(3), (12, 3))
    bare = {"encoder": params["encoder"], "views": {"axial": {"query": params["views"]["axial"]["query"]}}, "head": params["head"]}
    np.testing.assert_allclose(applied(with_lora, params, volumes()), applied(without, bare, volumes()), atol=1e-6)


def test_views_begin_differently_and_drop_their_branches_apart():
    model, params = made(("axial", "coronal"), size=(8, 8, 8), lora=LORA, moved=False)
    axial, coronal = (params["views"][view] for view in model.views)
    assert np.abs(axial["query"] - coronal["query"]).max() > 1e-3
    assert np.abs(axial["lora"]["patch_embed"]["a"] - coronal["lora"]["patch_embed"]["a"]).max() > 1e-3
    dropping = dataclasses.replace(model, encoder=model.encoder.clone(drop_path=0.5))
    given = volumes((8, 8, 8))
    given = given + given.swapaxes(1, 2)  # both views see the same stack
    features = applied(dropping, params, given, stage="features")
    np.testing.assert_allclose(features[:, :8], features[:, 8:], atol=1e-5)
    dropped = dropping.apply({"params": params}, given, stage="features", train=True, rngs={"drop_path": jax.random.key(0)})
    assert np.abs(dropped[:, :8] - dropped[:, 8:]).max() > 1e-2


def test_features_and_then_the_classifier_are_the_whole_also_where_views_differ_in_length():
    model, params = made(("coronal", "axial"))
    features = applied(model, params, volumes(), stage="features")
    assert features.shape == (2, 8 + 6, 12)
    whole = applied(model, params, volumes())
    np.testing.assert_allclose(applied(model, params, features, stage="classify"), whole, atol=1e-6)


# --- heat -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["attention", "rollout", "gradient"])
def test_heat_lies_where_the_one_slice_is_that_counts(method):
    """The slice whose feature the query is gets nearly all the weight, and so the heat; in three views, where these slices meet."""
    model, params = made(size=(8, 8, 8))
    given = volumes((8, 8, 8), count=1)
    features = applied(model.encoder, params["encoder"], given[0])
    apart = features[5] - features.mean(axis=0)
    params["views"]["axial"]["query"] = 40 * apart / jnp.linalg.norm(apart)
    heat = heat_of(model, params, given, method=method)
    assert heat.shape == (1, 8, 2, 2)
    np.testing.assert_allclose(heat.sum(), 1.0, atol=1e-5)
    assert heat[0].sum(axis=(1, 2)).argmax() == weights_of(model, params, given)[0]["axial"][0].argmax() == 5
    three, _ = made(("axial", "coronal", "sagittal"), size=(8, 8, 8))
    query = params["views"]["axial"]
    of_three = params | {"views": dict.fromkeys(three.views, query), "fusion": query}
    laid = heat_of(three, of_three, given, method=method)
    assert laid.shape == (1, 8, 8, 8)
    np.testing.assert_allclose(laid.sum(), 1.0, atol=1e-5)


def test_attention_heat_is_the_weight_of_the_slice_times_what_its_cls_attends_to():
    model, params = made()
    given = volumes(count=1)
    weights = np.asarray(weights_of(model, params, given)[0]["axial"][0])
    within = np.asarray(explain.attention(model.encoder, params["encoder"], given[0]))
    shares = within / within.sum(axis=(1, 2), keepdims=True)
    expected = weights[:, None, None] * shares
    np.testing.assert_allclose(heat_of(model, params, given, method="attention")[0], expected / expected.sum(), atol=1e-6)


@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_heat_is_that_of_the_view_which_the_fusion_takes_seen_through_its_lora(method):
    """With all weight on one view, what three views with LoRA say is what the merged network says of that view alone."""
    size = (8, 8, 8)
    model, params = made(slices.VIEWS, size=size, lora=LORA)
    given = volumes(size, count=1)
    features = applied(model, params, given, stage="features")
    of_slices, _ = weights_of(model, params, given)
    pooled = jnp.stack([of_slices[view][0] @ features[0, 8 * index : 8 * index + 8] for index, view in enumerate(slices.VIEWS)])
    apart = jnp.linalg.pinv(pooled - pooled.mean(axis=0)) @ (400 * (jnp.arange(3) == 1))
    params["fusion"]["query"] = apart
    np.testing.assert_allclose(weights_of(model, params, given)[1], [[0, 1, 0]], atol=1e-6)
    alone, _ = made(("coronal",), size=size)
    query = {"query": params["views"]["coronal"]["query"]}
    seen = {"encoder": model.effective(params, "coronal"), "views": {"coronal": query}, "head": params["head"]}
    expected = heat_of(alone, seen, given, method=method)
    np.testing.assert_allclose(heat_of(model, params, given, method=method), expected, atol=1e-5)


def test_gradient_heat_is_of_the_class_asked_for_and_by_itself_of_the_likeliest():
    model, params = made()
    given = volumes()
    likely = applied(model, params, given).argmax(axis=1)
    own = heat_of(model, params, given, method="gradient")
    np.testing.assert_allclose(heat_of(model, params, given, likely, method="gradient"), own, atol=1e-6)
    assert np.abs(heat_of(model, params, given, (likely + 1) % 3, method="gradient") - own).max() > 1e-3


def test_a_views_heat_is_laid_on_the_voxels_that_it_saw():
    size = (4, 6, 8)
    heat = np.zeros((1, 6, 2, 2), np.float32)  # coronal: slice 4 along H, its lower left patch: D from 2 on, W below 4
    heat[0, 4, 1, 0] = 1.0
    laid = np.asarray(slices._on_voxels(jnp.asarray(heat), "coronal", size))[0]
    expected = np.zeros(size, bool)
    expected[2:, 4, :4] = True
    np.testing.assert_array_equal(laid > 0, expected)
    np.testing.assert_allclose(laid.sum(), 1.0, atol=1e-6)


# --- masks ----------------------------------------------------------------------------------------------------------------------


def test_the_loss_of_masks_is_entropy_and_dice_and_nothing_where_there_is_no_mask():
    logits = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)
    masks = np.zeros(logits.shape, bool)
    masks[0, 0, :2], masks[1, 1] = True, True
    found = 1 / (1 + np.exp(-logits.astype(np.float64)))
    entropy = -(masks * np.log(found) + ~masks * np.log(1 - found)).mean(axis=(1, 2, 3))
    dice = (2 * (found * masks).sum(axis=(1, 2, 3)) + 1) / (found.sum(axis=(1, 2, 3)) + masks.sum(axis=(1, 2, 3)) + 1)
    expected = np.where([True, True, False], entropy + 1 - dice, 0.0)
    np.testing.assert_allclose(pixels.loss(logits, masks), expected, atol=1e-5)
    gradient = jax.grad(lambda logits: pixels.loss(logits, masks).sum())(logits)
    assert np.isfinite(gradient).all()
    assert not gradient[2].any()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_masks_change_nothing_of_what_is_classified(pooling):
    model, params = made(("coronal", "axial"), decodes=True, pooling=pooling)
    given = volumes()
    logits, found = applied(model, params, given, masks=True)
    np.testing.assert_allclose(logits, applied(model, params, given), atol=1e-5)
    alone, _ = made(("coronal",), decodes=True, pooling=pooling)
    of_first = params | {"views": {"coronal": params["views"]["coronal"]}}
    np.testing.assert_allclose(found, applied(alone, of_first, given, masks=True)[1], atol=1e-5)


@pytest.mark.parametrize("view", slices.VIEWS)
def test_a_decoder_sees_each_voxel_where_it_is(view):
    """Its logits change with the patches around a voxel and not with those far from it, whatever the view."""
    size = (16, 16, 16)
    model, params = made((view,), size=size, decodes=True)
    model = slices.SliceViT(model.encoder.clone(depth=0), size, model.views, 3, decodes=True)  # no block, so no attention between patches
    given = volumes(size, count=1)
    changed = given.at[0, 1, 14, 1].add(3.0)
    before, after = (applied(model, params, one, masks=True)[1] for one in (given, changed))
    difference = np.abs(np.asarray(after - before))[0]
    assert difference.shape == size
    assert difference[1, 14, 1] > 1e-3
    assert difference[15, 0, 15] < 1e-6
    np.testing.assert_array_equal(before.shape, (1, *size))


def test_masks_go_where_augmentation_takes_the_images():
    generator = np.random.default_rng(0)
    masks = generator.random((4, 3, 8, 8)) > 0.7
    how = augment.Augmentation(flip_h=0.5, flip_w=0.5, quarter_turns=True, brightness=0.3, contrast=0.3)
    key = jax.random.key(5)
    moved = augment.moved(key, jnp.asarray(masks), how)
    plain = augment.Augmentation(flip_h=0.5, flip_w=0.5, quarter_turns=True)
    images = augment.apply(key, jnp.asarray(masks, jnp.float32)[..., None], plain)[..., 0]
    np.testing.assert_array_equal(moved, images > 0.5)
    assert not np.array_equal(moved, masks)


@pytest.mark.slow
def test_masks_raise_heat_inside_the_lesion(tmp_path):
    """Of blobs and specks, which six epochs do not tell apart: what the class does not teach, the masks do."""
    found = {}
    for weight in ("0", "1"):
        fields = {"seeds": "0", "train.epochs": "6", "train.learning_rate": "2e-3", "model.variant": "vit_micro", "model.views": "axial"}
        loaded = config.load(VIT3D.replace("vit3d", "quickstart") + ":dataset=phantom3d,patch=7", fields | {"train.mask_weight": weight})
        experiment.run(experiment.plan(loaded), folder.RunFolder(tmp_path / weight))
        run = inference.open_run(tmp_path / weight)
        test = run.planned.load().splits["test"]
        for method in ("attention", "rollout"):
            explained = inference.explainer(run, method=method, batch_size=len(test.images))
            found[method, weight] = contrast(explained(test.images, test.labels[:, 0]), test.masks, (1, 7, 7))
    assert found["attention", "1"] > 1.1 * found["attention", "0"], found
    assert found["rollout", "1"] > 1.03 * found["rollout", "0"], found


# --- runs -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "micro.safetensors"
    safetensors.numpy.save_file(tensors_of_a_micro_model(), path)
    return path


ANYMC3D = VIT3D.replace("vit3d", "anymc3d")
SMALL = ["--config.train.epochs=1", "--config.train.batch_size=100", "--config.seeds=0,1"]


def call(command, *argv):
    return cli.run_cli(command.main, [str(argument) for argument in argv])


def spec_of(file):
    return f"{ANYMC3D}:dataset=phantom3d,patch=28,variant=vit_micro,pretrained={file},views=axial+sagittal"


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    """Two views, LoRA of each, and masks."""
    workdir = tmp_path_factory.mktemp("anymc3d") / "run"
    assert call(main, f"--config={spec_of(file)}", *SMALL, "--config.train.mask_weight=1", f"--workdir={workdir}") == 0
    return workdir


@pytest.mark.parametrize(("views", "weight", "expected"), [(1, 0, 304_227), (3, 0, 910_755), (3, 1, 951_556)])
def test_so_many_parameters_of_vit_s_are_trained(views, weight, expected):
    spec = f"{ANYMC3D}:dataset=fracturemnist3d,patch=14,variant=vit_s,views={'+'.join(slices.VIEWS[:views])}"
    assert planning.plan(config.load(spec, {"train.mask_weight": str(weight)}), look=False).num_trained_params == expected


@pytest.mark.parametrize("weight", [0, pytest.param(1, marks=pytest.mark.slow)])  # with masks half a minute to compile
def test_a_head_is_trained_on_features_of_slices_and_beside_masks_on_slices(weight, file, tmp_path):
    """Without augmentation: features are computed once, unless the decoder needs all tokens."""
    spec = f"{ROOT}/configs/compare3d.py:dataset=phantom3d,plane=28,form=slices,way=linear,variant=vit_micro,pretrained={file}"
    fields = {"augment.flip_h": "0", "augment.flip_w": "0", "augment.quarter_turns": "false", "train.mask_weight": str(weight)}
    flags = [*(f"--config.{name}={value}" for name, value in fields.items()), *SMALL, f"--workdir={tmp_path / 'run'}"]
    assert call(main, f"--config={spec}", *flags) == 0
    assert call(evaluate, f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out.json'}") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert json.loads((tmp_path / "out.json").read_text())["test"]["loss"] == pytest.approx(result["test"]["loss"], abs=1e-5)


def test_a_run_counts_what_it_is_and_is_evaluated_and_given_away(run, tmp_path, capsys):
    result = json.loads((run / "result.json").read_text())
    width, rank = 48, 8
    lora = (28 * 28 * 3 + width) * rank + 2 * 4 * 2 * width * rank
    decoder = pixels.num_params(width)
    assert result["num_trainable_params"] == 2 * (lora + width) + width + decoder + (width + 1) * 2
    assert result["patch_size"] == [1, 28, 28]
    assert result["num_tokens"] == 2 * 28 * 2
    assert call(evaluate, f"--workdir={run}", f"--out={tmp_path / 'out.json'}") == 0
    assert json.loads((tmp_path / "out.json").read_text())["test"]["loss"] == pytest.approx(result["test"]["loss"], abs=1e-6)
    assert call(export, f"--workdir={run}", "--format=stablehlo", f"--out={tmp_path / 'program'}", "--seed=1") == 0
    capsys.readouterr()
    assert call(export, f"--workdir={run}", "--format=safetensors", f"--out={tmp_path / 'weights'}") == 2
    assert "sees slices" in capsys.readouterr().err


@pytest.mark.slow
def test_training_does_not_depend_on_the_mesh(run, file, tmp_path):
    """Four devices, of which two share a batch and two the large parameters: masks are counted over all of a batch."""
    command = [sys.executable, "-m", "vitmed.main", f"--config={spec_of(file)}", *SMALL, "--config.train.mask_weight=1"]
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    meshed = [f"--workdir={tmp_path / 'run'}", "--config.mesh.data=2", "--config.mesh.fsdp=2"]
    subprocess.run([*command, *meshed], env=os.environ | devices, check=True, cwd=ROOT)
    runs = (run, tmp_path / "run")
    losses = [[json.loads(line)["train_loss"] for line in (path / "metrics.jsonl").read_text().splitlines()] for path in runs]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    found = [np.load(path / "predictions" / "test.npz")["probabilities"] for path in runs]
    np.testing.assert_allclose(found[1], found[0], atol=5e-5)


def test_it_predicts_a_volume_and_draws_heat_of_all_views_on_its_voxels(run, tmp_path):
    scan = np.random.default_rng(0).integers(0, 256, (20, 24, 28), np.uint8)
    nibabel.save(nibabel.Nifti1Image(scan, np.eye(4)), tmp_path / "scan.nii.gz")
    flags = [f"--workdir={run}", f"--input={tmp_path / 'scan.nii.gz'}", f"--out={tmp_path / 'found.csv'}", "--explain=attention"]
    assert call(predict, *flags) == 0
    (drawn,) = (tmp_path / "found_heatmaps").rglob("*.nii.gz")
    heat = nibabel.load(drawn)
    assert heat.shape == scan.shape
    np.testing.assert_array_equal(heat.affine, np.eye(4))
    values = heat.get_fdata()
    assert np.isfinite(values).all()
    assert values.min() >= 0 < values.max()


def test_only_the_plugin_is_trained_and_the_decoder_only_by_masks(file):
    spec = f"{ANYMC3D}:dataset=phantom3d,patch=14,variant=vit_micro,pretrained={file}"
    fields = {"train.mask_weight": "1", "seeds": "0", "train.weight_decay": "0", "train.micro_batch_size": "1", "train.batch_size": "2"}
    planned = experiment.plan(config.load(spec, fields))
    start = starts.of(planned, begun=False)
    recipe = experiment.recipe(planned, steps_per_epoch=3, base=start.base)
    state, _ = programs.create(recipe, start.trained)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == planned.num_trained_params
    split = sources.load("phantom3d", size=28).splits["train"]
    chosen = np.flatnonzero(split.masks.any(axis=(1, 2, 3)))[:2]
    arrays = {"images": split.images, "labels": split.labels, "lesions": split.masks}
    moved = {}
    for name, lesions in (("drawn", split.masks), ("none", np.zeros_like(split.masks))):
        batches = {key: np.stack([array[chosen]] * 3)[None] for key, array in (arrays | {"lesions": lesions}).items()}
        batches["mask"] = np.ones((1, 3, 2), bool)
        program, _ = programs.compile_chunk(recipe, batches, {})
        after, losses = program(jax.tree.map(jnp.copy, state), batches, 3, {})
        assert np.isfinite(losses).all()
        moved[name] = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), after.params, state.params)
    assert min(jax.tree.leaves(moved["drawn"])) > 0
    assert max(jax.tree.leaves(moved["none"]["decoder"])) == 0
    assert min(jax.tree.leaves({name: moved["none"][name] for name in ("head", "views")})) > 0


@pytest.mark.parametrize(
    ("spec", "fields", "words"),
    [
        (VIT3D, {"model.views": "axial,oblique"}, "'oblique' is no view of a volume; there are axial, coronal, sagittal"),
        (VIT3D, {"model.views": "axial,axial"}, "views that each come once"),
        (VIT2D, {"model.views": "axial"}, "is 2D, and views are of volumes"),
        (VIT3D, {"model.views": "axial", "model.patch_size": "7,14,14"}, "slices are one deep"),
        (VIT3D, {"model.views": "axial", "model.pooling": "attention"}, "slices are pooled by a query"),
        (VIT3D, {"model.views": "axial", "mesh.sequence": "2"}, "slices are pooled by a query"),
        (VIT3D, {"train.mask_weight": "1"}, "masks supervise the slices of model.views; name views"),
        (VIT3D, {"model.views": "axial", "train.mask_weight": "1", "train.mixup": "0.2"}, "masks are not mixed"),
        (VIT3D, {"model.views": "axial", "train.mask_weight": "1", "data.resize": "56"}, "masks are as the images are stored"),
    ],
)
def test_views_that_cannot_be_are_refused(spec, fields, words):
    dataset = "phantom2d" if spec == VIT2D else "phantom3d"
    with pytest.raises(config.InputError) as raised:
        planning.plan(config.load(f"{spec}:dataset={dataset},patch=14,variant=vit_micro,pretrained=", fields))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_one_slice_is_no_volume_and_a_set_without_masks_has_none(file, tmp_path, capsys):
    with pytest.raises(config.InputError, match=r"volumes of 1x28x28 have 1 slice in the axial view; leave the view out, or take a 2D"):
        slices.num_slices(("coronal", "axial"), (1, 28, 28))
    numbers = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
    scans = tmp_path / "scans"
    for index, image in enumerate(numbers):
        place = scans / f"class{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(np.repeat(image[..., None], 4, axis=2), np.eye(4)), place / f"{index}.nii.gz")
    spec = f"{ANYMC3D}:dataset=folder:{scans},patch=7,variant=vit_micro,pretrained={file},size=28"
    flags = [f"--config.data.cache={tmp_path / 'cache'}", *SMALL, "--config.train.mask_weight=1", f"--workdir={tmp_path / 'run'}"]
    assert call(main, f"--config={spec}", *flags) == 2
    assert "has no masks of lesions; take 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    nibabel.save(nibabel.Nifti1Image(numbers[0][..., None], np.eye(4)), scans / "class0" / "0.nii.gz")
    assert call(main, f"--config={spec}", *flags[:-2], f"--workdir={tmp_path / 'run'}") == 2
    line = capsys.readouterr().err.strip()
    assert "0.nii.gz: [28, 28, 1] is a single slice, no volume; give all slices, or use configs/vit2d.py" in line.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_stopped_and_continued_it_is_the_same(run, file, tmp_path):
    """The checkpoint of a run with views holds what it needs: without its result it is finished again, with the same bytes."""
    whole = (run / "predictions" / "test.npz").read_bytes()
    (run / "result.json").unlink()
    (run / "predictions" / "test.npz").unlink()
    assert call(main, f"--config={spec_of(file)}", *SMALL, "--config.train.mask_weight=1", f"--workdir={run}") == 0
    assert (run / "predictions" / "test.npz").read_bytes() == whole
    assert folder.RunFolder(run).read_result() is not None
