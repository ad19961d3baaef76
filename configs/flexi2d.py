"""One network for several patch sizes in 2D (FlexiViT, arXiv 2212.08013), by the study's recipe otherwise.

    python -m vitmed.main --config=configs/flexi2d.py:dataset=breastmnist --workdir=runs/breast_flexi
    python -m vitmed.main --config=configs/flexi2d.py --sweep --workdir=runs/flexi2d

Arguments: those of vit2d.py but patch, and patches (28+14+7+4; the run's own folder is that of the last one, patches/ within it has the
others). Its epochs are those of one run of vit2d.py: each size is trained for its share of them.
"""

import pathlib

import ml_collections

from vitmed import config as config_lib

RECIPE = pathlib.Path(__file__).with_name("vit2d.py")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one run; see the module's docstring for the arguments."""
    config, given = config_lib.extended(RECIPE, arg, patch="", patches="28+14+7+4")
    config_lib.require(not given["patch"], "config argument patch", given["patch"], "left out: patches names them all")
    sizes = given["patches"].split("+")
    last = config_lib.parse("config argument patches", sizes[-1], (0,))
    config_lib.require(not isinstance(last, str), "config argument patches", given["patches"], "numbers, such as 28+14+7")
    config.model.update(patch_sizes=",".join(sizes), patch_size=last)
    return config


def sweep() -> list[dict[str, str]]:
    """One run for each set of vit2d.py's sweep."""
    datasets = ("pathmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist", "bloodmnist")
    return [{"dataset": dataset, "patches": "28+14+7+4"} for dataset in datasets]
