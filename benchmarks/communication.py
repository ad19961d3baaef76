"""What the devices of a mesh send each other in a training step, by arithmetic: plain numbers in and out."""

from typing import NamedTuple

from vitmed import cost


def gathered_bytes(size: float, devices: int) -> float:
    """Return the bytes each device receives where all gather an array of `size` bytes split over them: (p - 1) / p size.

    As many where an array of that size is summed over them into split ones (reduce-scatter). Both in a ring, the least there can be
    (Chan et al., Collective communication: theory, practice, and experience, 2007).
    """
    return (devices - 1) / devices * size


def summed_bytes(size: float, devices: int) -> float:
    """Return the bytes each device receives where an array of `size` bytes is summed over them, whole everywhere: 2 (p - 1) / p size.

    A reduce-scatter and a gather (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009).
    """
    return 2 * gathered_bytes(size, devices)


class Communication(NamedTuple):
    """Bytes that each device receives in a step, by what they are: gradients summed, parameters split over fsdp, keys and values."""

    gradients: float
    parameters: float
    tokens: float


def communication(
    *,
    num_params: int,
    num_tokens: int,
    width: int,
    depth: int,
    batch_size: int,
    data: int = 1,
    fsdp: int = 1,
    sequence: int = 1,
    num_runs: int = 1,
    recomputed: bool = False,
    bytes_per_activation: int = 4,
) -> Communication:
    """Return what a step of `batch_size` images of each of the runs computed at once receives on each device of a mesh.

    Gradients: those of a device's part of the parameters are summed over `data`, and over `sequence`, since each of its devices has those
    of its tokens. Parameters: gathered over `fsdp` in the forward and in the backward pass, their gradients reduce-scattered (arXiv
    1910.02054). Tokens: every block gathers keys and values, 2 B N D numbers, over `sequence`, again in the backward pass where blocks are
    `recomputed`, and reduce-scatters their gradients. N is filled up to a multiple of `sequence`.
    """
    params = num_params * cost.BYTES_OF_A_PARAMETER * num_runs
    filled = num_tokens + -num_tokens % sequence
    keys_and_values = 2 * batch_size / (data * fsdp) * num_runs * filled * width * bytes_per_activation
    return Communication(
        gradients=summed_bytes(params / fsdp, data * sequence),
        parameters=3 * gathered_bytes(params, fsdp),
        tokens=depth * (2 + recomputed) * gathered_bytes(keys_and_values, sequence),
    )
