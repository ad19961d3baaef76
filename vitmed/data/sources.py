"""A name becomes a data set: the MedMNIST sets, which are files, and the phantoms, which are generated.

Shapes: images uint8 [N, *S, C], labels int32 [N, L], with *S = H,W or D,H,W; see dataset.py.
"""

import types

from vitmed import config
from vitmed.data import medmnist, phantoms
from vitmed.data.dataset import Dataset, Description, Split, inverted

__all__ = ["Dataset", "Description", "Split", "describe", "load", "names"]


def names() -> tuple[str, ...]:
    """Every name that `describe` and `load` take."""
    return (*medmnist.entries(), *phantoms.NAMES)


def describe(name: str, size: int) -> Description:
    """What the set is at `size` pixels per axis, without its data; InputError for an unknown name or size."""
    source = _source(name)
    sizes = source.sizes(name)
    if size not in sizes:
        raise config.InputError(f"data.size={size!r}: {name} comes in {', '.join(map(str, sizes))}; set data.size to one of these")
    return source.describe(name, size)


def load(name: str, *, size: int, root: str = "", verify: bool = True, invert: bool = False) -> Dataset:
    """The set in memory, downloaded where no folder holds it; `verify` insists on the official MD5. InputError, MachineError.

    Files are looked for in `root`, $VITMED_DATA and ~/.medmnist; phantoms need neither `root` nor `verify`. `invert`: see `inverted`.
    """
    describe(name, size)
    loaded = phantoms.load(name, size=size) if name in phantoms.NAMES else medmnist.load(name, size=size, root=root, verify=verify)
    return inverted(loaded) if invert else loaded


def _source(name: str) -> types.ModuleType:
    """The module that knows the name; InputError with the nearest names, or all of them where none is near."""
    if name in phantoms.NAMES:
        return phantoms
    if name in medmnist.entries():
        return medmnist
    raise config.InputError(f"data.name={name!r} is unknown; {config.nearest(str(name).lower(), names())}")
