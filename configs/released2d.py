"""What the study's public code computes in 2D where it departs from its description (arXiv 2602.18614), one departure at a time.

    python -m vitmed.main --config=configs/released2d.py:dataset=breastmnist,patch=7,departure=all --workdir=runs/breast_p7_released
    python -m vitmed.main --config=configs/released2d.py --sweep --workdir=runs/released2d

Arguments: those of vit2d.py, and departure:
    none         the described recipe: vit2d.py itself
    inversion    images are multiplied by 255 as uint8, which wraps: the network sees (256 - x) mod 256
    input_scale  inputs are x / 255 (mean 0, std 1), not normalised as those that the weights were trained on (mean = std = 0.5)
    all          both: the recipe as released
The sweep has every departure at every patch size of the study on one set: whether the effect of patch size hangs on any of them.
"""

import pathlib

import ml_collections

from vitmed import config as config_lib

RECIPE = pathlib.Path(__file__).with_name("vit2d.py")
DATASETS = ("breastmnist",)
# Departure -> the fields that it sets.
DEPARTURES = {
    "inversion": {"data.invert": True},
    "input_scale": {"model.mean": (0.0,), "model.std": (1.0,)},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one run; see the module's docstring for the arguments."""
    config, given = config_lib.extended(RECIPE, arg, departure="none")
    departure = config_lib.one_of("config argument departure", given["departure"], ("none", "all", *DEPARTURES))
    for name, fields in DEPARTURES.items():
        if departure in (name, "all"):
            config.update_from_flattened_dict(fields)
    return config


def sweep() -> list[dict[str, str]]:
    """Every departure alone, none and all of them, at the study's patch sizes."""
    departures = ("none", *DEPARTURES, "all")
    patches = (28, 14, 7, 4, 2, 1)
    return [
        {"dataset": dataset, "patch": str(patch), "departure": departure}
        for dataset in DATASETS
        for patch in patches
        for departure in departures
    ]
