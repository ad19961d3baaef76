"""Runs that end early: each seed by its own validation losses, the training when none is left, and all the same after a stop.

The validation losses are scripted; training is real. Seed 0 is best in epoch 2 and, once it is out of patience, better again in epoch 5;
seed 1 is best in epoch 3. With a patience of 2 seed 0 ends after epoch 4, seed 1 and the training after epoch 5 of 8.
"""

import types
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from killing import ROOT, stored
from test_loop import StopAt, assert_same_bytes, start

from vitmed import cli, config, evaluate, experiment
from vitmed.runs import folder
from vitmed.training import evaluation, loop, step, tracking
from vitmed.training import outcome as outcomes

SCRIPT = {0: [1.0, 0.8, 0.9, 0.85, 0.1, 0.1], 1: [1.0, 0.9, 0.7, 0.8, 0.75, 0.1]}
SMALL = {"model.variant": "vit_micro", "train.epochs": "8", "train.patience": "2", "train.batch_size": "300"}  # 2 steps an epoch


def config_of(seeds="0,1"):
    return config.load(f"{ROOT}/configs/quickstart.py:patch=14", SMALL | {"seeds": seeds})


def script(path, seeds=(0, 1)):
    """A context within which validation losses are those of the script, by the epochs that the run's folder has recorded."""

    def losses(predictions):
        assert len(predictions.losses) == len(seeds)
        epoch = len(folder.RunFolder(path).read_metrics())
        return np.array([SCRIPT[seed][min(epoch, 5)] for seed in seeds])

    return mock.patch.object(evaluation, "mean_losses", losses)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, outcome) of a run that nobody stopped."""
    path = tmp_path_factory.mktemp("patience") / "whole"
    with script(path):
        return path, start(config_of(), path, steps_per_chunk=1)


def test_each_seed_ends_by_its_own_losses(whole):
    path, outcome = whole
    rows = folder.RunFolder(path).read_metrics()
    assert outcome.epochs == len(rows) == 5
    assert outcome.best_epoch == [2, 3]
    assert outcome.failed_seeds == []
    assert [row["best_epoch"] for row in rows] == [[1, 1], [2, 2], [2, 3], [2, 3], [2, 3]]


# An epoch can be stopped before each of two chunks and of two batches of its validation: within the fifth, in the test.
@pytest.mark.parametrize(("place", "chunks"), [(17, 9), (21, 10)])
def test_a_run_that_was_stopped_ends_where_it_would_have(whole, tmp_path, place, chunks, capsys):
    cfg, (expected, _) = config_of(), whole
    with script(tmp_path):
        with pytest.raises(config.Stopped):
            start(cfg, tmp_path, signals=StopAt(place), steps_per_chunk=1)
        assert stored(cfg, tmp_path)[1]["chunk"] == chunks
        again = start(cfg, tmp_path, steps_per_chunk=1)
    assert (again.epochs, again.best_epoch) == (5, [2, 3])
    assert "test: ended after epoch 5" in capsys.readouterr().err
    arrays, progress = stored(cfg, expected)
    resumed, found = stored(cfg, tmp_path)
    assert_same_bytes(arrays, resumed)
    assert found == progress
    assert (tmp_path / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()


def test_a_seed_ends_alone_as_with_others_and_its_run_is_finished(whole, tmp_path, capsys):
    cfg, run_folder = config_of(seeds="0"), folder.RunFolder(tmp_path)
    with script(tmp_path, seeds=(0,)):
        result = experiment.run(experiment.plan(cfg), run_folder)
    assert (result["best_epoch"], len(run_folder.read_metrics())) == ([2], 4)
    of_both, alone = whole[1].predictions["test"].probabilities[0], run_folder.read_predictions("test").probabilities[0]
    np.testing.assert_allclose(of_both, alone, atol=1e-5)
    assert result["train_images_per_second"] == pytest.approx(600 * 4 / result["train_seconds"])
    capsys.readouterr()
    assert cli.run_cli(evaluate.main, [f"--workdir={tmp_path}"]) == 0
    assert "not finished" not in capsys.readouterr().err  # it is, though not all of its epochs were made


def test_an_epoch_that_has_begun_is_completed_and_only_patience_ends_a_run_early():
    plan = types.SimpleNamespace(chunks_per_epoch=2, num_chunks=20)
    rows = [{"best_epoch": [1, 2]}] * 3
    how = {"losses": [[], []], "rows": rows, "train_seconds": 0, "compile_seconds": 0, "data_md5": None}
    for chunk, failed, ended in [(6, [False, True], True), (7, [False, True], False), (6, [False, False], False), (20, [False] * 2, True)]:
        assert outcomes.Progress(chunk, failed=failed, **how).ended(plan, 2) == ended
    assert not outcomes.Progress(6, failed=[True, True], **how).ended(plan, 0)
    assert outcomes.Progress(6, failed=[False, True], **how).spent(2) == [True, False]
    assert outcomes.Progress(2, failed=[False], **{**how, "rows": []}).spent(1) == [False]
    never = outcomes.Progress(6, failed=[False], **{**how, "rows": [{"best_epoch": [0]}] * 2})  # its losses are not finite
    assert (never.spent(2), never.spent(3)) == ([True], [False])


def test_a_seed_out_of_patience_keeps_its_best_and_takes_nothing_later():
    best = step.Best({"w": jnp.zeros((3, 2))}, jnp.full(3, 0.5), jnp.array([2, 3, 0]))
    state = step.TrainState(jnp.zeros(3), {"w": jnp.ones((3, 2))}, (), jnp.full(3, step.ALIVE))
    keep = step.over_runs(lambda *arguments: step.keep_best(*arguments, patience=2), mapped=False, shared=(3,))
    for epoch, taken in [(3, [1, 1, 0]), (4, [1, 1, 0]), (5, [0, 1, 0]), (6, [0, 0, 0])]:
        kept = keep(best, state, jnp.full(3, 0.1), jnp.int32(epoch))
        np.testing.assert_array_equal(kept.params["w"][:, 0], taken)
        np.testing.assert_array_equal(kept.epoch, np.where(taken, epoch, [2, 3, 0]))


def test_a_failure_after_the_end_of_a_seeds_patience_does_not_count():
    rows = [{"best_epoch": [1, 2]}] * 3
    progress = outcomes.Progress(3, losses=[[], []], failed=[False, False], rows=rows, train_seconds=0, compile_seconds=0, data_md5=None)
    state = step.TrainState(jnp.zeros(2), {}, (), jnp.array([9, 9]))
    training, recipe = loop.Training(state, None, progress), types.SimpleNamespace(seeds=(0, 1), patience=2)
    chunk = types.SimpleNamespace(number=3, num_steps=1, num_examples=8, batches={})
    plan = types.SimpleNamespace(steps_before=lambda chunk: chunk, position=lambda chunk: (chunk, 0, 1))
    with tracking.Progress("run", total_steps=8, done_steps=3, quiet=True) as display:
        loop.advance(
            training,
            chunk,
            lambda *_: (state, jnp.full((2, 1), jnp.nan)),
            {},
            recipe=recipe,
            plan=plan,
            display=display,
            observer=tracking.Observer(),
        )
    assert progress.failed == [False, True]
