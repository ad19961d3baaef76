"""Every field of every config is read by something: none is there for show."""

import pathlib

import pytest

from vitmed import config, experiment
from vitmed.runs import folder

ROOT = pathlib.Path(__file__).parent.parent


class Recorder:
    """A config that notes which of its leaves are read, by attribute, by key or as a whole section turned into a dict."""

    def __init__(self, inner, read, prefix=""):
        self._inner, self._read, self._prefix = inner, read, prefix

    def __getitem__(self, name):
        value = self._inner[name]
        if hasattr(value, "to_dict"):
            return Recorder(value, self._read, f"{self._prefix}{name}.")
        self._read.add(f"{self._prefix}{name}")
        return value

    __getattr__ = __getitem__

    def to_dict(self):
        if self._prefix:  # the whole config goes into config.json and reads nothing
            self._read |= {f"{self._prefix}{name}" for name in self._inner.to_dict()}
        return self._inner.to_dict()


@pytest.mark.parametrize("name", ["quickstart", "vit2d", "vit3d"])
def test_every_field_is_read(name, tmp_path):
    """A whole run is made with the smallest model; the fields keep the values of the config, save those that cost time."""
    data = {"vit3d": "dataset=phantom3d,patch=14"}.get(name, "dataset=phantom2d,patch=14")
    data += ",pretrained="
    small = {"model.variant": "vit_micro", "train.epochs": "1", "train.batch_size": "600", "seeds": "0"}
    inner = config.load(f"{ROOT}/configs/{name}.py:{data}", small)
    read: set[str] = set()
    experiment.run(experiment.plan(Recorder(inner, read)), folder.RunFolder(tmp_path))
    assert set(config.flatten(inner.to_dict())) - read == set()


def test_the_recorder_notes_what_is_read_and_nothing_else():
    read: set[str] = set()
    recorder = Recorder(config.load(f"{ROOT}/configs/quickstart.py:patch=14"), read)
    recorder.to_dict()
    assert recorder.train.epochs == 30
    assert recorder.model["variant"] == "vit_mini"
    assert set(recorder.eval.to_dict()) == {"batch_size"}
    assert read == {"train.epochs", "model.variant", "eval.batch_size"}
