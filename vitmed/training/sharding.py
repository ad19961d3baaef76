"""Mesh and shardings, from shapes alone: the batch over `data` and `fsdp`, parameters and optimiser state over `fsdp`.

Everything is jitted over global arrays with `NamedSharding`s; models and steps name no mesh axis. On one device all of it is trivial.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vitmed import config

BATCH_AXES = ("data", "fsdp")
# Arrays below this many elements per run are copied to every device: sharding them saves nothing and costs a gather.
SMALLEST_SHARDED = 2**14


def make_mesh(*, data: int, fsdp: int, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of data x fsdp devices; `data=-1` takes what is left. InputError where the devices do not suffice or divide."""
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if fsdp < 1 or (data != -1 and data < 1):
        raise config.InputError(f"mesh.data={data}, mesh.fsdp={fsdp}: must be positive (mesh.data=-1 takes the devices that are left)")
    if data == -1:
        if count % fsdp:
            allowed = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise config.InputError(f"mesh.fsdp={fsdp} does not divide the {count} devices; choose one of {allowed}")
        data = count // fsdp
    if data * fsdp > count:
        raise config.InputError(f"mesh.data={data} times mesh.fsdp={fsdp} needs {data * fsdp} devices, there are {count}; lower one")
    shape = (data, fsdp)
    # Auto axes: XLA's partitioner places what is inside; Explicit ones (the default) refuse dropout and concatenation in linen.
    return jax.make_mesh(shape, BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=np.array(devices[: math.prod(shape)]))


def data_parts(num_devices: int, *, data: int, fsdp: int, batch_sizes: Sequence[int]) -> int:
    """`data`; for -1 as many of the devices that fsdp leaves as divide all batches, so that the defaults run on any number of them."""
    if data != -1:
        return data
    fsdp = max(1, fsdp)
    most, common = max(1, num_devices // fsdp), math.gcd(*batch_sizes) // fsdp
    return next((number for number in range(most, 0, -1) if common % number == 0), 1)


def check_batch(mesh: Mesh, name: str, batch_size: int) -> None:
    """InputError where a batch cannot be split evenly over the mesh."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        fsdp = math.gcd(batch_size, mesh.shape["fsdp"])
        data = math.gcd(batch_size // fsdp, mesh.shape["data"])
        raise config.InputError(
            f"{name}={batch_size} does not divide over {parts} devices; take a multiple of {parts}, or fewer devices "
            f"(mesh.data={data}, mesh.fsdp={fsdp})"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh, axis: int) -> NamedSharding:
    """Arrays whose axis `axis` is the batch."""
    return NamedSharding(mesh, PartitionSpec(*([None] * axis), BATCH_AXES))


def state(mesh: Mesh, shapes: Any) -> Any:
    """Shardings of a pytree [R, ...]: the last largest axis that `fsdp` divides is split, small arrays and R are not."""
    parts = mesh.shape["fsdp"]

    def of(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        own = leaf.shape[1:]
        axes = [axis for axis, size in enumerate(own) if size % parts == 0]
        if parts == 1 or not axes or math.prod(own) < SMALLEST_SHARDED:
            return replicated(mesh)
        widest = max(axes, key=lambda axis: (own[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if axis == widest + 1 else None for axis in range(len(leaf.shape)))))

    return jax.tree.map(of, shapes)
