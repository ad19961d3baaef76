"""Known weights: their names on the Hub, their files' names, and the mean and std that they were trained with.

What is not known may be told by a JSON file beside the weights.
"""

import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vitmed import config

Stats = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of values in [0, 1]: one entry for all channels, or one per channel

SUFFIXES = (".safetensors", ".npz", ".pth", ".bin", ".pt")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the files of a repository, the first that exists is taken
CONFIGS = ("preprocessor_config.json", "config.json")  # where a repository may say mean and std

HALF: Stats = ((0.5,) * 3, (0.5,) * 3)
IMAGENET: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# The names on the Hub, by their preprocessing; {a,b} stands for either.
FAMILIES = {
    HALF: """
        timm/vit_{tiny,small,base,large}_patch16_{224,384}.augreg_in21k_ft_in1k  timm/vit_{tiny,small,base,large}_patch16_224.augreg_in21k
        timm/vit_{small,base}_patch32_{224,384}.augreg_in21k_ft_in1k  timm/vit_{small,base}_patch32_224.augreg_in21k
        timm/vit_{small,base}_patch16_{224,384}.augreg_in1k  timm/vit_base_patch32_{224,384}.augreg_in1k
        timm/vit_base_patch8_224.augreg_in21k  timm/vit_base_patch8_224.augreg_in21k_ft_in1k
        timm/vit_base_patch{8,16}_224.augreg2_in21k_ft_in1k  timm/vit_base_patch{16,32}_224.sam_in1k
        timm/vit_{base,large}_patch{16,32}_224.orig_in21k  timm/vit_huge_patch14_224.orig_in21k
        timm/vit_base_patch16_{224,384}.orig_in21k_ft_in1k  timm/vit_large_patch32_384.orig_in21k_ft_in1k
    """,
    IMAGENET: """
        timm/vit_{small,base,large,giant}_patch14_{,reg4_}dinov2.lvd142m
        facebook/dinov2-{,with-registers-}{small,base,large,giant}
        timm/vit_{base,large}_patch16_224.mae  timm/vit_huge_patch14_224.mae  facebook/vit-mae-{base,large,huge}
        timm/vit_{small,base}_patch{8,16}_224.dino
        timm/deit_{tiny,small,base}_{,distilled_}patch16_224.fb_in1k  timm/deit_base_{,distilled_}patch16_384.fb_in1k
        timm/deit3_{small,base,large}_patch16_{224,384}.fb_{in1k,in22k_ft_in1k}
        timm/deit3_medium_patch16_224.fb_{in1k,in22k_ft_in1k}  timm/deit3_huge_patch14_224.fb_{in1k,in22k_ft_in1k}
    """,
}
# Their authors' own file names, as regular expressions.
FILENAMES = {
    HALF: r"""
        (Ti|S|B|L)_(8|16|32)-i2?1k-\d+ep-lr_[\d.]+-aug_\w+-wd_[\d.]+-do_[\d.]+-sd_[\d.]+(--\w+-steps_\w+-lr_[\d.]+-res_\d+)?\.npz
        ViT-[BLH]_(8|14|16|32)(-224)?\.npz
    """,
    IMAGENET: r"""
        dinov2_vit[sblg]14_(reg4_)?pretrain\.\w+  mae_(pretrain|finetuned)_vit_(base|large|huge)\.\w+
        dino_(deitsmall|vitbase)(8|16)_pretrain\.\w+  deit_(tiny|small|base)_(distilled_)?patch16_(224|384)-[0-9a-f]{8}\.\w+
        deit_3_(small|medium|base|large|huge)_(224|384)_(1k|21k)(_v1)?\.\w+
    """,
}


def _expanded(template: str) -> Iterator[str]:
    """The names that a template with {a,b} stands for."""
    parts = re.split(r"\{(.*?)\}", template)  # every second one lists alternatives
    yield from map("".join, itertools.product(*(part.split(",") if index % 2 else [part] for index, part in enumerate(parts))))


NAMES: dict[str, Stats] = {name: stats for stats, names in FAMILIES.items() for template in names.split() for name in _expanded(template)}


def stats(path_or_name: str) -> Stats | None:
    """Mean and std by a name of the Hub, by a path in its cache, or by a file name that is such a name or its authors' own."""
    if path_or_name in NAMES:
        return NAMES[path_or_name]
    path = pathlib.PurePath(path_or_name)
    if path.name in WEIGHTS:
        cached = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]", path_or_name)
        return NAMES.get(f"{cached[1]}/{cached[2]}") if cached else None
    if not path.name.endswith(SUFFIXES):
        return None
    by_stem = {name.partition("/")[2]: values for name, values in NAMES.items()}
    matches = (values for values, patterns in FILENAMES.items() for pattern in patterns.split() if re.fullmatch(pattern, path.name))
    return by_stem.get(stem(path.name)) or next(matches, None)


def sidecar(path: pathlib.Path) -> Stats | None:
    """Mean and std that X.json says beside X.safetensors, or config.json in a repository's folder; InputError where it is broken."""
    beside = path.with_name(f"{stem(path.name)}.json")
    if beside.exists():
        found = _read(beside)
        if found is None:
            raise config.InputError(f'{beside}: says no mean and std; write {{"mean": [0.5], "std": [0.5]}}, or move it away')
        return found
    files = [path.with_name(filename) for filename in CONFIGS] if path.name in WEIGHTS else []
    return next((found for file in files if file.exists() and (found := _read(file))), None)


def stem(filename: str) -> str:
    """A file name without its suffix, where that is one of weights: the names themselves have dots."""
    return next((filename.removesuffix(suffix) for suffix in SUFFIXES if filename.endswith(suffix)), filename)


def _read(file: pathlib.Path) -> Stats | None:
    """Mean and std of a JSON file in our form, timm's or transformers'; None where it speaks of neither; InputError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise config.InputError(f"{file}: cannot be read as JSON ({error}); mend it, or move it away") from error
    sections = [content, content.get("pretrained_cfg")] if isinstance(content, dict) else []
    for section, keys in itertools.product(sections, (("mean", "std"), ("image_mean", "image_std"))):
        if isinstance(section, dict) and not section.keys().isdisjoint(keys):
            return _checked(file, section, keys)
    return None


def _checked(file: pathlib.Path, section: Mapping[str, Any], keys: tuple[str, str]) -> Stats:
    """Two entries of a JSON file as tuples of numbers; InputError."""
    given = [section.get(key) for key in keys]
    mean, std = (value if isinstance(value, list) else [value] for value in given)
    numbers = all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in (*mean, *std))
    # Larger ones are meant for values from 0 to 255; NaN is in no interval.
    if not numbers or len(mean) != len(std) or not mean or not all(0 <= x <= 1 for x in mean) or not all(0 < x <= 1 for x in std):
        must = "must be as many numbers each, one or one per channel, for values in [0, 1]: mean from 0 to 1, std above 0 and up to 1"
        raise config.InputError(f"{file}: {keys[0]}={given[0]}, {keys[1]}={given[1]}: {must}; mend it, or move it away")
    return tuple(map(float, mean)), tuple(map(float, std))
