"""Patch size or number of tokens? Upsampled images at patch 16 have the tokens of small patches on the images as they are.

    python -m vitmed.main --config=configs/tokens2d.py:dataset=breastmnist,patch=16,resize=112 --workdir=runs/breast_p16_at_112
    python -m vitmed.main --config=configs/tokens2d.py --sweep --workdir=runs/tokens2d

Arguments: those of vit2d.py, and resize: pixels along each axis that the network sees (0: as they are). Images are augmented as they are
stored and resized on the device afterwards, so that two points differ in nothing else.
The sweep pairs patch 4 at 28 pixels with patch 16 at 112 (49 tokens each), and patch 2 at 28 with patch 16 at 224 (196 each). Partners see
the same places of the same image in as many tokens, from the same weights; patch 16 keeps the kernel as it was trained, and at 224 the
positions too. Where partners do equally well, what small patches gain is the gain of more tokens; where not, the kernel's size matters.
"""

import pathlib

import ml_collections

from vitmed import config as config_lib

RECIPE = pathlib.Path(__file__).with_name("vit2d.py")
DATASETS = ("breastmnist",)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one run; see the module's docstring for the arguments."""
    config, given = config_lib.extended(RECIPE, f"patch=16,{arg}", resize=112)
    config.data.resize = given["resize"]
    return config


def sweep() -> list[dict[str, str]]:
    """Two pairs of equal numbers of tokens."""
    pairs = ((4, 0), (16, 112), (2, 0), (16, 224))
    return [{"dataset": dataset, "patch": str(patch), "resize": str(resize)} for dataset in DATASETS for patch, resize in pairs]
