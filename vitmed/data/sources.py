"""A name becomes a data set: the MedMNIST sets, which are files, the phantoms, which are generated, and `folder:PATH`, own data.

Shapes: images uint8 [N, *S, C], labels int32 [N, L], with *S = H,W or D,H,W; see dataset.py.
"""

import types
from collections.abc import Sequence

from vitmed import config
from vitmed.data import folder, medmnist, phantoms
from vitmed.data.dataset import Dataset, Description, Split, inverted, of_record

__all__ = ["Dataset", "Description", "Split", "describe", "load", "names", "of_record"]


def names() -> tuple[str, ...]:
    """Every name that `describe` and `load` take, besides folder:PATH."""
    return (*medmnist.entries(), *phantoms.NAMES)


def is_own(name: str) -> bool:
    """Whether a name is that of own data."""
    return str(name).startswith(folder.PREFIX)


def describe(name: str, size: int | Sequence[int], *, root: str = "", own: folder.Settings | None = None) -> Description:
    """What the set is at `size` pixels per axis, one number or one for each, without its data; InputError for an unknown name or size.

    `own`, which folder:PATH needs, says how own data are read; of these names and headers are looked at.
    """
    if is_own(name):
        return folder.describe(name, _per_axis(size), _known(own), root=root)
    return _source(name).describe(name, _size(name, size))


def load(
    name: str,
    *,
    size: int | Sequence[int],
    root: str = "",
    verify: bool = True,
    invert: bool = False,
    own: folder.Settings | None = None,
) -> Dataset:
    """The set in memory, downloaded where no folder holds it; `verify` insists on the official MD5. InputError, MachineError.

    Files are looked for in `root`, $VITMED_DATA and ~/.medmnist; phantoms need neither `root` nor `verify`. `invert`: see `inverted`.
    """
    if is_own(name):
        loaded = folder.load(name, _per_axis(size), _known(own), root=root)
    elif name in phantoms.NAMES:
        loaded = phantoms.load(name, size=_size(name, size))
    else:
        loaded = medmnist.load(name, size=_size(name, size), root=root, verify=verify)
    return inverted(loaded) if invert else loaded


def _known(own: folder.Settings | None) -> folder.Settings:
    if own is None:
        raise ValueError("own data need a folder.Settings: at least whether they are images or volumes")
    return own


def _per_axis(size: int | Sequence[int]) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)


def _size(name: str, size: int | Sequence[int]) -> int:
    """The pixels along every axis; InputError where the set does not come in them."""
    sizes, given = _source(name).sizes(name), _per_axis(size)
    if len(set(given)) != 1 or given[0] not in sizes:
        said = given[0] if len(given) == 1 else given
        raise config.InputError(f"data.size={said!r}: {name} comes in {', '.join(map(str, sizes))}; set data.size to one of these")
    return given[0]


def _source(name: str) -> types.ModuleType:
    """The module that knows the name; InputError with the nearest names, or all of them where none is near."""
    if name in phantoms.NAMES:
        return phantoms
    if name in medmnist.entries():
        return medmnist
    raise config.InputError(f"data.name={name!r} is unknown; {config.nearest(str(name).lower(), names())}, or folder:PATH for your own")
