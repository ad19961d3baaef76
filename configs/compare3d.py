"""True 3D patches or slices of a 2D network? The same weights, sets, seeds and tokens, by every way to fine-tune.

    python -m vitmed.main --config=configs/compare3d.py:dataset=fracturemnist3d,plane=14,form=slices,way=lora --workdir=runs/slices_lora
    python -m vitmed.main --config=configs/compare3d.py --sweep --workdir=runs/compare3d

Arguments: those of vit3d.py but patch, and
    plane   the patch in the plane: tokens are 1 x plane x plane voxels in either form, as many of them
    form    patches (one sequence of all of them, kernels as in 2D since they are one deep, positions copied to every depth), slices (a
            sequence for each slice, pooled by a learned query), views (slices along all three axes)
    way     what is trained: linear (the classifier, of a frozen network), attention (and an attention pool; patches alone: slices have
            their query), lora (and LoRA: with slices or views it is AnyMC3D), all
    rate    the learning rate; 0: the study's where all is trained, 1e-4 for LoRA (see anymc3d.py), 1e-3 for a head alone
Patches attend to all others, slices only to their own; each slice has a CLS token of its own. The sweep has the planes of 28 and 14 voxels.
"""

import pathlib

import ml_collections

from vitmed import config as config_lib

RECIPE = pathlib.Path(__file__).with_name("vit3d.py")
DATASETS = ("adrenalmnist3d", "fracturemnist3d")
VIEWS = {"patches": "", "slices": "axial", "views": "axial,coronal,sagittal"}
WAYS = {"linear": ("head", "auto"), "attention": ("head", "attention"), "lora": ("lora", "auto"), "all": ("all", "auto")}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one run; see the module's docstring for the arguments."""
    config, given = config_lib.extended(RECIPE, arg, plane=14, form="patches", way="all", rate=0.0)
    form = config_lib.one_of("config argument form", given["form"], VIEWS)
    way = config_lib.one_of("config argument way", given["way"], WAYS)
    tune, pooling = WAYS[way]
    config.model.update(views=VIEWS[form], pooling=pooling, patch_size=(1, given["plane"], given["plane"]))
    config.train.tune = tune
    if tune == "lora":
        config.model.update(lora_rank=8, lora_alpha=16.0, lora_targets="patch_embed,qkv,proj")
    if given["rate"]:
        config.train.learning_rate = given["rate"]
    elif tune != "all":
        config.train.learning_rate = 1e-4 if tune == "lora" else 1e-3
    return config


def sweep() -> list[dict[str, str]]:
    """Both forms by every way that they have, and all views by LoRA."""
    pairs = [("patches", way) for way in WAYS] + [("slices", way) for way in WAYS if way != "attention"] + [("views", "lora")]
    return [
        {"dataset": dataset, "plane": str(plane), "form": form, "way": way}
        for dataset in DATASETS
        for plane in (28, 14)
        for form, way in pairs
    ]
