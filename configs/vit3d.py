"""The study's recipe in 3D (arXiv 2602.18614 at its date): AdamW 1e-5, batch 8, 20 epochs, three seeds.

    python -m vitmed.main --config=configs/vit3d.py:dataset=fracturemnist3d,patch=7 --workdir=runs/fracture_p7

Arguments as in vit2d.py: dataset (a 3D MedMNIST set, phantom3d, or folder:PATH for your own volumes), patch (7, or 2x7x7 for depth,
height, width), variant, size (28, 64; of your own any, or 32x64x64), pretrained.
"""

import pathlib

import ml_collections

from vitmed import config as config_lib


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one run: the 2D recipe with what the study does otherwise in 3D."""
    given = config_lib.arguments(arg, dataset="fracturemnist3d", patch=(7,), variant="vit_ti", size=(28,), pretrained="default")
    recipe = pathlib.Path(__file__).with_name("vit2d.py")
    config = config_lib.from_file(recipe, f"variant={given['variant']},pretrained={given['pretrained']}")
    config.data.update(name=given["dataset"], rank=3, size=given["size"])
    config.model.patch_size = given["patch"]
    config.train.update(epochs=20, learning_rate=1e-5)
    config.augment.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), rotation_degrees=0.0, brightness=0.0, contrast=0.0)
    config.augment.update(flip_h=0.5, flip_w=0.5, quarter_turns=True)  # of the H-W plane
    return config


def sweep() -> list[dict[str, str]]:
    """The study's patch sizes on the six 3D sets."""
    datasets = ("organmnist3d", "nodulemnist3d", "adrenalmnist3d", "fracturemnist3d", "vesselmnist3d", "synapsemnist3d")
    return [{"dataset": dataset, "patch": str(patch)} for dataset in datasets for patch in (28, 14, 7, 4, 2, 1)]
