"""What the study's public code does otherwise and a reviewer's controls: the options one by one, whole runs, and every point of a sweep."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from vitmed import cli, config, cost, evaluate, experiment, main, models
from vitmed.data import sources
from vitmed.models import build, exported, resample, slices, weights
from vitmed.runs import folder
from vitmed.study import points
from vitmed.training import loop

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
PLUGINS = ("anymc3d.py", "compare3d.py")
SMALL = ["--config.train.epochs=2", "--config.train.batch_size=250", "--config.seeds=0", "--config.eval.batch_size=100"]
# Departure -> what it sets, by the study's list.
FIELDS_2D = {"inversion": {"data.invert": True}, "input_scale": {"model.mean": (0.0,), "model.std": (1.0,)}}
FIELDS_3D = {
    "kernel": {"model.kernel_size": (0, 16, 16)},
    "positions": {"model.position_resize": "cut"},
    "input_scale": {"model.mean": (0.0,), "model.std": (1 / 255,)},
}


def call(command, *argv: object) -> int:
    return cli.run_cli(command.main, [str(argument) for argument in argv])


def planned(spec, overrides=None):
    return experiment.plan(config.load(f"{ROOT}/configs/{spec}", overrides))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Weights in the form of the study's: patch 16, a square grid."""
    path = tmp_path_factory.mktemp("weights") / "micro.safetensors"
    architecture = build.variant("vit_micro")
    module = build.model(architecture, patch_size=(16, 16), num_classes=3)
    params = build.initialise(module, jax.random.key(0), image_size=(80, 80), in_channels=3)
    sizes = {"architecture": architecture, "image_size": (80, 80), "patch_size": (16, 16), "mean": (0.5,), "std": (0.5,)}
    tensors = safetensors.numpy.load(exported.pack(params, **sizes, seed=0, val_loss=0.0))
    safetensors.numpy.save_file(tensors, path)
    return path


def released(file, rank, *, patch, departure="all"):
    spec = f"{ROOT}/configs/released{rank}d.py:dataset=phantom{rank}d,patch={patch},variant=vit_micro,pretrained={file}"
    return [f"--config={spec},departure={departure}", *SMALL]


@pytest.fixture(scope="module", params=[pytest.param((2, 7), id="2d"), pytest.param((3, 14), id="3d", marks=pytest.mark.slow)])
def finished(request, file, tmp_path_factory):
    """(rank, patch, folder) of a finished run of the recipe as released."""
    rank, patch = request.param
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert call(main, *released(file, rank, patch=patch), f"--workdir={workdir}") == 0
    return rank, patch, workdir


# --- configs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "fields"), [(2, FIELDS_2D), (3, FIELDS_3D)])
def test_each_departure_sets_its_fields_and_nothing_else(rank, fields):
    described = config.flatten(config.load(f"{ROOT}/configs/vit{rank}d.py:patch=4").to_dict())
    everything = {name: value for departure in fields.values() for name, value in departure.items()}
    for departure, changed in {"none": {}, **fields, "all": everything}.items():
        there = config.flatten(config.load(f"{ROOT}/configs/released{rank}d.py:patch=4,departure={departure}").to_dict())
        assert there == described | changed


# What is cross-validated is not for a config to say; test_folds.py has their points.
@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("folds")])
def test_every_point_of_every_sweep_can_run_and_is_a_run_of_its_own(name, file):
    # Plugins need a base; the others are planned without reading one.
    base = {"model.variant": "vit_micro", "model.pretrained": str(file)} if name in PLUGINS else {"model.pretrained": ""}
    todo = points.of_sweep(config.load_module(f"{ROOT}/configs/{name}"))
    digests = set()
    for point in todo:
        named = "-".join([point.arguments["dataset"], *(f"{k}{v}" for k, v in point.arguments.items() if k != "dataset")])
        assert point.name == named.replace("+", "_")
        made = planned(f"{name}:{point.argument}", base)
        # What a point is called is what it is.
        assert made.description.name == point.arguments["dataset"]
        edge = point.arguments.get("plane") or point.arguments.get("patch") or point.arguments["patches"].rpartition("+")[2]
        of_plugins = {"28": "2x14x14", "14": "4x7x7"}[edge] if point.arguments.get("form") == "inflated" else f"1x{edge}x{edge}"
        assert config.patch_text(made.patch_size) == (of_plugins if name in PLUGINS else edge)
        digests.add(folder.digest(made.config.to_dict()))
    assert len(digests) == len(todo)


def test_the_sweeps_vary_what_they_are_for():
    def varied(name):
        todo = points.of_sweep(config.load_module(f"{ROOT}/configs/{name}.py"))
        return points.varied([config.load(f"{ROOT}/configs/{name}.py:{point.argument}").to_dict() for point in todo]), todo

    for rank, rates in ((2, 18), (3, 18)):
        fields, todo = varied(f"rates{rank}d")
        assert fields == {"model.patch_size", "train.learning_rate"}
        assert len(todo) == rates
    for rank, fields_of, number in ((2, FIELDS_2D, 24), (3, FIELDS_3D, 30)):
        fields, todo = varied(f"released{rank}d")
        assert fields == {"model.patch_size", *(name for one in fields_of.values() for name in one)}
        assert len(todo) == number
    assert varied("tokens2d")[0] == {"model.patch_size", "data.resize"}
    fields, todo = varied("inflation3d")
    assert fields == {"model.patch_size", "model.inflation"}
    geometries = {point.arguments["patch"]: planned(f"inflation3d.py:{point.argument},pretrained=").geometry for point in todo}
    tokens = {patch: cost.num_patches(geometry.image_size, geometry.patch_size) for patch, geometry in geometries.items()}
    # Depth refined against the plane refined, at like numbers of tokens.
    assert (tokens["7x4x4"], tokens["2x7x7"], tokens["14x4x4"], tokens["1x14x14"]) == (196, 224, 98, 112)
    assert not any(point.arguments["inflation"] == "center" and point.arguments["patch"].startswith("1x") for point in todo)


@pytest.mark.parametrize(
    ("form", "views", "tokens"), [("patches", (), 29), ("inflated", (), 57), ("slices", ("axial",), 56), ("views", slices.VIEWS, 168)]
)
@pytest.mark.parametrize(
    ("way", "tune", "rate"), [("linear", "head", 1e-3), ("attention", "head", 1e-3), ("lora", "lora", 1e-4), ("all", "all", 1e-5)]
)
def test_forms_and_ways_of_the_comparison_are_what_they_are_called(form, views, tokens, way, tune, rate, file):
    spec = f"compare3d.py:dataset=phantom3d,plane=28,form={form},way={way}"
    if views and way == "attention":
        with pytest.raises(config.InputError, match="slices are pooled by a query"):
            planned(spec, {"model.variant": "vit_micro", "model.pretrained": str(file)})
        return
    made = planned(spec, {"model.variant": "vit_micro", "model.pretrained": str(file)})
    assert (made.views, made.num_tokens * made.num_slices, made.tuning.name) == (views, tokens, tune)
    assert made.config.train.learning_rate == rate
    assert (made.network.architecture.pooling == "attention") == (way == "attention")
    lora = made.tuning.lora
    assert (lora is not None) == (way == "lora")
    assert lora is None or (lora.rank, lora.alpha, set(lora.targets)) == (8, 16.0, {"patch_embed", "qkv", "proj"})


@pytest.mark.parametrize(
    ("argument", "words"), [("patch=7", "left out: plane and form say it"), ("form=inflated,plane=7", "28 or 14 with form=inflated")]
)
def test_a_comparison_that_is_none_is_refused(argument, words):
    with pytest.raises(config.InputError, match=words):
        planned(f"compare3d.py:dataset=phantom3d,{argument}")


def test_the_token_control_has_the_tokens_of_its_partners():
    def tokens(arguments):
        made = planned(f"tokens2d.py:{arguments},pretrained=")
        return made.geometry.image_size, (made.image_size[0] // made.patch_size[0]) ** 2

    assert tokens("patch=4,resize=0") == ((28, 28), 49)
    assert tokens("patch=16,resize=112") == ((112, 112), 49)
    assert tokens("patch=2,resize=0") == ((28, 28), 196)
    assert tokens("patch=16,resize=224") == ((224, 224), 196)


@pytest.mark.parametrize(
    ("spec", "overrides", "words"),
    [
        ("released2d.py:departure=kernel", {}, ["departure=kernel", "none, all, inversion, input_scale"]),
        ("released3d.py:departure=kernels", {}, ["departure=kernels", "did you mean kernel"]),
        ("released3d.py:departur=all", {}, ["'departur' is unknown", "did you mean departure"]),
        ("tokens2d.py:patch=5", {}, ["5 does not divide the 112 pixels", "1, 2, 4, 7, 8, 14, 16, 28, 56, 112"]),
        ("vit2d.py", {"data.resize": "-1"}, ["data.resize=-1", "0 for images as they are"]),
        ("vit2d.py", {"data.resize": "100000"}, ["data.resize=100000", "4096"]),
        ("vit2d.py", {"data.invert": "maybe"}, ["data.invert=maybe", "true or false"]),
        ("vit2d.py", {"model.kernel_size": "-1"}, ["model.kernel_size=-1", "positive, or 0"]),
        ("vit2d.py", {"model.kernel_size": "1,2,3"}, ["model.kernel_size=1,2,3", "2 axes"]),
        ("vit2d.py", {"model.kernel_size": "29"}, ["kernel_size (29, 29)", "from 1 to 28"]),
        ("vit2d.py:patch=5", {"model.kernel_size": "0,16"}, ["5 does not divide the 28 pixels of axis height"]),
        ("vit2d.py", {"model.position_resize": "cutt"}, ["model.position_resize=cutt", "did you mean cut"]),
        ("vit2d.py:patch=27", {"model.kernel_size": "1", "model.position_resize": "cut"}, ["4 tokens", "only 1 positions", "take bicubic"]),
        ("inflation3d.py:inflation=middle", {}, ["model.inflation=middle"]),
        ("rates2d.py:rate=fast", {}, ["rate=fast", "a number"]),
    ],
)
def test_what_cannot_be_is_one_line(spec, overrides, words):
    with pytest.raises(config.InputError) as error:
        planned(spec, {"model.pretrained": ""} | overrides)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


# --- what a run starts from ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [14, 4])
def test_the_real_kernel_is_left_as_it_is_in_every_slice(vit_tiny, patch):
    sizes = {"image_size": (28,) * 3, "patch_size": (patch,) * 3, "kernel_size": (patch, 16, 16), "num_classes": 3}
    module, params = models.from_pretrained(vit_tiny, **sizes, position_resize="cut")
    tensors = safetensors.numpy.load_file(vit_tiny)
    kernel = tensors["patch_embed.proj.weight"].transpose(2, 3, 1, 0)  # [16, 16, 3, D]
    inflated = params["patch_embed"]["kernel"].reshape(patch, *kernel.shape)
    for slice_ in inflated:
        np.testing.assert_array_equal(slice_, kernel / np.float32(patch))
    # The released code's positions: every depth the linear table, and of all these the first rows.
    table = tensors["pos_embed"][0, 1:].reshape(14, 14, -1)
    n = 28 // patch
    places = np.clip((np.arange(n) + 0.5) * 14 / n - 0.5, 0, 13)
    low = places.astype(int)
    high, share = np.minimum(low + 1, 13), (places - low)[:, None, None]
    table = table[low] * (1 - share) + table[high] * share
    table = (table[:, low].swapaxes(0, 1) * (1 - share) + table[:, high].swapaxes(0, 1) * share).swapaxes(0, 1)
    rows = np.tile(table.reshape(n * n, -1), (n, 1))
    tokens = {14: 2, 4: 112}[patch]
    assert params["pos_embed"].shape == (1 + tokens, 192)
    np.testing.assert_allclose(params["pos_embed"][1:], rows[:tokens], atol=1e-6)
    np.testing.assert_array_equal(params["pos_embed"][0], tensors["pos_embed"][0, 0])
    assert module.apply({"params": params}, np.zeros((1, 28, 28, 28, 3), np.float32)).shape == (1, 3)


def test_where_the_kernel_is_the_patch_nothing_is_cut(file, capsys):
    sizes = {"image_size": (28,) * 3, "patch_size": (4, 7, 14), "num_classes": 2, "num_heads": 3}
    _, cut = models.from_pretrained(str(file), **sizes, position_resize="cut")
    assert "pos_embed 5x5 -> 4x2 linearly, the first 56 of 56 taken" in capsys.readouterr().err
    _, usual = models.from_pretrained(str(file), **sizes)
    differs = {name for name in cut if name != "pos_embed" and not jax.tree.all(jax.tree.map(np.array_equal, cut[name], usual[name]))}
    assert differs == set()
    table = safetensors.numpy.load_file(file)["pos_embed"][0, 1:].reshape(5, 5, -1)
    whole = resample.positions(table, grid=(7, 4, 2), depth_positions="copy", position_resize="cut")
    np.testing.assert_array_equal(cut["pos_embed"][1:], whole)
    assert np.abs(cut["pos_embed"] - usual["pos_embed"]).max() > 1e-3


def test_the_kernels_departure_places_positions_on_the_grid_of_its_tokens(file, capsys):
    sizes = {"image_size": (28,) * 3, "patch_size": (4, 4, 4), "kernel_size": (4, 16, 16), "num_classes": 2, "num_heads": 3}
    _, params = models.from_pretrained(str(file), **sizes)
    said = capsys.readouterr().err
    assert "resized: pos_embed 5x5 -> 4x4; inflated: patch_embed (average), pos_embed (copy)" in said
    table = safetensors.numpy.load_file(file)["pos_embed"][0, 1:].reshape(5, 5, -1)
    own = resample.positions(table, grid=(7, 4, 4), depth_positions="copy")
    np.testing.assert_array_equal(params["pos_embed"][1:], own)


# --- whole runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_of_the_recipe_as_released_says_what_it_is(finished):
    rank, patch, workdir = finished
    result = json.loads((workdir / "result.json").read_text())
    assert (result["image_size"], result["patch_size"]) == ([28] * rank, [patch] * rank)
    assert result["num_tokens"] == (17 if rank == 2 else 1 + 2)  # of the 8
    assert result["normalisation"] == {"mean": [0.0], "std": [1.0 if rank == 2 else 1 / 255]}
    tensors = safetensors.numpy.load_file(workdir / "weights" / "seed0.safetensors")
    assert tensors["patch_embed.proj.weight"].shape == ((48, 3, 7, 7) if rank == 2 else (48, 3, 14, 16, 16))
    assert result["num_params"] == sum(tensor.size for tensor in tensors.values())
    recorded = json.loads((workdir / "model.json").read_text())["weights"]
    resized = {2: ["patch_embed 16x16 -> 7x7", "pos_embed 5x5 -> 4x4"], 3: ["pos_embed 5x5 -> 2x2 linearly, the first 2 of 8 taken"]}
    assert recorded["resized"] == resized[rank]


def test_it_is_evaluated_as_it_was_trained(finished, tmp_path):
    _, _, workdir = finished
    for split in ("test", "val"):
        out = tmp_path / f"{split}.json"
        assert call(evaluate, f"--workdir={workdir}", f"--split={split}", f"--out={out}") == 0
        assert json.loads(out.read_text())[split] == json.loads((workdir / "result.json").read_text())[split]


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_same_bytes(finished, file, tmp_path, monkeypatch):
    rank, patch, done = finished
    more = [*released(file, rank, patch=patch), f"--workdir={tmp_path / 'run'}", "--config.train.checkpoint_seconds=0"]
    advance = loop.advance

    def stop_in_the_second_epoch(training, chunk, *given, **named):
        if len(training.progress.rows) == 1:
            raise config.Stopped(15)
        advance(training, chunk, *given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "advance", stop_in_the_second_epoch)
        assert call(main, *more) == 75
    assert call(main, *more) == 0
    for name in ("predictions/test.npz", "weights/seed0.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (done / name).read_bytes()


def test_its_weights_are_read_with_its_kernel_and_without(finished, capsys):
    rank, patch, workdir = finished
    path = str(workdir / "weights" / "seed0.safetensors")
    kernel = (14, 16, 16) if rank == 3 else (7, 7)
    described = weights.describe(path)
    assert (described.kernel_size, described.grid) == (kernel, (2, 1, 1) if rank == 3 else (4, 4))
    stored = folder.RunFolder(workdir).read_predictions("test")
    images = sources.load(f"phantom{rank}d", size=28, invert=rank == 2).splits["test"].images[:50]
    mean, std = models.preprocessing(path)
    seen = np.repeat((images / np.float32(255) - np.float32(mean)) / np.float32(std), 3, axis=-1)
    same = {"image_size": (28,) * rank, "patch_size": (patch,) * rank, "kernel_size": kernel}
    module, params = models.from_pretrained(path, **same)
    assert "resized" not in capsys.readouterr().err
    np.testing.assert_allclose(jax.nn.softmax(jax.jit(module.apply)({"params": params}, seen)), stored.probabilities[0, :50], atol=3e-5)
    models.from_pretrained(str(workdir), image_size=(28,) * rank, patch_size=(28,) * rank)
    said = capsys.readouterr().err
    assert f"patch_embed {'x'.join(map(str, kernel))} -> {'x'.join(['28'] * rank)}" in said
    assert f"pos_embed {'x'.join(map(str, described.grid))} -> {'x'.join(['1'] * rank)}" in said


def test_broken_metadata_of_a_stride_are_said(finished, tmp_path):
    rank, _, workdir = finished
    if rank == 2:
        assert "patch_size" not in facts_of(workdir)  # the kernel tells it
        return
    tensors = safetensors.numpy.load_file(workdir / "weights" / "seed0.safetensors")
    good = facts_of(workdir)
    assert good["patch_size"] == [14, 14, 14]
    for stride in ([0, 14, 14], [14, 14], "14", [[14]], [4, 14, 14]):
        path = tmp_path / "bad.safetensors"
        safetensors.numpy.save_file(tensors, path, {exported.KEY: json.dumps(good | {"patch_size": stride})})
        with pytest.raises(config.InputError, match=r"bad\.safetensors: (its metadata are broken|pos_embed has 3 positions)"):
            weights.describe(str(path))


def facts_of(workdir):
    with safetensors.safe_open(workdir / "weights" / "seed0.safetensors", "numpy") as opened:
        return json.loads(opened.metadata()[exported.KEY])


def test_a_run_on_resized_images_differs_in_nothing_but_the_resize(tmp_path):
    argument = "dataset=phantom2d,patch=14,variant=vit_micro,pretrained="
    workdir = tmp_path / "run"
    assert call(main, f"--config={ROOT}/configs/tokens2d.py:{argument},resize=56", *SMALL, f"--workdir={workdir}") == 0
    result = json.loads((workdir / "result.json").read_text())
    assert (result["image_size"], result["patch_size"], result["num_tokens"]) == ([56, 56], [14, 14], 17)
    assert call(evaluate, f"--workdir={workdir}", f"--out={tmp_path / 'out.json'}") == 0
    assert json.loads((tmp_path / "out.json").read_text())["test"] == result["test"]
    plain, resized = (planned(f"tokens2d.py:{argument},resize={resize}") for resize in (0, 56))
    # Of this size they would not be held in a chunk: what is streamed are the images as they are stored.
    assert resized.description == plain.description
    assert resized.augmentation == plain.augmentation
    small, large = (made.load().splits["train"].images for made in (plain, resized))
    np.testing.assert_array_equal(small, large)


def test_volumes_are_resized_too():
    made = planned("vit3d.py:dataset=phantom3d,patch=7,variant=vit_micro,pretrained=", {"data.resize": "42"})
    assert made.image_size == (42, 42, 42)
    recipe = experiment.recipe(made, steps_per_epoch=1)
    seen = recipe.prepare(np.zeros((1, 28, 28, 28, 1), np.uint8))
    assert seen.shape == (1, 42, 42, 42, 3)
    shapes = jax.eval_shape(recipe.init, jax.random.key(0))
    assert shapes["pos_embed"].shape == (1 + 6**3, 48)


def test_chunks_of_streamed_images_are_measured_as_they_are_stored(monkeypatch):
    monkeypatch.setattr(experiment, "CHUNK_BYTES", 3 * 8 * 28 * 28 * 5)  # five steps of three seeds and eight images
    for resize in ("0", "112"):
        made = planned("vit2d.py:patch=28,variant=vit_micro,pretrained=", {"data.resize": resize})
        assert experiment.step_plan(made, 40 * 8).steps_per_chunk == 5


def test_inversion_reaches_every_split_and_leaves_the_files_md5(shared_data):
    spec = "vit2d.py:dataset=breastmnist,pretrained="
    plain, inverted = (planned(spec, {"data.root": str(shared_data), "data.invert": str(on)}).load() for on in (False, True))
    assert plain.md5 == inverted.md5 == "750601b1f35ba3300ea97c75c52ff8f6"
    for split in ("train", "val", "test"):
        stored, seen = plain.splits[split].images, inverted.splits[split].images
        assert seen.dtype == np.uint8
        np.testing.assert_array_equal(seen, (256 - stored.astype(int)) % 256)
        np.testing.assert_array_equal(seen, stored * np.uint8(255))  # what the released code computes
        np.testing.assert_array_equal(plain.splits[split].labels, inverted.splits[split].labels)
    again = planned(spec, {"data.root": str(shared_data)}).load()  # and nothing is kept of it
    np.testing.assert_array_equal(again.splits["test"].images, plain.splits["test"].images)
    digests = {folder.digest(config.load(f"{ROOT}/configs/{spec}", {"data.invert": on}).to_dict()) for on in ("true", "false")}
    assert len(digests) == 2
