"""Mesh and shardings, from shapes alone: batch over `data` and `fsdp`, parameters and optimiser state over `fsdp`, tokens over `sequence`.

Everything is jitted over global arrays with `NamedSharding`s; models and steps name no mesh axis: where tokens are split, the model is
handed an attention function that knows. On one device all of it is trivial.
Shapes: `B` batch, `N` tokens, `H` heads, `d` width of a head.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vitmed import config

AXES = ("data", "fsdp", "sequence")
BATCH_AXES = ("data", "fsdp")
# Arrays below this many elements per run are copied to every device: sharding them saves nothing and costs a gather.
SMALLEST_SHARDED = 2**14


def make_mesh(*, data: int, fsdp: int, sequence: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of data x fsdp x sequence devices; `data=-1` takes what is left. InputError where the devices do not suffice or divide."""
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if min(fsdp, sequence) < 1 or (data != -1 and data < 1):
        given = f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.sequence={sequence}"
        raise config.InputError(f"{given}: must be positive (mesh.data=-1 takes the devices that are left)")
    if data == -1:
        for name, parts, left in (("fsdp", fsdp, count), ("sequence", sequence, count // fsdp)):
            if left < 1 or left % parts:
                allowed = ", ".join(str(n) for n in range(1, max(1, left) + 1) if left % n == 0)
                beside = f" that mesh.fsdp={fsdp} leaves" if name == "sequence" and fsdp > 1 else ""
                raise config.InputError(f"mesh.{name}={parts} does not divide the {left} devices{beside}; choose one of {allowed}")
        data = count // (fsdp * sequence)
    shape = (data, fsdp, sequence)
    needed = math.prod(shape)
    if needed > count:
        named = " times ".join(f"mesh.{name}={size}" for name, size in zip(AXES, shape, strict=True) if size > 1)
        raise config.InputError(f"{named} needs {needed} devices, there are {count}; lower one")
    # Auto axes: XLA's partitioner places what is inside; Explicit ones (the default) refuse dropout and concatenation in linen.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=np.array(devices[:needed]))


def data_parts(num_devices: int, *, data: int, fsdp: int, sequence: int = 1, batch_sizes: Sequence[int]) -> int:
    """`data`; for -1 as many of the devices that the others leave as divide all batches, so that the defaults run on any number of them."""
    if data != -1:
        return data
    fsdp, sequence = max(1, fsdp), max(1, sequence)
    most, common = max(1, num_devices // (fsdp * sequence)), math.gcd(*batch_sizes) // fsdp
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


def check_processes(mesh: Mesh) -> None:
    """InputError where one of a run's processes would have nothing to do, and so wait for ever."""
    busy, number = len({device.process_index for device in mesh.devices.flat}), jax.process_count()
    if busy < number:
        given = ", ".join(f"mesh.{name}={size}" for name, size in mesh.shape.items())
        raise config.InputError(
            f"{given}: these {mesh.size} devices are of {busy} of the {number} processes; start fewer processes, "
            "or take batches (train.batch_size, eval.batch_size) that all devices can share, or mesh.fsdp or mesh.sequence"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh, axis: int) -> NamedSharding:
    """Arrays whose axis `axis` is the batch."""
    return NamedSharding(mesh, PartitionSpec(*([None] * axis), BATCH_AXES))


def own(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which examples of a batch are this process's to feed: all of them where it is alone."""
    held = batch(mesh, axis=0).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))


def put(arrays: Any, place: NamedSharding, *, axis: int | None = None, batch_size: int = 0) -> Any:
    """Arrays on the devices; each of several processes gives them whole or, where `axis` is the batch's, its `own` of `batch_size`."""
    if place.is_fully_addressable:
        return jax.device_put(arrays, place)
    mine = None if axis is None else own(place.mesh, batch_size)

    def one(array: np.ndarray) -> jax.Array:
        if axis is None:
            return jax.make_array_from_callback(array.shape, place, lambda index: array[index])
        shape = (*array.shape[:axis], batch_size, *array.shape[axis + 1 :])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            return array[(*index[:axis], np.searchsorted(mine, np.arange(batch_size)[index[axis]]), *index[axis + 1 :])]

        return jax.make_array_from_callback(shape, place, part)

    return jax.tree.map(one, arrays)


def state(mesh: Mesh, shapes: Any, *, leading: int = 1) -> Any:
    """Shardings of a pytree [R, ...]: the last largest axis that `fsdp` divides is split, small arrays and R are not.

    `leading` axes stand before a parameter's own: R alone, or none where all runs share it.
    """
    parts = mesh.shape["fsdp"]

    def of(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        own = leaf.shape[leading:]
        axes = [axis for axis, size in enumerate(own) if size % parts == 0]
        if parts == 1 or not axes or math.prod(own) < SMALLEST_SHARDED:
            return replicated(mesh)
        widest = max(axes, key=lambda axis: (own[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if axis == widest + leading else None for axis in range(len(leaf.shape)))))

    return jax.tree.map(of, shapes)


Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def attention(mesh: Mesh, local: Attention, *, num_tokens: int) -> Attention:
    """`local` attention (q, k, v [B, N, H, d]) on every device's own images and, with N split over `sequence`, its own queries.

    Left to XLA's partitioner, a loop over images and heads would gather them all on every device. Where tokens are split, keys and values
    are gathered: the model fills its tokens up to a multiple of the axis, those beyond `num_tokens` are cut off once gathered, so that
    nobody attends to fillers, and what becomes of fillers as queries nobody looks at. Queries that do not divide (CLS alone, in the last
    block) are computed on every device of the axis, as is what has keys of another number of tokens (a pooling).
    """
    parts = mesh.shape["sequence"]
    images_parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    filled = num_tokens + -num_tokens % parts
    if mesh.size == 1:
        return local

    def gathering(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jax.lax.all_gather(part, "sequence", axis=1, tiled=True)[:, :num_tokens] for part in (k, v))
        return local(q, k, v)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        split = parts > 1 and k.shape[1] == filled
        if q.shape[0] % images_parts:  # such as one image, from which parameters are made
            return local(q, k[:, :num_tokens], v[:, :num_tokens]) if split else local(q, k, v)
        of_keys = PartitionSpec(BATCH_AXES, "sequence" if split else None)
        of_queries = of_keys if q.shape[1] == k.shape[1] else PartitionSpec(BATCH_AXES)
        # Replication is not checked: that every device of an axis computes the same for a lone query is not what JAX can infer.
        mapped = jax.shard_map(
            gathering if split else local, mesh=mesh, in_specs=(of_queries, of_keys, of_keys), out_specs=of_queries, check_vma=False
        )
        return mapped(q, k, v)

    return attend
