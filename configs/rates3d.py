"""Does one learning rate undertrain some patch sizes? The study's recipe in 3D at three rates and every patch size.

    python -m vitmed.main --config=configs/rates3d.py:dataset=fracturemnist3d,patch=7,rate=1e-4 --workdir=runs/fracture_p7_rate1e-4
    python -m vitmed.main --config=configs/rates3d.py --sweep --workdir=runs/rates3d

Arguments: those of vit3d.py, and rate: the learning rate that the schedule begins with (the study's is 1e-5). The rate of a patch size is
chosen by its validation loss; the last training loss, in metrics.jsonl, says whether it was trained to the end at all.
"""

import pathlib

import ml_collections

from vitmed import config as config_lib

RECIPE = pathlib.Path(__file__).with_name("vit3d.py")
DATASETS = ("fracturemnist3d",)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one run; see the module's docstring for the arguments."""
    config, given = config_lib.extended(RECIPE, arg, rate=1e-5)
    config.train.learning_rate = given["rate"]
    return config


def sweep() -> list[dict[str, str]]:
    """Three rates at the study's patch sizes."""
    patches, rates = (28, 14, 7, 4, 2, 1), ("1e-5", "3e-5", "1e-4")
    return [{"dataset": dataset, "patch": str(patch), "rate": rate} for dataset in DATASETS for patch in patches for rate in rates]
