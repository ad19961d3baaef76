"""True 3D patches or slices of a 2D network? The same weights, sets and seeds, by every way to fine-tune.

    python -m vitmed.main --config=configs/compare3d.py:dataset=fracturemnist3d,plane=14,form=slices,way=lora --workdir=runs/slices_lora
    python -m vitmed.main --config=configs/compare3d.py --sweep --workdir=runs/compare3d

Arguments: those of vit3d.py but patch, and
    plane   the patch in the plane of a slice, 1 x plane x plane voxels
    form    patches (those of all slices as one sequence, kernels as in 2D since they are one deep, positions copied to every depth),
            inflated (patches several slices deep, kernels inflated, about as many tokens as slices have: 2x14x14 for a plane of 28, 4x7x7
            for 14), slices (a sequence for each slice, pooled by a learned query), views (slices along all three axes)
    way     what is trained: linear (the classifier, of a frozen network), attention (and an attention pool; not of slices, which have
            their query), lora (and LoRA: with slices or views it is AnyMC3D), all
    rate    the learning rate; 0: the study's where all is trained, 1e-4 for LoRA (see anymc3d.py), 1e-3 for a head alone
Patches attend to all others, slices only to their own. Each slice has a CLS token of its own: of volumes of 28 x 28 x 28, patches of a
plane of 28 are 29 tokens, inflated ones 57, slices 56; of 14 they are 113, 113 and 140. The sweep has both planes.
"""

import pathlib

import ml_collections

from vitmed import config as config_lib

RECIPE = pathlib.Path(__file__).with_name("vit3d.py")
DATASETS = ("adrenalmnist3d", "fracturemnist3d")
VIEWS = {"patches": "", "inflated": "", "slices": "axial", "views": "axial,coronal,sagittal"}
INFLATED = {28: (2, 14, 14), 14: (4, 7, 7)}  # by plane
WAYS = {"linear": ("head", "auto"), "attention": ("head", "attention"), "lora": ("lora", "auto"), "all": ("all", "auto")}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one run; see the module's docstring for the arguments."""
    config, given = config_lib.extended(RECIPE, arg, patch="", plane=14, form="patches", way="all", rate=0.0)
    config_lib.require(not given["patch"], "config argument patch", given["patch"], "left out: plane and form say it")
    form = config_lib.one_of("config argument form", given["form"], VIEWS)
    way = config_lib.one_of("config argument way", given["way"], WAYS)
    tune, pooling = WAYS[way]
    plane = given["plane"]
    if form == "inflated":
        config_lib.require(plane in INFLATED, "config argument plane", plane, "28 or 14 with form=inflated")
    config.model.update(views=VIEWS[form], pooling=pooling, patch_size=INFLATED[plane] if form == "inflated" else (1, plane, plane))
    config.train.tune = tune
    if tune == "lora":
        config.model.update(lora_rank=8, lora_alpha=16.0, lora_targets="patch_embed,qkv,proj")
    if given["rate"]:
        config.train.learning_rate = given["rate"]
    elif tune != "all":
        config.train.learning_rate = 1e-4 if tune == "lora" else 1e-3
    return config


def sweep() -> list[dict[str, str]]:
    """All forms by every way that they have, and all views by LoRA."""
    pairs = [(form, way) for form in ("patches", "inflated") for way in WAYS]
    pairs += [("slices", way) for way in WAYS if way != "attention"] + [("views", "lora")]
    return [
        {"dataset": dataset, "plane": str(plane), "form": form, "way": way}
        for dataset in DATASETS
        for plane in (28, 14)
        for form, way in pairs
    ]
