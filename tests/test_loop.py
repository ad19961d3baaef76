"""The loop as a whole: a run that is stopped anywhere and continued ends with the bytes of one that was not."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from killing import ROOT, stored

from vitmed import config, experiment, metrics
from vitmed.data import sources
from vitmed.runs import checkpoint, folder, guard
from vitmed.training import loop, step


class StopAt:
    """Stands in for guard.Signals: asks the run to stop at the `number`-th place (from 0) at which it can be stopped."""

    def __init__(self, number: int):
        self.left = number

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise config.Stopped(15)


def start(cfg, path, *, signals=None, dataset=None, steps_per_chunk=None, checkpoint_seconds=1e9):
    """Run the loop in a folder, with the chunk length and the data of the test's choice."""
    planned = experiment.plan(cfg)
    dataset = dataset or planned.load()
    plan = experiment.step_plan(planned, len(dataset.splits["train"].labels))
    if steps_per_chunk:
        plan = dataclasses.replace(plan, steps_per_chunk=steps_per_chunk)
    run_folder = folder.RunFolder(path)
    run_folder.create(cfg.to_dict())
    (found,) = loop.train(
        experiment.recipe(planned, steps_per_epoch=plan.steps_per_epoch),
        plan=plan,
        dataset=dataset,
        run_folder=run_folder,
        signals=signals or guard.Signals(),
        learning_rate=experiment.learning_rate(planned, steps_per_epoch=plan.steps_per_epoch),
        checkpoint_seconds=checkpoint_seconds,
        evaluation_batch_size=cfg.eval.batch_size,
        placement=cfg.data.placement,
        label="test",
    )
    return found


def assert_same_bytes(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    assert len(one) == len(other)
    assert all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def test_a_run_stopped_anywhere_and_continued_has_identical_bytes(small_config, tmp_path):
    cfg = small_config(train__epochs="2")  # 3 steps an epoch: chunks of 2 and 1; validation has 2 batches, the test 4
    whole = start(cfg, tmp_path / "whole", steps_per_chunk=2)
    expected, progress = stored(cfg, tmp_path / "whole")
    assert (progress["chunk"], len(progress["rows"])) == (4, 2)
    where = {1: (1, 0), 3: (2, 0), 7: (4, 1), 11: (4, 2)}  # within an epoch, a validation, the last validation, the test
    for place, (chunks, epochs) in where.items():
        path = tmp_path / f"stopped{place}"
        with pytest.raises(config.Stopped):
            start(cfg, path, signals=StopAt(place), steps_per_chunk=2)
        found = stored(cfg, path)[1]
        assert (found["chunk"], len(found["rows"])) == (chunks, epochs)
        again = start(cfg, path, steps_per_chunk=2)
        arrays, resumed = stored(cfg, path)
        assert_same_bytes(expected, arrays)
        assert resumed == progress
        assert (path / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
        for split in ("val", "test"):
            assert again.predictions[split].probabilities.tobytes() == whole.predictions[split].probabilities.tobytes()
        assert again.measured == whole.measured


@pytest.mark.slow
def test_a_run_stopped_again_and_again_has_identical_bytes_and_every_epoch_once(small_config, tmp_path):
    cfg = small_config(eval__batch_size="200")  # one batch each
    start(cfg, tmp_path / "whole", steps_per_chunk=1)
    stops = 0
    while True:
        try:
            start(cfg, tmp_path / "torn", signals=StopAt(2), steps_per_chunk=1)
            break
        except config.Stopped:
            stops += 1
    assert stops == 4
    assert_same_bytes(stored(cfg, tmp_path / "whole")[0], stored(cfg, tmp_path / "torn")[0])
    rows = [json.loads(line) for line in (tmp_path / "torn" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["step"] for row in rows] == [3, 6]


@pytest.mark.parametrize("spec", ["vit2d.py:dataset=breastmnist,patch=28", "vit2d.py:dataset=tissuemnist,patch=2", "vit3d.py:patch=1"])
def test_a_chunk_takes_five_seconds_at_most_by_the_estimate(spec):
    planned = experiment.plan(config.load(f"{ROOT}/configs/{spec}", {"model.pretrained": ""}))
    plan = experiment.step_plan(planned, planned.description.num_examples["train"])
    assert plan.steps_per_chunk == 1 or plan.steps_per_chunk * planned.step_seconds <= experiment.CHUNK_SECONDS
    longer = (plan.steps_per_chunk + 1) * planned.step_seconds > experiment.CHUNK_SECONDS
    assert longer or plan.chunks_per_epoch <= 2 * plan.steps_per_epoch * planned.step_seconds / experiment.CHUNK_SECONDS + 1


def test_a_signal_before_the_first_step_leaves_nothing_to_go_on_from(small_config, tmp_path):
    with pytest.raises(config.Stopped):
        start(small_config(), tmp_path, signals=StopAt(0))
    assert not checkpoint.begun(tmp_path / "checkpoints")


def test_three_seeds_give_each_seed_what_it_gets_alone(small_config, tmp_path):
    together = start(small_config(seeds="0,3,5"), tmp_path / "together")
    for index, seed in enumerate((0, 3, 5)):
        alone = start(small_config(seeds=str(seed)), tmp_path / str(seed))
        for split in ("val", "test"):
            one, of_three = alone.predictions[split], together.predictions[split]
            np.testing.assert_allclose(of_three.probabilities[index], one.probabilities[0], atol=2e-5)
        assert together.best_epoch[index] == alone.best_epoch[0]
    assert not np.allclose(together.predictions["test"].probabilities[0], together.predictions["test"].probabilities[1], atol=1e-4)


def test_a_streamed_split_trains_like_a_resident_one(small_config, tmp_path):
    outcomes = [start(small_config(data__placement=where), tmp_path / where) for where in ("device", "host")]
    resident, streamed = (outcome.predictions["test"].probabilities for outcome in outcomes)
    np.testing.assert_allclose(resident, streamed, atol=1e-6)


def test_masked_evaluation_equals_the_plain_mean(small_config, tmp_path):
    cfg = small_config(eval__batch_size="64")  # 100 and 200 examples: neither divides
    outcome = start(cfg, tmp_path / "run")
    labels = experiment.plan(cfg).load().splits["test"].labels
    for seed in range(2):
        probabilities = outcome.predictions["test"].probabilities[seed]
        assert probabilities.shape == (200, 2)
        np.testing.assert_allclose(outcome.measured["test"]["loss"][seed], metrics.log_loss("binary", labels, probabilities), rtol=1e-5)
        assert outcome.measured["test"]["accuracy"][seed] == (probabilities.argmax(1) == labels[:, 0]).mean()


def test_the_best_parameters_are_those_of_the_lowest_validation_loss(small_config, tmp_path):
    outcome = start(small_config(train__epochs="6", train__learning_rate="3e-2"), tmp_path / "run")
    losses = np.array([row["val"]["loss"] for row in folder.RunFolder(tmp_path / "run").read_metrics()])
    assert outcome.best_epoch == (losses.argmin(axis=0) + 1).tolist()
    np.testing.assert_allclose(outcome.measured["val"]["loss"], losses.min(axis=0), rtol=1e-6)


def test_a_seed_that_fails_is_named_and_the_others_go_on_unchanged(small_config, tmp_path, monkeypatch, capsys):
    undisturbed = start(small_config(), tmp_path / "fine")
    create = step.create

    def poisoned(params, optimizer, **how):
        """Gives seed 1, told by its own draw of the position table, a parameter that is not finite."""
        own = jax.eval_shape(lambda: params)
        assert own["cls_token"].shape == (1, 48)
        bad = jax.numpy.where(params["pos_embed"][0, 0] == fingerprint, jax.numpy.nan, 0.0)
        return create(params | {"cls_token": params["cls_token"] + bad}, optimizer, **how)

    planned = experiment.plan(small_config())
    recipe = experiment.recipe(planned, steps_per_epoch=3)
    fingerprint = float(recipe.init(jax.random.key(1))["pos_embed"][0, 0])
    monkeypatch.setattr(step, "create", poisoned)
    outcome = start(small_config(), tmp_path / "poisoned")
    assert outcome.failed_seeds == [1]
    assert "seed 1: loss or gradient not finite at step 0" in capsys.readouterr().err
    assert outcome.measured["test"]["loss"][1] is None
    assert outcome.measured["test"]["balanced_accuracy"][0] == undisturbed.measured["test"]["balanced_accuracy"][0]
    np.testing.assert_array_equal(outcome.predictions["test"].probabilities[0], undisturbed.predictions["test"].probabilities[0])
    rows = folder.RunFolder(tmp_path / "poisoned").read_metrics()
    assert [row["train_loss"][1] for row in rows] == [None, None]


def test_a_run_refuses_to_go_on_with_other_data(small_config, tmp_path):
    cfg = small_config()
    phantom = experiment.plan(cfg).load()
    with pytest.raises(config.Stopped):
        start(cfg, tmp_path / "run", signals=StopAt(1), dataset=dataclasses.replace(phantom, md5="aaa"))
    with pytest.raises(config.InputError, match=r"MD5 bbb.*began with aaa"):
        start(cfg, tmp_path / "run", dataset=dataclasses.replace(phantom, md5="bbb"))


def test_a_set_of_one_class_trains_and_what_is_undefined_is_null(small_config, tmp_path, capsys):
    cfg = small_config(train__epochs="1", seeds="0")
    phantom = experiment.plan(cfg).load()
    splits = {name: sources.Split(split.images, np.ones_like(split.labels)) for name, split in phantom.splits.items()}
    outcome = start(cfg, tmp_path, dataset=dataclasses.replace(phantom, splits=splits))
    assert outcome.measured["test"]["auc"] == [None]
    assert outcome.measured["test"]["accuracy"][0] is not None
    assert outcome.failed_seeds == []
    assert "vitmed: test: " in capsys.readouterr().err


@pytest.mark.parametrize("task", ["multi-class", "multi-label", "ordinal"])
def test_every_task_trains_and_is_measured(small_config, tmp_path, task):
    cfg = small_config()
    planned = experiment.plan(cfg)
    names = ("a", "b", "c")
    description = dataclasses.replace(planned.description, task=task, class_names=names)
    rng = np.random.default_rng(0)
    splits = {}
    for name, split in planned.load().splits.items():
        classes = np.arange(len(split.labels)) % 3
        labels = rng.integers(0, 2, (len(classes), 3)) if task == "multi-label" else classes[:, None]
        splits[name] = sources.Split(split.images, labels.astype(np.int32))
    planned = dataclasses.replace(planned, description=description)
    dataset = sources.Dataset(description, splits, None)
    plan = experiment.step_plan(planned, 600)
    run_folder = folder.RunFolder(tmp_path)
    (outcome,) = loop.train(
        experiment.recipe(planned, steps_per_epoch=plan.steps_per_epoch),
        plan=plan,
        dataset=dataset,
        run_folder=run_folder,
        signals=guard.Signals(),
        learning_rate=lambda count: 0.0,
        checkpoint_seconds=1e9,
        evaluation_batch_size=64,
        placement="auto",
        label=task,
    )
    probabilities = outcome.predictions["test"].probabilities
    assert probabilities.shape == (2, 200, 3)
    assert np.allclose(probabilities.sum(-1), 1, atol=1e-5) == (task != "multi-label")
    expected = {"loss", "accuracy", "balanced_accuracy", "auc"} | ({"quadratic_weighted_kappa"} if task == "ordinal" else set())
    assert set(outcome.measured["test"]) == expected
    assert all(value is not None for values in outcome.measured["test"].values() for value in values)
    for seed in range(2):
        loss = metrics.log_loss(task, splits["test"].labels, probabilities[seed])
        np.testing.assert_allclose(outcome.measured["test"]["loss"][seed], loss, rtol=1e-4)


def test_a_broken_checkpoint_is_passed_over_for_the_one_before(small_config, tmp_path, capsys):
    cfg = small_config()
    start(cfg, tmp_path / "whole", steps_per_chunk=1)
    path = tmp_path / "broken"
    with pytest.raises(config.Stopped):
        start(cfg, path, signals=StopAt(6), steps_per_chunk=1, checkpoint_seconds=0)
    newest = max((path / "checkpoints").iterdir(), key=lambda entry: int(entry.name) if entry.name.isdigit() else -1)
    largest = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    start(cfg, path, steps_per_chunk=1)
    assert "is not what was written; going on from step 4" in capsys.readouterr().err
    assert_same_bytes(stored(cfg, tmp_path / "whole")[0], stored(cfg, path)[0])


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(small_config, tmp_path, monkeypatch):
    """Orbax's write fails as on a full disk; what was sealed before stays the newest."""
    cfg = small_config()
    path = tmp_path / "run"
    with pytest.raises(config.Stopped):
        start(cfg, path, signals=StopAt(2), steps_per_chunk=1)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nmany more lines")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with pytest.raises(config.MachineError, match=r"could not be written \(RESOURCE_EXHAUSTED: No space left on device\); make room or"):
        start(cfg, path, steps_per_chunk=1)
    with checkpoint.Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest() == 2


def test_with_no_intact_checkpoint_left_nothing_is_trained_or_deleted(small_config, tmp_path):
    cfg = small_config()
    path = tmp_path / "run"
    with pytest.raises(config.Stopped):
        start(cfg, path, signals=StopAt(1))
    for entry in (path / "checkpoints").iterdir():
        shutil.rmtree(entry / "state")
    before = sorted(path.rglob("*"))
    with pytest.raises(config.InputError, match=r"no intact checkpoint .*state.* is missing.*move the folder away"):
        start(cfg, path)
    assert sorted(path.rglob("*")) == before


def test_a_failed_seed_is_still_failed_after_a_stop_within_the_epoch(small_config, tmp_path, capsys):
    cfg = small_config(train__learning_rate="1e15")
    with pytest.raises(config.Stopped):
        start(cfg, tmp_path, signals=StopAt(2), steps_per_chunk=1)
    assert stored(cfg, tmp_path)[1]["failed"] == [True, True]
    capsys.readouterr()
    outcome = start(cfg, tmp_path, steps_per_chunk=1)
    assert outcome.failed_seeds == [0, 1]
    assert "not finite" not in capsys.readouterr().err  # said once, when it happened
    assert all(loss is None for row in folder.RunFolder(tmp_path).read_metrics() for loss in row["train_loss"])
