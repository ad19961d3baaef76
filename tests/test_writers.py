"""A run followed in TensorBoard, Weights & Biases and MLflow: told once, never harmed."""

import dataclasses
import importlib.util
import json
import pathlib
import struct
import sys
import types

import numpy as np
import pytest

from vitmed import config, experiment, inference
from vitmed.runs import folder, guard, processes
from vitmed.training import backends, tracking, writers

LOSSES = {"loss": [0.5, 0.25], "auc": [0.75, None]}


# --- what the packages would keep -------------------------------------------------------------------------------------------------


def read_events(path):
    """The events that TensorBoard shows of a folder: all files in order; a session's START hides what has its step or a later one."""
    from tensorboardX.proto import event_pb2

    shown = []
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        while data:  # TFRecord: length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = [earlier for earlier in shown if earlier.step < event.step]
            shown.append(event)
    return shown


def scalars(path):
    """{tag: [(step, value), ...]} as TensorBoard shows them."""
    found = {}
    for event in read_events(path):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


class FakeWandb(types.ModuleType):
    """Runs by id, each with its rows; like the service it drops rows of steps that a run has passed."""

    def __init__(self):
        super().__init__("wandb")
        self.kept, self.begun = {}, []
        self.Table = lambda columns, data: ("table", columns, data)
        self.Image = lambda pixels: ("image", pixels.shape)

    def init(self, **how):
        self.begun.append(how)
        rows = self.kept.setdefault(how["id"], {})
        ended = []

        def log(row, *, step, commit):
            assert commit
            assert step > max(rows, default=-1), "a step that the run has passed"
            rows[step] = dict(row)

        return types.SimpleNamespace(
            starting_step=max(rows, default=-1) + 1, log=log, finish=lambda exit_code: ended.append(exit_code) or how.update(ended=ended)
        )


class FakeMlflow(types.ModuleType):
    """One store for all clients."""

    def __init__(self):
        super().__init__("mlflow")
        self.experiments, self.kept, self.metrics, self.params, self.artifacts, self.states = {}, {}, [], [], [], []
        self.entities = types.ModuleType("mlflow.entities")
        self.entities.Metric = lambda key, value, timestamp, step: types.SimpleNamespace(key=key, value=value, step=step)
        self.entities.Param = lambda key, value: (key, value)

    def MlflowClient(self):  # noqa: N802
        return self

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name):
        self.experiments[name] = types.SimpleNamespace(experiment_id="7")
        return "7"

    def create_run(self, number, run_name):
        self.kept[run_name] = number
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"id{len(self.kept)}"))

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(metrics) <= 1000
        assert len(params) <= 100
        self.metrics += metrics
        self.params += params

    def get_metric_history(self, run_id, key):
        return [metric for metric in self.metrics if metric.key == key]

    def log_text(self, run_id, text, name):
        self.artifacts.append((name, text))

    def log_artifact(self, run_id, file, place):
        self.artifacts.append((f"{place}/{pathlib.Path(file).name}", pathlib.Path(file).read_bytes()))

    def update_run(self, run_id, status):
        self.states.append(status)

    def set_terminated(self, run_id, status):
        self.states.append(status)


@pytest.fixture
def fakes(monkeypatch):
    wandb, mlflow = FakeWandb(), FakeMlflow()
    for name, module in (("wandb", wandb), ("mlflow", mlflow), ("mlflow.entities", mlflow.entities)):
        monkeypatch.setitem(sys.modules, name, module)
    return wandb, mlflow


# --- a whole run ------------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_and_goes_on_is_told_once_everywhere(small_config, tmp_path, fakes, monkeypatch):
    """Stopped within the first epoch's validation, of which the step has been told and the metrics have not."""
    wandb, mlflow = fakes
    cfg = small_config(tracking__writers="tensorboard, wandb,mlflow", tracking__project="mine")
    run_folder = folder.RunFolder(tmp_path / "a_run")
    monkeypatch.setattr(experiment, "CHUNK_SECONDS", 0)  # one step each
    left = [4]  # places: three chunks, the validation's first batch and its second

    def check(self):
        left[0] -= 1
        if left[0] == -1:
            raise config.Stopped(15)

    monkeypatch.setattr(guard.Signals, "check", check)
    with pytest.raises(config.Stopped):
        experiment.run(experiment.plan(cfg), run_folder)
    assert mlflow.states == ["KILLED"]
    result = experiment.run(experiment.plan(cfg), run_folder)

    rows = run_folder.read_metrics()
    steps = [row["step"] for row in rows]
    assert steps == [3, 6]
    for index, seed in enumerate((0, 1)):
        shown = scalars(run_folder.path / "tensorboard" / f"seed{seed}")
        assert set(shown) == {"train/loss", "train/epoch_loss"} | {
            f"{split}/{name}" for split in ("val", "test") for name in rows[0]["val"]
        }
        for name in rows[0]["val"]:
            assert shown[f"val/{name}"] == [(row["step"], pytest.approx(row["val"][name][index])) for row in rows]
            assert shown[f"test/{name}"] == [(7, pytest.approx(result["test"][name][index]))]
        # The point of the step whose validation was stopped may be lost, none may be there twice.
        assert [step for step, _ in shown["train/loss"]] == [1, 2, 4, 5, 6]
        means = [np.average([value for step, value in shown["train/loss"] if step > 3], weights=(250, 250, 100))]
        assert means == [pytest.approx(rows[1]["train_loss"][index], rel=1e-5)]
    of_all = read_events(run_folder.path / "tensorboard" / "run")
    values = {value.tag: value for event in of_all for value in event.summary.value}
    assert b"train.batch_size | 250" in values["config/text_summary"].tensor.string_val[0]
    assert b"| patch 14 | 2 |" in values["results/scores/text_summary"].tensor.string_val[0]
    assert {tag for tag in values if tag.startswith("figures/")} == {
        f"figures/{n}" for n in ("roc", "confusion", "learning_curves", "calibration")
    }
    assert values["figures/roc"].image.encoded_image_string.startswith(b"\x89PNG")
    assert [step for step, _ in scalars(run_folder.path / "tensorboard" / "run")["train/epoch"]] == steps

    assert [(how["project"], how["name"], how["resume"]) for how in wandb.begun] == [("mine", "a_run", "allow")] * 2
    assert [how["ended"] for how in wandb.begun] == [[1], [0]]
    (kept,) = wandb.kept.values()
    assert [step for step in kept if "val/loss/seed0" in kept[step]] == steps
    assert [kept[step]["val/auc/seed1"] for step in steps] == [row["val"]["auc"][1] for row in rows]
    assert kept[7]["test/auc/seed0"] == result["test"]["auc"][0]
    assert kept[7]["figures/roc"][0] == "image"
    assert kept[7]["results/scores"][1][0] == ""
    assert wandb.begun[0]["config"]["train.batch_size"] == 250

    assert mlflow.states == ["KILLED", "RUNNING", "FINISHED"]
    assert mlflow.kept == {"a_run": "7"}
    told = [(metric.key, metric.step) for metric in mlflow.metrics]
    assert len(told) == len(set(told))
    assert [step for key, step in told if key == "val/loss/seed1"] == steps
    assert ("train.batch_size", "250") in mlflow.params
    assert {name for name, _ in mlflow.artifacts} >= {"results/scores.md", "results/classes.md", "figures/roc.png"}


def test_what_is_followed_is_the_same_run(small_config, tmp_path):
    """Tracking may be turned on, off or renamed between calls: it is no part of what the run is."""
    plain, followed = small_config(), small_config(tracking__writers="tensorboard", tracking__project="x", tracking__name="y")
    assert folder.digest(plain.to_dict()) == folder.digest(followed.to_dict())
    run_folder = folder.RunFolder(tmp_path)
    run_folder.create(plain.to_dict())
    run_folder.check(followed.to_dict())
    run_folder.config.write_text(json.dumps(followed.to_dict()))
    assert inference.restored_config(run_folder, None).tracking.writers == ""


# --- trouble ----------------------------------------------------------------------------------------------------------------------


class Flaky:
    """A writer that keeps what it is told until it breaks."""

    def __init__(self, breaks_at=10**9):
        self.told, self.left = [], breaks_at

    def _tell(self, *what):
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("no\nnetwork")
        self.told.append(what)

    def scalars(self, shared, of_seeds, *, step):
        self._tell("scalars", step, of_seeds)

    def flush(self):
        self._tell("flush")

    def conclude(self, tables, figures, *, step):
        self._tell("conclude", step)

    def close(self, *, finished):
        self._tell("close", finished)


def follow(tracker):
    """What the loop tells of a run of one epoch, and its end."""
    with tracker:
        tracker.begun(0)
        tracker.trained(2, losses=[1.0, float("nan")], images_per_second=10.0)
        tracker.validated({"step": 2, "epoch": 1, "learning_rate": 0.1, "train_loss": [1.0, None], "val": LOSSES})
        tracker.finished(LOSSES, lambda: ({}, {}))


@pytest.mark.parametrize("breaks_at", range(7))
def test_a_writer_that_breaks_is_left_out_in_one_line_and_the_others_go_on(breaks_at, capsys):
    whole, broken = Flaky(), Flaky(breaks_at)
    follow(writers.Tracker(("good", "bad"), lambda name, step: {"good": whole, "bad": broken}[name], seeds=(3, 5)))
    kinds = ["scalars", "scalars", "flush", "scalars", "conclude", "flush", "close"]
    assert [what[0] for what in whole.told] == kinds
    assert [what[0] for what in broken.told] == kinds[:breaks_at]
    assert capsys.readouterr().err == "vitmed: tracking: bad is left out from here on: no network\n"
    assert whole.told[0] == ("scalars", 2, {"train/loss": {3: 1.0}})  # of a seed that failed there is nothing to tell
    assert whole.told[1][2]["val/auc"] == {3: 0.75}
    assert whole.told[3][1:] == (3, {"test/loss": {3: 0.5, 5: 0.25}, "test/auc": {3: 0.75}})
    assert whole.told[-1] == ("close", True)


def test_a_writer_that_does_not_open_is_left_out(capsys):
    def refuse(name, step):
        raise RuntimeError("")

    follow(writers.Tracker(("mlflow",), refuse, seeds=(0, 1)))
    assert capsys.readouterr().err == "vitmed: tracking: mlflow is left out from here on: RuntimeError\n"


@pytest.mark.parametrize("error", [config.InputError("every seed has failed"), MemoryError("every seed has failed")])
def test_a_run_whose_figures_cannot_be_drawn_ends_as_it_should(error, capsys):
    def show():
        raise error

    writer = Flaky()
    with writers.Tracker(("one",), lambda name, step: writer, seeds=(0, 1)) as tracker:
        tracker.begun(5)
        tracker.finished({"loss": [None, None]}, show)
    assert [what[0] for what in writer.told] == ["scalars", "flush", "close"]
    assert "no tables and no figures: every seed has failed" in capsys.readouterr().err


def test_a_full_disk_breaks_the_event_file_at_once_and_not_in_a_thread(tmp_path, capsys):
    writer = backends.TensorBoard(tmp_path, config={}, seeds=(0, 1), step=0)
    with open("/dev/full", "wb", buffering=0) as full:
        for each in writer._writers.values():
            each._py_recordio_writer._writer.close()
            each._py_recordio_writer._writer = full
        follow(writers.Tracker(("tensorboard",), lambda name, step: writer, seeds=(0, 1)))
    assert capsys.readouterr().err == "vitmed: tracking: tensorboard is left out from here on: [Errno 28] No space left on device\n"


# --- what is asked for ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"tracking__writers": "tensorbord"}, r"tracking.writers=tensorbord: unknown; did you mean tensorboard\?"),
        ({"tracking__writers": "tensorboard,wandb"}, r"wandb needs the package wandb; install it: pip install 'vitmed\[tracking\]'"),
        ({"tracking__project": ""}, "tracking.project=: must be a name"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_begins(small_config, overrides, says, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(config.InputError, match=says):
        experiment.plan(small_config(**overrides))


def test_only_the_process_that_writes_is_followed_and_only_where_asked(small_config, tmp_path, monkeypatch):
    planned = experiment.plan(small_config(tracking__writers="tensorboard"))
    run_folder = folder.RunFolder(tmp_path)
    assert type(experiment._followed(planned, run_folder)) is writers.Tracker
    assert type(experiment._followed(experiment.plan(small_config()), run_folder)) is tracking.Observer
    monkeypatch.setattr(processes, "is_main", lambda: False)
    assert type(experiment._followed(planned, run_folder)) is tracking.Observer
    assert list(tmp_path.iterdir()) == []


def test_the_id_of_a_run_is_made_once_and_kept(tmp_path):
    made = iter(("first", "second"))
    assert [writers.stored_id(tmp_path, "wandb", lambda: next(made)) for _ in range(2)] == ["first", "first"]
    (tmp_path / "tracking" / "wandb_run_id").write_text("../x")
    with pytest.raises(config.InputError, match="holds no run's id"):
        writers.stored_id(tmp_path, "wandb", lambda: "y")


def test_an_event_file_is_there_to_be_followed_after_every_epoch(tmp_path):
    writer = backends.TensorBoard(tmp_path, config={"a.b": "x|y"}, seeds=(0, 1), step=0)
    tracker = writers.Tracker(("tensorboard",), lambda name, step: writer, seeds=(0, 1))
    tracker.begun(0)
    for epoch in (1, 2):
        row = {"step": 2 * epoch, "epoch": epoch, "learning_rate": 0.1, "train_loss": [1.0, 2.0], "val": LOSSES}
        tracker.validated(row)
        assert len(scalars(tmp_path / "seed0")["val/loss"]) == epoch  # while the run goes on
    assert "val/auc" not in scalars(tmp_path / "seed1")
    tracker.__exit__(None, None, None)


def test_what_a_killed_process_told_beyond_its_checkpoint_is_told_again_and_shown_once(tmp_path, monkeypatch):
    for begun, upto, pid in ((0, 5, 11), (3, 7, 12), (0, 2, 13)):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)  # processes within one second
        writer = backends.TensorBoard(tmp_path, config={"a": 1}, seeds=(0,), step=begun)
        for step in range(begun + 1, upto + 1):
            writer.scalars({}, {"train/loss": {0: float(step)}}, step=step)
        writer.close(finished=False)
        assert [step for step, _ in scalars(tmp_path / "seed0")["train/loss"]] == list(range(1, upto + 1))
    texts = [value.tag for event in read_events(tmp_path / "run") for value in event.summary.value]
    assert texts == ["config/text_summary"]


def test_fields_of_tracking_reach_the_experiment(small_config):
    planned = experiment.plan(small_config(tracking__writers="tensorboard,tensorboard", tracking__name="n"))
    assert dataclasses.astuple(planned.tracked) == (("tensorboard",), "vitmed", "n")
