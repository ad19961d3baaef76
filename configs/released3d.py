"""What the study's public code computes in 3D where it departs from its description (arXiv 2602.18614), one departure at a time.

    python -m vitmed.main --config=configs/released3d.py:dataset=fracturemnist3d,patch=7,departure=all --workdir=runs/fracture_p7_released
    python -m vitmed.main --config=configs/released3d.py --sweep --workdir=runs/released3d

Arguments: those of vit3d.py, and departure:
    none         the described recipe: vit3d.py itself
    kernel       the 16x16 kernel is never resized in the plane: at a stride of p a token sees p x 16 x 16 voxels, so that small patches
                 overlap, 28 leaves voxels out, and there are fewer tokens; positions are resized to the grid of these tokens
    positions    positions are resized linearly, not antialiased, to (28 / p)^3, and the first rows taken for as many tokens as there are;
                 without the kernel's departure these are all of them, so that alone it changes nothing but the interpolation
    input_scale  inputs are raw values of 0 to 255 (mean 0, std 1 / 255), not normalised as those that the weights were trained on
    all          the three together: the recipe as released
The sweep has every departure at every patch size of the study on one set: whether its "+23.78 points" hang on any of them.
"""

import pathlib

import ml_collections

from vitmed import config as config_lib

RECIPE = pathlib.Path(__file__).with_name("vit3d.py")
DATASETS = ("fracturemnist3d",)
# Departure -> the fields that it sets.
DEPARTURES = {
    "kernel": {"model.kernel_size": (0, 16, 16)},
    "positions": {"model.position_resize": "cut"},
    "input_scale": {"model.mean": (0.0,), "model.std": (1 / 255,)},
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
