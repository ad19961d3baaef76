"""What make run shows a newcomer: on the phantoms small patches see what large ones average away."""

import pathlib

import numpy as np
import pytest

from vitmed import config, experiment
from vitmed.runs import folder

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_the_quickstart_shows_the_effect_of_patch_size(tmp_path):
    balanced_accuracy = {}
    for patch in (28, 4):
        planned = experiment.plan(config.load(f"{ROOT}/configs/quickstart.py:patch={patch}"))
        result = experiment.run(planned, folder.RunFolder(tmp_path / str(patch)))
        balanced_accuracy[patch] = np.mean(result["test"]["balanced_accuracy"])
    assert balanced_accuracy[4] > balanced_accuracy[28] + 0.1
