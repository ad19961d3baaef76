"""Ways to fine-tune: what is trained and what stays, LoRA's arithmetic, plugins and their bases, features computed once."""

import ast
import csv
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from PIL import Image
from test_pretrained_runs import VIT2D, VIT3D, tensors_of_a_micro_model

from vitmed import cli, config, evaluate, experiment, export, features, inference, main, models, predict
from vitmed import start as starts
from vitmed.data import sources
from vitmed.models import adapters, build
from vitmed.runs import folder
from vitmed.training import programs

STILL = {"crop_scale": "1,1", "crop_ratio": "1,1", "rotation_degrees": "0", "flip_w": "0", "brightness": "0", "contrast": "0"}
WAYS = {
    "head": {"train.tune": "head"},
    "attention": {"train.tune": "head", "model.pooling": "attention"},
    "last": {"train.tune": "last:1", "train.layer_decay": "0.5"},
    "lora": {"train.tune": "lora", "model.lora_targets": "patch_embed,q,proj,block_01/mlp", "model.lora_rank": "2"},
    "adaptformer": {"train.tune": "adaptformer", "model.adapter_width": "6"},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "micro.safetensors"
    safetensors.numpy.save_file(tensors_of_a_micro_model(), path)
    return path


def planned(file, way, *, spec=VIT2D, dataset="phantom2d", patch="14", **more):
    overrides = {"seeds": "3,4", "train.learning_rate": "0.01"} | WAYS.get(way, {}) | more
    return experiment.plan(config.load(f"{spec}:dataset={dataset},patch={patch},variant=vit_micro,pretrained={file}", overrides))


def begun(file, way, **how):
    """(what is planned, its recipe, its state before the first step)."""
    plan = planned(file, way, **how)
    start = starts.of(plan, begun=False)
    recipe = experiment.recipe(plan, steps_per_epoch=3, base=start.base)
    state, _ = programs.create(recipe, start.trained)
    return plan, recipe, state


def stepped(recipe, state, images, labels, *, steps=3):
    batches = {
        "images": np.tile(images, (2, steps, *(1,) * (images.ndim))).reshape(2, steps, *images.shape),
        "labels": np.broadcast_to(labels, (2, steps, *labels.shape)),
        "mask": np.ones((2, steps, len(labels)), bool),
    }
    program, _ = programs.compile_chunk(recipe, batches, {})
    return program(jax.tree.map(jnp.copy, state), batches, steps, {})[0]


@pytest.fixture(scope="module")
def examples():
    split = sources.load("phantom2d", size=28).splits["train"]
    return split.images[:8], split.labels[:8]


# --- what is trained ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_only_the_plugin_is_trained_and_all_of_it(way, file, examples):
    plan, recipe, state = begun(file, way)
    paths = {path: leaf for path, leaf in traverse_util.flatten_dict(state.params).items()}
    assert sum(math.prod(leaf.shape[1:]) for leaf in paths.values()) == plan.num_trained_params
    expected = {
        "head": {"head"},
        "attention": {"head", "head_pool"},
        "last": {"head", "norm", "block_01"},
        "lora": {"head", "lora"},
        "adaptformer": {"head", "block_00", "block_01"},
    }[way]
    assert {path[0] for path in paths} == expected
    assert way != "adaptformer" or all(path[0] == "head" or path[1] == "adapter" for path in paths)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in paths.values())
    before = jax.tree.map(np.asarray, recipe.base)
    after = traverse_util.flatten_dict(stepped(recipe, state, *examples).params)
    still = [path for path in paths if np.array_equal(paths[path], after[path])]
    assert not still  # the third step moves LoRA's `a` and the adapters' `down` too, whose first gradient is zero
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, recipe.base))


@pytest.mark.parametrize(("way", "views"), [("last", "axial"), ("adaptformer", "axial"), ("head", "axial"), ("attention", "")])
def test_so_it_is_with_volumes_and_with_their_slices(way, views, file):
    plan, recipe, state = begun(file, way, spec=VIT3D, dataset="phantom3d", patch="1x28x28", **{"model.views": views})
    before = traverse_util.flatten_dict(state.params)
    assert sum(math.prod(leaf.shape[1:]) for leaf in before.values()) == plan.num_trained_params
    split = sources.load("phantom3d", size=28).splits["train"]
    base = jax.tree.map(np.asarray, recipe.base)
    after = traverse_util.flatten_dict(stepped(recipe, state, split.images[:8], split.labels[:8]).params)
    assert not [path for path in before if np.array_equal(before[path], after[path])]
    jax.tree.map(np.testing.assert_array_equal, base, jax.tree.map(np.asarray, recipe.base))


@pytest.mark.parametrize("way", ["lora", "adaptformer"])
@pytest.mark.parametrize(("spec", "dataset"), [(VIT2D, "phantom2d"), (VIT3D, "phantom3d")])
def test_before_the_first_step_the_network_is_its_base(way, spec, dataset, file):
    plan, recipe, state = begun(file, way, spec=spec, dataset=dataset)
    images = jax.random.normal(jax.random.key(1), (2, *plan.image_size, 3))
    base, params = models.from_pretrained(str(file), image_size=plan.image_size, patch_size=plan.patch_size, num_classes=0, num_heads=3)
    whole = adapters.join(recipe.base, jax.tree.map(lambda leaf: leaf[1], state.params))
    found = recipe.apply({"params": whole}, images, stage="features")[:, 0]
    np.testing.assert_allclose(found, base.apply({"params": params}, images), atol=1e-5)
    # and no later: changed `b` and `up` change it
    moved = jax.tree.map(lambda leaf: leaf + 0.1, whole)
    assert np.abs(recipe.apply({"params": moved}, images, stage="features")[:, 0] - found).max() > 0.01


def test_what_is_drawn_differs_by_seed_and_what_the_weights_give_does_not(file):
    for way, part in (("lora", ("lora", "patch_embed", "a")), ("attention", ("head_pool", "latent"))):
        _, _, state = begun(file, way)
        leaf = traverse_util.flatten_dict(state.params)[part]
        assert not np.array_equal(leaf[0], leaf[1])
    _, _, state = begun(file, "last")
    block = state.params["block_01"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(block[0], safetensors.numpy.load_file(file)["blocks.1.mlp.fc1.weight"].T)
    np.testing.assert_array_equal(block[0], block[1])


def test_the_rate_of_a_trained_block_falls_by_its_place_in_the_whole_network(file, examples):
    """With layer_decay .5 the last block moves half as far as the head, also where the first block is frozen."""
    _, recipe, state = begun(file, "last")
    kernel = state.params["head"]["kernel"]
    state.params["head"]["kernel"] = jax.random.normal(jax.random.key(0), kernel.shape)  # a head of zeros lets no gradient pass
    after = stepped(recipe, state, *examples, steps=1).params
    moved = jax.tree.map(lambda new, old: float(np.median(np.abs(new - old))), after, state.params)
    assert moved["norm"]["scale"] == pytest.approx(0.01, rel=0.06)  # Adam's first step is as long as the rate, plus the decay
    assert moved["block_01"]["norm2"]["scale"] == pytest.approx(0.005, rel=0.06)


# --- LoRA -----------------------------------------------------------------------------------------------------------------------


def test_lora_adds_its_scaled_product_to_the_layers_named_and_to_no_other():
    model = build.model(build.variant("vit_micro"), patch_size=(7, 7), num_classes=2)
    params = build.initialise(model, jax.random.key(0), image_size=(28, 28), in_channels=1)
    lora = adapters.Lora(rank=2, alpha=6.0, targets=("q", "block_01/attn/v", "fc2", "patch_embed"))
    tree = jax.tree.map(lambda leaf: leaf + 0.1, adapters.fresh_lora(jax.random.key(1), params, lora))
    before, after = (traverse_util.flatten_dict(part) for part in (params, adapters.merged(params, tree, lora)))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {
        ("patch_embed", "kernel"),
        *(("block_00", *rest, "kernel") for rest in (("attn", "qkv"), ("mlp", "fc2"))),
        *(("block_01", *rest, "kernel") for rest in (("attn", "qkv"), ("mlp", "fc2"))),
    }
    q, k, v = np.split(after["block_01", "attn", "qkv", "kernel"] - before["block_01", "attn", "qkv", "kernel"], 3, axis=1)
    for third, found in (("q", q), ("v", v)):
        a, b = (tree["block_01"]["attn"][third][part] for part in "ab")
        np.testing.assert_allclose(found, 3.0 * a @ b, atol=1e-5)
    assert not k.any()
    tokens = jax.random.normal(jax.random.key(2), (5, 192))
    a, b = (tree["block_00"]["mlp"]["fc2"][part] for part in "ab")
    expected = tokens @ before["block_00", "mlp", "fc2", "kernel"] + 3.0 * (tokens @ a) @ b
    np.testing.assert_allclose(tokens @ after["block_00", "mlp", "fc2", "kernel"], expected, atol=1e-4)


def test_targets_are_whole_names_from_either_end():
    found = adapters.lora_layers(2, ("qkv", "block_01/mlp"))
    assert ["/".join(layer) for layer in found] == [
        "block_00/attn/q",
        "block_00/attn/k",
        "block_00/attn/v",
        "block_01/attn/q",
        "block_01/attn/k",
        "block_01/attn/v",
        "block_01/mlp/fc1",
        "block_01/mlp/fc2",
    ]
    with pytest.raises(config.InputError, match=r"'block_1' is no layer of the network; there are patch_embed, qkv, q, .*block_11/mlp/fc2"):
        adapters.lora_layers(12, ("block_1",))


# --- bases ----------------------------------------------------------------------------------------------------------------------


def call(command, *argv):
    return cli.run_cli(command.main, [str(argument) for argument in argv])


def arguments(file, way, workdir):
    given = {"seeds": "0,1", "train.epochs": "2", "train.batch_size": "250"} | WAYS[way]
    flags = [f"--config.{name}={value}" for name, value in given.items()]
    return [f"--config={VIT2D}:dataset=phantom2d,patch=14,variant=vit_micro,pretrained={file}", *flags, f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def plugins(file, tmp_path_factory):
    """Finished runs of two kinds."""
    root = tmp_path_factory.mktemp("plugins")
    for way in ("lora", "adaptformer"):
        assert call(main, *arguments(file, way, root / way)) == 0
    return root


def test_a_plugin_holds_itself_and_the_digest_of_its_base(plugins, file):
    run = plugins / "lora"
    result, model = (json.loads((run / name).read_text()) for name in ("result.json", "model.json"))
    tensors = safetensors.numpy.load_file(file)
    assert result["num_trainable_params"] < result["num_params"] / 10
    assert not (run / "weights").exists()
    for item, branches in (("state", {"params", "mu", "nu"}), ("best", {"params"})):
        (file_of_names,) = (run / "checkpoints").glob(f"*/{item}/_METADATA")
        names = [set(ast.literal_eval(name)) for name in json.loads(file_of_names.read_text())["tree_metadata"]]
        for branch in branches:
            saved = [name for name in names if branch in name]
            assert saved
            assert all(name & {"head", "lora"} for name in saved)
    assert len(model["base"]) == 64
    # The digest is of the numbers: another file of the same ones has it too, and so has one with another head.
    tensors["head.weight"] = tensors["head.weight"] + 1
    other = file.with_name("other.safetensors")
    safetensors.numpy.save_file({f"module.{name}": array for name, array in tensors.items()}, other)
    assert models.weights.digest(models.weights.describe(str(other), num_heads=3)) == model["base"]


def test_a_plugin_is_evaluated_elsewhere_with_its_base_and_with_no_other(plugins, file, tmp_path, capsys):
    elsewhere = tmp_path / "copy.safetensors"
    shutil.copy(file, elsewhere)
    assert call(evaluate, f"--workdir={plugins / 'lora'}", f"--base={elsewhere}", f"--out={tmp_path / 'out.json'}") == 0
    said, result = json.loads((tmp_path / "out.json").read_text())["test"], json.loads((plugins / "lora" / "result.json").read_text())
    assert said["loss"] == pytest.approx(result["test"]["loss"], abs=1e-6)
    tensors = tensors_of_a_micro_model(seed=1)
    safetensors.numpy.save_file(tensors, elsewhere)
    capsys.readouterr()
    for command, more in ((evaluate, ()), (predict, (f"--input={tmp_path}", f"--out={tmp_path / 'p.csv'}"))):
        assert call(command, f"--workdir={plugins / 'lora'}", f"--base={elsewhere}", *more) == 2
        line = capsys.readouterr().err.strip()
        digest = json.loads((plugins / "lora" / "model.json").read_text())["base"]
        assert "\n" not in line
        assert f"stands on a base of {digest[:16]}" in line
        assert models.weights.digest(models.weights.describe(str(elsewhere), num_heads=3))[:16] in line
        assert str(elsewhere) in line
    assert not (tmp_path / "p.csv").exists()


def test_a_run_goes_on_with_its_own_base_alone(file, tmp_path, capsys):
    mine, workdir = tmp_path / "mine.safetensors", tmp_path / "run"
    shutil.copy(file, mine)
    assert call(main, *arguments(mine, "head", workdir)) == 0
    whole = (workdir / "predictions" / "test.npz").read_bytes()
    for gone in ("result.json", "predictions/test.npz"):
        (workdir / gone).unlink()
    safetensors.numpy.save_file(tensors_of_a_micro_model(seed=1), mine)
    capsys.readouterr()
    assert call(main, *arguments(mine, "head", workdir)) == 2
    assert "stands on a base of" in capsys.readouterr().err
    assert not (workdir / "predictions" / "test.npz").exists()
    shutil.copy(file, mine)
    assert call(main, *arguments(mine, "head", workdir)) == 0
    assert (workdir / "predictions" / "test.npz").read_bytes() == whole


def test_a_plugin_is_given_away_joined_with_its_base(plugins, tmp_path, capsys):
    assert call(export, f"--workdir={plugins / 'lora'}", "--format=safetensors", f"--out={tmp_path / 'weights'}", "--seed=1") == 0
    assert call(export, f"--workdir={plugins / 'adaptformer'}", "--format=stablehlo", f"--out={tmp_path / 'program'}", "--seed=1") == 0
    capsys.readouterr()
    assert call(export, f"--workdir={plugins / 'adaptformer'}", "--format=safetensors", f"--out={tmp_path / 'no'}") == 2
    assert "has adapters, which no other program's ViT has a place for; take stablehlo" in capsys.readouterr().err
    model, params = models.from_pretrained(str(tmp_path / "weights" / "seed1.safetensors"), image_size=(28, 28), patch_size=(14, 14))
    stored = folder.RunFolder(plugins / "lora").read_predictions("test")
    images = sources.load("phantom2d", size=28).splits["test"].images
    mean, std = models.preprocessing(str(tmp_path / "weights" / "seed1.safetensors"))
    values = (jnp.repeat(images / 255.0, 3, axis=-1) - jnp.array(mean)) / jnp.array(std)
    np.testing.assert_allclose(jax.nn.softmax(model.apply({"params": params}, values)), stored.probabilities[1], atol=1e-4)


def test_plugins_of_one_base_share_its_arrays_whatever_their_patches(file, tmp_path, capsys, monkeypatch):
    """Trained by one command in one process, and used together: each its own."""
    config_file = tmp_path / "two.py"
    config_file.write_text(
        f"""from vitmed import config
def get_config(arg=""):
    made = config.from_file({VIT2D!r}, arg + {f",variant=vit_micro,pretrained={file}"!r})
    made.train.update(tune="head", epochs=1, batch_size=250)
    made.seeds = (0,)
    return made
def sweep():
    return [dict(dataset="phantom2d", patch="14"), dict(dataset="phantom2d", patch="28")]
"""
    )
    trained, recipe = [], experiment.recipe
    monkeypatch.setattr(experiment, "recipe", lambda *given, base, **how: trained.append(base) or recipe(*given, base=base, **how))
    assert call(main, f"--config={config_file}", "--sweep", "--together", f"--workdir={tmp_path / 'runs'}") == 0
    assert len(trained) == 2
    paths = [tmp_path / "runs" / f"phantom2d-patch{patch}" for patch in (14, 28)]
    bases = [inference.open_run(path).recipe.base for path in paths]
    pointers = [[leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(base["block_01"])] for base in (*trained[:2], *bases)]
    assert pointers == pointers[:1] * 4
    assert bases[0]["pos_embed"].shape != bases[1]["pos_embed"].shape
    images = sources.load("phantom2d", size=28).splits["test"].images[:3]
    (tmp_path / "scans").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / "scans" / f"{index}.png")
    flags = [*(f"--workdir={path}" for path in paths), f"--input={tmp_path / 'scans'}", f"--out={tmp_path / 'found.csv'}"]
    assert call(predict, *flags, "--each") == 0
    for path in paths:
        rows = list(csv.DictReader((tmp_path / f"found_{path.name}.csv").read_text().splitlines()))
        stored = folder.RunFolder(path).read_predictions("test").probabilities[0, :3]
        name = next(key for key in rows[0] if key.startswith("probability_"))
        np.testing.assert_allclose([float(row[name]) for row in rows], stored[:, 0], atol=1e-5)
    assert not (tmp_path / "found.csv").exists()
    capsys.readouterr()
    assert call(predict, *flags, f"--workdir={paths[0]}", "--each") == 2
    assert f"several --workdir are called {paths[0].name}" in capsys.readouterr().err
    assert call(main, f"--config={config_file}", "--together", f"--workdir={tmp_path / 'one'}") == 2
    assert "give --sweep with it" in capsys.readouterr().err


def test_a_plugin_explains_itself(plugins, tmp_path):
    image = sources.load("phantom2d", size=28).splits["test"].images[0, ..., 0]
    Image.fromarray(image).save(tmp_path / "one.png")
    argv = [f"--workdir={plugins / 'lora'}", f"--input={tmp_path / 'one.png'}", f"--out={tmp_path / 'p.csv'}", "--explain=gradient"]
    assert call(predict, *argv) == 0
    assert len(list((tmp_path / "p_heatmaps").iterdir())) >= 1


def test_weights_with_a_pool_of_their_own_are_taken_up_with_it(file, tmp_path):
    workdir = tmp_path / "run"
    argv = arguments(file, "attention", workdir)
    argv[argv.index("--config.train.tune=head")] = "--config.train.tune=all"
    assert call(main, *argv) == 0
    plan = planned(workdir, "", **{"model.pooling": "attention"})
    start = starts.of(plan, begun=False)
    best = safetensors.numpy.load_file(plan.network.weights.path)
    np.testing.assert_array_equal(start.trained["head_pool"]["latent"], best["head_pool.latent"][0])
    np.testing.assert_array_equal(start.trained["head_pool"]["kv"]["kernel"], best["head_pool.kv.weight"].T)


# --- features -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean", "attention"])
def test_features_computed_once_train_what_images_would(pooling, file, tmp_path, monkeypatch):
    still = {f"augment.{name}": value for name, value in STILL.items()} | {"model.pooling": pooling}
    WAYS[f"still {pooling}"] = WAYS["head"] | still
    called = []
    whole = features.cached
    monkeypatch.setattr(features, "cached", lambda *given, **how: called.append(whole(*given, **how)) or called[-1])
    assert call(main, *arguments(file, f"still {pooling}", tmp_path / "kept")) == 0
    assert called[0].dataset.splits["train"].images.shape[1:] == ({"attention": 4}.get(pooling, 1), 48)
    monkeypatch.setattr(features, "cached", lambda *given, **how: None)
    assert call(main, *arguments(file, f"still {pooling}", tmp_path / "again")) == 0
    kept, again = (folder.RunFolder(tmp_path / name) for name in ("kept", "again"))
    np.testing.assert_allclose(kept.read_predictions("test").probabilities, again.read_predictions("test").probabilities, atol=1e-5)
    losses = ([row["train_loss"] for row in run.read_metrics()] for run in (kept, again))
    np.testing.assert_allclose(*losses, atol=1e-5)


@pytest.mark.parametrize(
    ("way", "field", "value"),
    [
        ("last", "train.tune", "last:1"),
        ("head", "augment.flip_w", "0.5"),
        ("head", "model.patch_sizes", "14,7"),
        ("head", "train.mixup", "0.2"),
        ("head", "model.drop_path", "0.1"),
    ],
)
def test_features_that_change_are_not_kept(way, field, value, file):
    still = {f"augment.{name}": value for name, value in STILL.items()}
    assert features.fixed(planned(file, "head", **still))
    assert not features.fixed(planned(file, way, **(still | {field: value})))


def test_masks_need_more_than_features(file):
    still = {"augment.flip_h": "0", "augment.flip_w": "0", "augment.quarter_turns": "false", "model.views": "axial"}
    how = {"spec": VIT3D, "dataset": "phantom3d", "patch": "1x28x28"}
    assert features.fixed(planned(file, "head", **how, **still))
    assert not features.fixed(planned(file, "head", **how, **still | {"train.mask_weight": "1"}))


# --- refusals -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train.tune": "first"}, "choose one of all, head, last, lora, adaptformer"),
        ({"train.tune": "last"}, "last:N with N from 1 to 2, the network's blocks"),
        ({"train.tune": "last:3"}, "last:N with N from 1 to 2"),
        ({"train.tune": "head:1"}, "takes no number"),
        ({"model.lora_rank": "4"}, "8 with train.tune=all: it is for train.tune=lora alone"),
        ({"train.tune": "lora", "model.adapter_width": "4"}, "it is for train.tune=adaptformer alone"),
        ({"train.tune": "lora", "model.lora_rank": "0"}, "from 1 to 1024"),
        (
            {"train.tune": "lora", "model.lora_targets": "query"},
            "'query' is no layer of the network; there are patch_embed, qkv, q, k, v, proj",
        ),
        ({"train.tune": "adaptformer", "model.adapter_scale": "-1"}, "model.adapter_scale"),
    ],
)
def test_what_cannot_be_tuned_so_is_refused(fields, words, file):
    with pytest.raises(config.InputError) as raised:
        planned(file, "", **fields)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_plugin_needs_a_base():
    with pytest.raises(config.InputError, match=r"train\.tune=lora: needs a base that has been trained; give model\.pretrained"):
        planned("", "lora")


def test_every_pooling_ends_where_its_head_begins(file):
    """Features and then the classifier are the whole network, for every pooling that has weights here."""
    for pooling in ("cls", "mean", "attention"):
        model = build.model(build.pooled(build.variant("vit_micro"), pooling), patch_size=(14, 14), num_classes=3)
        params = build.initialise(model, jax.random.key(0), image_size=(28, 28), in_channels=1)
        images = jax.random.normal(jax.random.key(1), (2, 28, 28, 1))
        seen = model.apply({"params": params}, images, stage="features")
        np.testing.assert_allclose(
            model.apply({"params": params}, seen, stage="classify"), model.apply({"params": params}, images), atol=1e-6
        )
