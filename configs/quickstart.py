"""See the effect of patch size in a few minutes on a laptop: a small ViT from scratch on generated images and volumes.

    python -m vitmed.main --config=configs/quickstart.py --sweep --workdir=runs/quickstart

The phantoms are synthetic: specks against a smooth blob of the same mean and size, so that the class is a fine structure. What they show
is how the program works, not what patch size is worth on medical images; configs/vit2d.py and vit3d.py are for those.
"""

import pathlib

import ml_collections

from vitmed import config as config_lib


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one run; arguments: dataset, patch, variant, size, pretrained, and rank: 3 for volumes of your own (folder:PATH)."""
    given = config_lib.arguments(arg, dataset="phantom2d", patch=(7,), variant="vit_mini", size=(28,), pretrained="", rank=2)
    recipe = "vit3d.py" if given["rank"] == 3 or given["dataset"].endswith("3d") else "vit2d.py"
    config = config_lib.from_file(pathlib.Path(__file__).with_name(recipe))
    config.seeds = (0, 1)
    config.data.update(name=given["dataset"], size=given["size"])
    config.model.update(variant=given["variant"], patch_size=given["patch"], pretrained=given["pretrained"])
    config.model.update(pooling="mean")
    config.train.update(epochs=30, batch_size=32, learning_rate=1e-3)
    # Flips alone: a resampled speck is no speck any more.
    config.augment.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), rotation_degrees=0.0, brightness=0.0, contrast=0.0)
    if given["dataset"].startswith("phantom"):  # their own statistics: dark images of little contrast
        config.model.update(mean=(0.1,), std=(0.07,))
    return config


def sweep() -> list[dict[str, str]]:
    """Images at four patch sizes, volumes at two."""
    images = [{"dataset": "phantom2d", "patch": str(patch)} for patch in (28, 14, 7, 4)]
    return images + [{"dataset": "phantom3d", "patch": str(patch)} for patch in (14, 7)]
