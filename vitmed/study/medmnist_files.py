"""Predictions as MedMNIST's own result files, which `python -m medmnist evaluate` reads."""

import collections
import re
from collections.abc import Sequence

from vitmed import config as config_lib
from vitmed.study import collection


def of_runs(runs: Sequence[collection.Run]) -> dict[str, str]:
    """{file name: text} of the test predictions of MedMNIST's sets, a file per run and seed.

    The name is the evaluator's: {flag}[_{size}]_test_[AUC]x_[ACC]y@run.csv, where run has no dot or @ that it would split at: the run's
    folder, with its config's digest where folders of one set share a name. A row is the image's index and its probabilities, with the nine
    digits that tell float32 numbers apart.
    """
    ours = [run for run in runs if run.result["dataset"].endswith(("mnist", "mnist3d"))]
    shared = collections.Counter((run.dataset, _label(run)) for run in ours)
    files = {}
    for run in ours:
        digest = f"-{run.result['config_digest']}" if shared[run.dataset, _label(run)] > 1 else ""
        files |= _of_run(run, f"{_label(run)}{digest}")
    return files


def _label(run: collection.Run) -> str:
    return re.sub("[.@/]", "-", run.label)


def _of_run(run: collection.Run, label: str) -> dict[str, str]:
    flag, size = run.result["dataset"], run.config["data.size"]
    named = flag if set(size) == {28} else f"{flag}_{config_lib.patch_text(size)}"
    files = {}
    for index, seed in enumerate(run.seeds):
        auc, accuracy = (run.of_seeds("test", name)[index] for name in ("auc", "accuracy"))
        rows = [",".join([str(row), *(f"{value:.9g}" for value in values)]) for row, values in enumerate(run.probabilities[index].tolist())]
        score = "nan" if auc is None else f"{auc:.3f}"
        files[f"{named}_test_[AUC]{score}_[ACC]{accuracy:.3f}@{label}-seed{seed}.csv"] = "\n".join(rows) + "\n"
    return files
