"""One network for several patch sizes: what it computes at each, how they take turns, and what a run of them leaves."""

import dataclasses
import json
import math
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from vitmed import cli, config, evaluate, experiment, export, forecast, main, predict
from vitmed import start as starts
from vitmed.data import pipeline
from vitmed.models import adapters, build, exported, flexible, resample
from vitmed.runs import folder
from vitmed.study import collection, points, series
from vitmed.training import loop

ROOT = pathlib.Path(__file__).parent.parent
SIZES = ("14", "7")  # of the runs; the last one is their own
SMALL = ["--config.train.epochs=3", "--config.train.batch_size=50", "--config.seeds=0,1", "--config.eval.batch_size=100"]


def call(command, *argv: object) -> int:
    return cli.run_cli(command.main, [str(argument) for argument in argv])


def flexi(rank=2, patches="14+7+4", variant="vit_micro", pretrained="", **overrides):
    spec = f"{ROOT}/configs/flexi{rank}d.py:dataset=phantom{rank}d,patches={patches},variant={variant},pretrained={pretrained}"
    return config.load(spec, {name.replace("__", "."): value for name, value in overrides.items()})


def command(workdir, *more):
    return [
        f"--config={ROOT}/configs/flexi2d.py:dataset=phantom2d,patches=14+7,variant=vit_micro,pretrained=",
        *SMALL,
        f"--workdir={workdir}",
        *more,
    ]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights such as the study's: kernels of 16 x 16, positions of a grid of 14 x 14."""
    architecture = build.variant("vit_micro")
    module = build.model(architecture, patch_size=(16, 16), num_classes=2)
    params = build.initialise(module, jax.random.key(3), image_size=(224, 224), in_channels=3)
    sizes = {"architecture": architecture, "image_size": (224, 224), "patch_size": (16, 16), "mean": (0.5,), "std": (0.5,)}
    path = tmp_path_factory.mktemp("weights") / "micro.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load(exported.pack(params, **sizes, seed=0, val_loss=0.0)), path)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert call(main, *command(workdir)) == 0
    return workdir


# --- what is computed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "patches", "off"), [(2, "28+14+7+4", 1e-5), (3, "14+7", 0.05)])
def test_it_begins_at_every_size_where_a_network_of_that_size_alone_begins(weights, rank, patches, off):
    several = experiment.plan(flexi(rank, patches, pretrained=weights))
    kept = starts.of(several, begun=False).trained
    head = jax.random.normal(jax.random.key(2), kept["head"]["kernel"].shape)  # fresh it is zero, and so would be all logits
    kept["head"]["kernel"] = head
    for form in several.forms:
        spec = f"{ROOT}/configs/vit{rank}d.py:dataset=phantom{rank}d,patch={form.patch_size[0]},variant=vit_micro,pretrained={weights}"
        alone = experiment.plan(config.load(spec))
        expected = starts.of(alone, begun=False).trained
        expected["head"]["kernel"] = head
        found = form.computed_with(kept)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for (path, mine), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
            assert mine.shape == theirs.shape, path
            assert np.linalg.norm(mine - theirs) <= off * np.linalg.norm(theirs), path
        # What a program applies to the parameters that are kept is what the network of this size computes with those of its own.
        images = jax.random.normal(jax.random.key(1), (2, *form.image_size, 3))
        applied = experiment.recipe(form, steps_per_epoch=1).apply({"params": kept}, images)
        np.testing.assert_allclose(applied, experiment.build_model(alone).apply({"params": found}, images), atol=1e-5)


def test_parameters_at_the_sizes_that_are_kept_are_as_they_are_and_others_follow_the_pseudo_inverse():
    sizes = flexible.Sizes((16, 16), (14, 14))
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "patch_embed": {"kernel": jax.random.normal(keys[0], (16 * 16 * 3, 5)), "bias": np.ones(5)},
        "pos_embed": jax.random.normal(keys[1], (1 + 14 * 14, 5)),
        "head": {"bias": np.zeros(2)},
    }
    same = flexible.resized(params, kept=sizes, to=sizes)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True))
    small = flexible.resized(params, kept=sizes, to=flexible.Sizes((4, 7), (3, 2)))
    expected = resample.resize_kernel(np.asarray(params["patch_embed"]["kernel"], np.float64).reshape(16, 16, 3, 5), (4, 7))
    np.testing.assert_allclose(small["patch_embed"]["kernel"], expected.reshape(-1, 5), atol=1e-4)
    table = resample.resize_positions(np.asarray(params["pos_embed"][1:], np.float64).reshape(14, 14, 5), (3, 2))
    np.testing.assert_allclose(small["pos_embed"], np.concatenate([params["pos_embed"][:1], table.reshape(-1, 5)]), atol=1e-5)
    assert small["head"] is params["head"]
    assert small["patch_embed"]["bias"] is params["patch_embed"]["bias"]


def test_what_is_kept_is_the_finest_grid_where_that_is_finer_than_the_weights():
    assert flexible.kept([(2, 2), (7, 7)]) == flexible.Sizes((16, 16), (14, 14))
    assert flexible.kept([(8, 32), (16, 8)]) == flexible.Sizes((16, 16), (16, 32))
    assert flexible.kept([(1, 2, 2), (7, 4, 4)]) == flexible.Sizes((16, 16, 16), (7, 14, 14))


@pytest.mark.parametrize("tune", ["all", "lora"])
def test_every_size_has_a_gradient_for_what_all_of_them_share(weights, tune):
    given = {"train__tune": "lora", "model__lora_targets": "patch_embed", "model__lora_rank": "2"} if tune == "lora" else {}
    planned = experiment.plan(flexi(pretrained=weights, **given, seeds="0"))
    start = starts.of(planned, begun=False)
    recipe = experiment.recipe(planned, steps_per_epoch=1, base=start.base)
    trained = adapters.join(adapters.split(recipe.init(jax.random.key(0)), planned.tuning)[1], start.trained)
    # Zeros would let nothing back, and equal ones nothing but rounding: what the last norm gives has mean zero.
    trained["head"] = {"kernel": jax.random.normal(jax.random.key(2), trained["head"]["kernel"].shape), "bias": jnp.zeros(2)}
    images = jax.random.normal(jax.random.key(1), (2, 28, 28, 3))
    assert len(recipe.each) == 3
    for form in recipe.each:

        def logit(params, apply=form.apply):
            return apply({"params": adapters.join(start.base, params)}, images)[0, 0]

        found = jax.jit(jax.grad(logit))(trained)
        moves = {jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(found) if np.abs(leaf).max() > 1e-3}
        shared = {"['patch_embed']['kernel']", "['pos_embed']"} if tune == "all" else {"['lora']['patch_embed']['b']"}
        assert shared <= moves


def test_sizes_take_turns_in_an_order_that_is_drawn():
    plan = pipeline.Plan(num_examples=100, batch_size=10, epochs=40, steps_per_chunk=4)
    drawn = [plan.form(chunk, 4) for chunk in range(400)]
    rounds = [tuple(drawn[first : first + 4]) for first in range(0, 400, 4)]
    assert all(sorted(turn) == [0, 1, 2, 3] for turn in rounds)
    assert len(set(rounds)) > 15  # of the 24 orders
    assert [plan.form(chunk, 1) for chunk in range(5)] == [0] * 5
    planned = experiment.plan(flexi())
    assert (
        experiment.step_plan(planned, 600).steps_per_chunk
        <= experiment.MIXED_STEPS
        < experiment.step_plan(
            experiment.plan(config.load(f"{ROOT}/configs/vit2d.py:dataset=phantom2d,variant=vit_micro,pretrained=")), 600
        ).steps_per_chunk
    )


# --- runs -----------------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_record_of_every_size_and_is_used_at_each(finished, capsys, tmp_path):
    rows = folder.RunFolder(finished).read_metrics()
    for index, size in enumerate(SIZES):
        path = finished if size == "7" else finished / "patches" / size
        run = collection.read(path)
        assert run.patch == size
        assert run.result["num_tokens"] == {"14": 5, "7": 17}[size]
        assert run.result["num_trainable_params"] == experiment.plan(flexi(patches="14+7")).num_trained_params
        with safetensors.safe_open(folder.RunFolder(path).weights(1), "np") as file:
            assert run.result["num_params"] == sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        mine = folder.RunFolder(path).read_metrics()
        assert [row["val"] for row in mine] == [row["forms"][index]["val"] for row in rows]
        if size != "7":
            assert [row["train_loss"] for row in mine] == [row["forms"][index]["train_loss"] for row in rows]
        # Training's own numbers come out again from the checkpoint, which all sizes share.
        assert call(evaluate, f"--workdir={path}", f"--out={tmp_path}/{size}.json") == 0
        again = json.loads((tmp_path / f"{size}.json").read_text())
        assert again["test"] == run.result["test"]
        assert call(export, f"--workdir={path}", "--format=safetensors", f"--out={tmp_path}/weights{size}", "--seed=1") == 0
        capsys.readouterr()
    losses = np.mean([[of_form["val"]["loss"] for of_form in row["forms"]] for row in rows], axis=1)  # [epochs, seeds]
    assert (losses.argmin(axis=0) + 1).tolist() == collection.read(finished).result["best_epoch"]
    probabilities = [collection.read(path).probabilities for path in (finished, finished / "patches" / "14")]
    assert not np.allclose(*probabilities, atol=1e-6)
    assert not (finished / "patches" / "7").exists()


def test_a_network_of_its_weights_alone_is_that_of_the_size(finished, tmp_path):
    """What is written as weights of a size is a ViT of that size: as one it starts another run."""
    path = folder.RunFolder(finished / "patches" / "14").weights(0)
    alone = experiment.plan(config.load(f"{ROOT}/configs/vit2d.py:dataset=phantom2d,patch=14,variant=vit_micro,pretrained={path}"))
    params = starts.of(alone, begun=False).trained
    assert params["patch_embed"]["kernel"].shape[0] == 14 * 14 * 3
    assert params["pos_embed"].shape[0] == 5


def test_the_report_has_them_as_a_series_of_their_own_beside_single_sizes(finished):
    several = [collection.read(path) for path in (finished, finished / "patches" / "14")]
    alone = dataclasses.replace(several[0], config={**several[0].config, "model.patch_sizes": ""})
    named = {(run.patch, run.config["model.patch_sizes"]): run.series for run in series.named([*several, alone])}
    # They are one run, as the single size is: where as many are of either kind the recipe's is the usual one.
    assert named == {("7", ""): "", ("7", "14,7"): "patch sizes 14,7", ("14", "14,7"): "patch sizes 14,7"}
    kept, left_out = series.without_twins(series.named([*several, alone]))
    assert (len(kept), left_out) == (3, [])


def test_main_shows_every_size(finished, capsys):
    assert call(main, *command(finished)) == 0
    shown = capsys.readouterr().out
    assert [line.split("│")[2].strip() for line in shown.splitlines() if "phantom2d" in line] == list(SIZES)
    assert list(points.results_of(folder.RunFolder(finished), "run")) == ["run", "run/14"]


def test_predict_and_explain_at_a_size(finished, tmp_path):
    PIL = pytest.importorskip("PIL.Image")
    (tmp_path / "images").mkdir()
    PIL.fromarray(np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)).save(tmp_path / "images" / "one.png")
    for size, path in (("14", finished / "patches" / "14"), ("7", finished)):
        given = [f"--workdir={path}", f"--input={tmp_path}/images", f"--out={tmp_path}/{size}.csv"]
        assert call(predict, *given, "--explain=gradient") == 0
    assert (tmp_path / "14.csv").read_text() != (tmp_path / "7.csv").read_text()


@pytest.mark.parametrize("rank", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_stopped_it_goes_on_to_the_same_bytes(finished, rank, tmp_path, monkeypatch):
    if rank == 2:
        whole, argv = finished, command(tmp_path / "stopped")
    else:
        spec = f"{ROOT}/configs/flexi3d.py:dataset=phantom3d,patches=28+14,variant=vit_micro,pretrained="
        given = [f"--config={spec}", "--config.train.epochs=2", "--config.train.batch_size=25", "--config.seeds=0"]
        whole, argv = tmp_path / "whole", [*given, f"--workdir={tmp_path}/stopped"]
        assert call(main, *given, f"--workdir={whole}") == 0
    advance, made = loop.advance, []

    def stop_after_three(training, chunk, program, *arguments, **how):
        advance(training, chunk, program, *arguments, **how)
        made.append(program)
        if len(made) == 3:
            raise config.Stopped(15)

    monkeypatch.setattr(loop, "advance", stop_after_three)
    assert call(main, *argv) == 75
    assert made[0] is not made[1]  # the two sizes of the first round
    monkeypatch.setattr(loop, "advance", advance)
    assert call(main, *argv) == 0
    for name in ("metrics.jsonl", "predictions/test.npz", "weights/seed0.safetensors"):
        for place in (".", "patches/14" if rank == 2 else "patches/28"):
            assert (tmp_path / "stopped" / place / name).read_bytes() == (whole / place / name).read_bytes(), (place, name)


@pytest.mark.parametrize(
    ("argument", "words"),
    [("patches=14+auto", "patches=14+auto: must be numbers"), ("patch=7", "config argument patch=7: must be left out")],
)
def test_what_the_config_cannot_take(argument, words):
    with pytest.raises(config.InputError) as raised:
        config.load(f"{ROOT}/configs/flexi2d.py:{argument}")
    assert words in str(raised.value)


def test_a_sweeps_names_tell_its_sizes(tmp_path, capsys):
    given = [f"--config={ROOT}/configs/flexi2d.py:variant=vit_micro,pretrained=", "--sweep", f"--workdir={tmp_path}/runs"]
    assert call(main, *given, "--config.model.patch_sizes=28,4") == 2
    assert "model.patch_sizes: the sweep sets it" in capsys.readouterr().err


def test_every_size_has_its_turn_within_an_epoch():
    planned = experiment.plan(flexi())
    for examples in (120, 250, 600, 5000):
        plan = experiment.step_plan(planned, examples)
        forms = [plan.form(chunk, 3) for chunk, _, _ in plan.chunks_of_epoch(3)]
        assert set(forms) == {0, 1, 2} or plan.chunks_per_epoch < 5, (examples, forms)
        assert plan.chunks_per_epoch >= min(3, plan.steps_per_epoch)


def test_a_folder_of_a_size_that_is_not_finished_is_left_to_its_run(finished, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "patches" / "14" / "result.json").unlink()
    assert call(main, *command(copy / "patches" / "14", "--config.model.patch_size=14")) == 2
    assert "which is not finished; run that again" in capsys.readouterr().err
    monkeypatch.chdir(copy / "patches")
    assert folder.RunFolder("14").checkpoints == copy.resolve() / "checkpoints"
    stranger = tmp_path / "project" / "patches" / "run"
    (tmp_path / "project" / "checkpoints").mkdir(parents=True)
    assert folder.RunFolder(stranger).checkpoints == stranger / "checkpoints"


def test_memory_is_that_of_the_finest():
    device = types.SimpleNamespace(platform="cpu", name="cpu", count=1, memory_bytes=10**12)
    several = [forecast.budget.memory(experiment.plan(flexi(model__patch_size=size)), device) for size in ("14", "4")]
    assert several[0] == several[1]
    alone = experiment.plan(flexi(patches="14+7"))
    assert several[0].least > forecast.budget.memory(alone, device).least


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.patch_sizes": "14,28"}, ["model.patch_size=7", "model.patch_sizes=14,28"]),
        ({"model.patch_sizes": "7"}, ["model.patch_sizes=7", "two or more"]),
        ({"model.patch_sizes": "7,4,7"}, ["model.patch_sizes=7,4,7", "each come once"]),
        ({"model.patch_sizes": "7,5"}, ["5 does not divide the 28 pixels", "1, 2, 4, 7, 14, 28"]),
        ({"model.patch_sizes": "7,big"}, ["model.patch_sizes=big", "list of numbers"]),
        ({"model.patch_sizes": "7,4x7x7"}, ["model.patch_sizes=4,7,7", "2 axes"]),
        ({"model.patch_sizes": "7,-4"}, ["model.patch_sizes=-4", "positive"]),
        ({"model.patch_sizes": "7,auto"}, ["model.patch_sizes=7,auto", "numbers, such as"]),
        ({"train.epochs": "1", "train.batch_size": "600"}, ["1 steps are fewer than the sizes", "more epochs"]),
        ({"model.inflation": "center"}, ["model.inflation=center", "average with model.patch_sizes"]),
        ({"model.depth_positions": "sincos"}, ["model.depth_positions=sincos", "copy with model.patch_sizes"]),
        ({"model.kernel_size": "16"}, ["model.kernel_size=16", "0 with model.patch_sizes=14,7"]),
        ({"model.position_resize": "cut"}, ["model.position_resize=cut", "bicubic with model.patch_sizes"]),
        ({"mesh.sequence": "2"}, ["mesh.sequence=2", "1 with model.patch_sizes"]),
    ],
)
def test_what_cannot_be_ends_in_a_line(overrides, words, tmp_path, capsys):
    given = [f"--config.{name}={value}" for name, value in overrides.items()]
    assert call(main, *command(tmp_path / "run", *given)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()
