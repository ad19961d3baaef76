"""Cross-validation of own images: the study's recipe in 2D on every fold, no patient in two of them.

    python -m vitmed.main --config=configs/folds2d.py:dataset=folder:/data/scans,size=64,patch=8 --sweep --workdir=runs/scans_folds

Arguments: those of vit2d.py, and folds (how many) and, of a single run, fold (which of them tests; the one after it validates). All that
stands after the colon holds for every fold.
"""

import pathlib

import ml_collections

from vitmed import config as config_lib

RECIPE = pathlib.Path(__file__).with_name("vit2d.py")
FOLDS = 5


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one fold; see the module's docstring for the arguments."""
    config, given = config_lib.extended(RECIPE, arg, folds=FOLDS, fold=0)
    config.data.update(folds=given["folds"], fold=given["fold"])
    return config


def sweep(arg: str = "") -> list[dict[str, str]]:
    """Every fold."""
    _, given = config_lib.extended(RECIPE, arg, folds=FOLDS)
    return [{"dataset": "folder:", "folds": str(given["folds"]), "fold": str(fold)} for fold in range(given["folds"])]
