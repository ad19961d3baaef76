"""Depth or plane? 3D patches that are fine along one of them alone, from kernels inflated by average or to the central slice.

    python -m vitmed.main --config=configs/inflation3d.py:dataset=fracturemnist3d,patch=1x7x7,inflation=center --workdir=runs/fracture_1x7x7
    python -m vitmed.main --config=configs/inflation3d.py --sweep --workdir=runs/inflation3d

Arguments: those of vit3d.py, and inflation: average (the 2D kernel repeated along depth and divided by it) or center (zero but for the
middle slice). A cubic patch is refined in depth and plane at once, and its inflated kernel blurs over just the depth that it covers, so
that neither's share in the gain can be told. The sweep takes the two cubes 7x7x7 and 14x14x14, and from each
    refines depth alone: 2x7x7, 1x7x7; 2x14x14, 1x14x14
    refines the plane alone: 7x4x4, 7x2x2, 7x1x1; 14x4x4, 14x2x2, 14x1x1
Refining the plane by a factor gives its square of tokens, so 4 in the plane is there to compare directions at like numbers of tokens: 7x4x4
with 2x7x7 (196 and 224), 14x4x4 with 1x14x14 (98 and 112). Each is inflated both ways, save where depth 1 leaves nothing to inflate: where
`center` (one slice seen sharply) and `average` (all seen, blurred) part, depth matters by what the kernel makes of it, not by tokens.
"""

import pathlib

import ml_collections

from vitmed import config as config_lib

RECIPE = pathlib.Path(__file__).with_name("vit3d.py")
DATASETS = ("fracturemnist3d",)
PATCHES = ("7", "2x7x7", "1x7x7", "7x4x4", "7x2x2", "7x1x1", "14", "2x14x14", "1x14x14", "14x4x4", "14x2x2", "14x1x1")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one run; see the module's docstring for the arguments."""
    config, given = config_lib.extended(RECIPE, arg, inflation="average")
    config.model.inflation = given["inflation"]
    return config


def sweep() -> list[dict[str, str]]:
    """Both cubes refined along either direction, with both inflations where there is a depth to inflate to."""
    return [
        {"dataset": dataset, "patch": patch, "inflation": inflation}
        for dataset in DATASETS
        for patch in PATCHES
        for inflation in ("average", "center")
        if inflation == "average" or not patch.startswith("1x")
    ]
