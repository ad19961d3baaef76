"""The MedMNIST v2 sets (https://medmnist.com) in every size: find the official .npz file, or download it, and read it safely.

What the sets are comes from info.py of the installed medmnist package, read as text: importing it drags in torch and creates
~/.medmnist. Before anything is decompressed, every array must declare what the set must hold; nothing is ever unpickled.
Shapes: `N` examples, `*S` H,W or D,H,W, `C` channels, `L` labels of one example.
"""

import ast
import dataclasses
import errno
import functools
import importlib.util
import os
import pathlib
import re
import zipfile
from typing import BinaryIO

import numpy as np

from vitmed import config, npz
from vitmed.data import dataset, download

TASKS = {
    "binary-class": "binary",
    "multi-class": "multi-class",
    "multi-label, binary-class": "multi-label",
    "ordinal-regression": "ordinal",
}
MAX_GROWTH = 8  # an unverified file may hold this many times the official number of examples: a bound for the memory it can ask for


@dataclasses.dataclass(frozen=True)
class Entry:
    """One set of MedMNIST's table: what it is at 28 pixels, and for each size its (url, md5)."""

    description: dataset.Description
    files: dict[int, tuple[str, str]]


@functools.cache
def entries() -> dict[str, Entry]:
    """Name -> Entry, from the installed medmnist's info.py; MachineError where that is missing or laid out otherwise."""
    advice = "install it with: pip install --no-deps 'medmnist>=3.0.2,<4'"
    spec = importlib.util.find_spec("medmnist")
    if spec is None or spec.origin is None:
        raise config.MachineError(f"the medmnist package, which lists the MedMNIST sets, is not installed; {advice}")
    path = pathlib.Path(spec.origin).with_name("info.py")
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        tables = [node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INFO"]
        return {name: _entry(name, fields) for name, fields in ast.literal_eval(tables[0]).items()}
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise config.MachineError(f"{path} is not laid out as in medmnist 3.0 ({error!r}); {advice}") from error


def _entry(name: str, fields: dict) -> Entry:
    """One value of medmnist's INFO; a LookupError or ValueError where it is not what this module knows."""
    suffixes = [match[1] for match in map(re.compile(r"MD5((?:_\d+)?)").fullmatch, fields) if match]
    description = dataset.Description(
        name=name,
        task=TASKS[fields["task"]],
        class_names=tuple(fields["label"][str(index)] for index in range(len(fields["label"]))),
        image_size=(28,) * (3 if name.endswith("3d") else 2),
        num_channels={1: 1, 3: 3}[fields["n_channels"]],
        num_examples={split: int(fields["n_samples"][split]) for split in ("train", "val", "test")},
        licence=fields["license"],
        synthetic=False,
    )
    return Entry(description, {int(suffix[1:] or 28): (fields[f"url{suffix}"], fields[f"MD5{suffix}"]) for suffix in suffixes})


def sizes(name: str) -> tuple[int, ...]:
    """The pixels per axis that the set comes in."""
    return tuple(entries()[name].files)


def describe(name: str, size: int) -> dataset.Description:
    """What the set is, by MedMNIST's own table."""
    description = entries()[name].description
    return dataclasses.replace(description, image_size=(size,) * description.rank)


def load(name: str, *, size: int, root: str = "", verify: bool = True) -> dataset.Dataset:
    """The set in memory, from the first folder that holds its file, else downloaded; InputError (the file), MachineError.

    `verify=False` accepts another MD5 and other numbers of examples; shapes, dtypes and label values must fit all the same.
    """
    description, (url, md5) = describe(name, size), entries()[name].files[size]
    path = locate(f"{name}.npz" if size == 28 else f"{name}_{size}.npz", root=root)
    if not os.path.exists(path):
        download.fetch(url, path, md5=md5)
    try:
        with open(path, "rb") as file:
            found = dataset.md5_of(file)
            if verify and found != md5:
                raise ValueError(f"its MD5 is {found}, the official one {md5} (data.verify=False accepts it)")
            splits = _read(file, description, verify=verify)
    except (OSError, *npz.DAMAGE) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that comes of a damaged archive, which points before its start
            raise config.InputError(f"{path}: cannot be read ({error}); mend that, or name another folder with data.root") from error
        cause, mend = config.one_line(error)[:400] or "it ends too early", f"delete it, and the next run downloads {url}"
        raise config.InputError(f"{path} is not the {name} file of size {size}: {cause}; {mend}") from error
    num_examples = {split: len(arrays.labels) for split, arrays in splits.items()}
    return dataset.Dataset(dataclasses.replace(description, num_examples=num_examples), splits, found)


def locate(filename: str, *, root: str = "") -> pathlib.Path:
    """Where the file lies: in `root`, $VITMED_DATA or ~/.medmnist; else where a download belongs: the first of these that is set."""
    if root and not os.path.isdir(os.path.expanduser(root)):
        raise config.InputError(f"data.root={str(root)!r} is not an existing folder; create it, or name the one that holds {filename}")
    folders = [folder for folder in (root, os.environ.get("VITMED_DATA"), "~/.medmnist") if folder]
    paths = [pathlib.Path(os.path.expanduser(folder), filename) for folder in folders]
    return next((path for path in paths if os.path.exists(path)), paths[0])


def _read(file: BinaryIO, description: dataset.Description, *, verify: bool) -> dict[str, dataset.Split]:
    """The splits of an .npz file; one of npz.DAMAGE where it is not a file of this set."""
    multi_label = description.task == "multi-label"
    pixels = description.image_size + ((3,) if description.num_channels == 3 else ())
    labels = (description.num_classes if multi_label else 1,)
    splits = {}
    with zipfile.ZipFile(file) as archive:
        counts = {split: _count(archive, split, pixels=pixels, labels=labels) for split in description.num_examples}
        official, total = sum(description.num_examples.values()), sum(counts.values())
        if verify and counts != description.num_examples:
            raise ValueError(f"it holds {counts} examples, the official set {description.num_examples}")
        if total > MAX_GROWTH * official:
            raise ValueError(f"it holds {total} examples, more than {MAX_GROWTH} times the official {official}: too many to be this set")
        for split, count in counts.items():
            images = npz.read_array(archive, f"{split}_images").reshape(count, *description.image_size, description.num_channels)
            values = npz.read_array(archive, f"{split}_labels")
            top = 1 if multi_label else description.num_classes - 1
            if values.min() < 0 or values.max() > top:
                raise ValueError(f"{split}_labels holds values from {values.min()} to {values.max()}, allowed are 0 to {top}")
            splits[split] = dataset.Split(np.ascontiguousarray(images), values.astype(np.int32))
    return splits


def _count(archive: zipfile.ZipFile, split: str, *, pixels: tuple[int, ...], labels: tuple[int, ...]) -> int:
    """N of a split by its two headers; ValueError where they declare other shapes or dtypes than uint8 [N, *S(, 3)], int [N, L]."""
    counts = []
    for key, tail, kinds, wanted in ((f"{split}_images", pixels, ("u1",), "uint8"), (f"{split}_labels", labels, ("i", "u"), "integers")):
        shape, dtype = npz.read_header(archive, key)
        if not dtype.str[1:].startswith(kinds):
            raise ValueError(f"{key} holds {dtype}, not {wanted}")
        if shape[1:] != tail or not shape:
            raise ValueError(f"{key} has shape {list(shape)}, not [N, {', '.join(map(str, tail))}]")
        if shape[0] < 1:
            raise ValueError(f"{key} is empty")
        counts.append(shape[0])
    if counts[0] != counts[1]:
        raise ValueError(f"the {split} split has {counts[0]} images but {counts[1]} labels")
    return counts[0]
