"""AnyMC3D (arXiv 2512.12887): a frozen 2D network sees a volume slice by slice, LoRA and learned queries are trained.

    python -m vitmed.main --config=configs/anymc3d.py:dataset=fracturemnist3d,patch=7 --workdir=runs/fracture_slices
    python -m vitmed.main --config=configs/anymc3d.py --sweep --together --workdir=runs/anymc3d

Arguments: those of vit3d.py (patch is that of a slice), views (axial; axial+coronal+sagittal for three, each with LoRA and query of its
own, fused by another query), rate (the learning rate).
As in the paper LoRA has rank 8 and alpha 16, on the patch embedding and every projection of attention. Rate, schedule, epochs and
augmentation are not the paper's but those of vit3d.py, save the rate, which the paper searched for from 1e-5 to 1e-3. With ViT-Ti on
FractureMNIST3D 1e-4 lowers the validation loss from the first epoch, and at 1e-3 the network stays at the classes' shares.
With masks of lesions, --config.train.mask_weight=1 lets a decoder find them during training. The sweep trains a plugin for each 3D set;
with --together they share one network on the device.
"""

import pathlib

import ml_collections

from vitmed import config as config_lib

RECIPE = pathlib.Path(__file__).with_name("vit3d.py")
DATASETS = ("organmnist3d", "nodulemnist3d", "adrenalmnist3d", "fracturemnist3d", "vesselmnist3d", "synapsemnist3d")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one run; see the module's docstring for the arguments."""
    config, given = config_lib.extended(RECIPE, arg, views="axial", rate=1e-4)
    config.model.views = given["views"].replace("+", ",")
    config.model.update(lora_rank=8, lora_alpha=16.0, lora_targets="patch_embed,qkv,proj")
    config.train.update(tune="lora", learning_rate=given["rate"])
    return config


def sweep() -> list[dict[str, str]]:
    """One plugin for each set, with one view and with three."""
    return [{"dataset": dataset, "patch": "7", "views": views} for dataset in DATASETS for views in ("axial", "axial+coronal+sagittal")]
