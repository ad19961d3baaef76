"""What a planned run will cost on a device: its memory, held against what there is, and its time against that of other runs.

Nothing here reads data or weights, and only the arithmetic of `cost` speaks, so that what cannot fit is refused before anything is begun.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from vitmed import budget, cost, experiment
from vitmed import config as config_lib
from vitmed import network as networks
from vitmed.runs import machine

UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def outline(config: ml_collections.ConfigDict, recorded: networks.Network | None = None) -> experiment.Experiment:
    """`experiment.plan` without looking for pretrained weights: the variant's own architecture stands for theirs."""
    return experiment.plan(config, recorded, look=False)


def misfit(planned: experiment.Experiment, device: machine.Device) -> str | None:
    """Why a run cannot fit the device, with the numbers; None where it may."""
    least = budget.memory(planned, device).least
    if device.memory_bytes is None or least <= device.memory_bytes:
        return None
    return f"at least {gigabytes(least)} of memory are needed, and {device.name} has {gigabytes(device.memory_bytes)}"


def advice(planned: experiment.Experiment, device: machine.Device) -> str:
    """What makes a run that does not fit smaller."""
    larger = "a larger patch or a smaller model.variant"
    planned = budget.largest(planned)
    if budget.memory(planned, device, images=1).least > device.memory_bytes:
        return f"take {larger}: not even train.micro_batch_size=1 fits"
    return f"lower train.micro_batch_size (it is {budget.micro_batch_size(planned, device)}), or take {larger}"


def require_fit(planned: experiment.Experiment, device: machine.Device) -> None:
    """InputError where a run cannot fit the device; a line on stderr where it is likely not to."""
    if fault := misfit(planned, device):
        raise config_lib.InputError(f"{planned.label}: {fault}; {advice(planned, device)}")
    warn(planned, device, planned.label)


def warn(planned: experiment.Experiment, device: machine.Device, name: str) -> None:
    """A line on stderr where a run is likely not to fit the device, though it may."""
    likely = budget.memory(planned, device).likely
    if device.memory_bytes is not None and likely > device.memory_bytes:
        numbers = f"it is likely to take {gigabytes(likely)} of memory, and {device.name} has {gigabytes(device.memory_bytes)}"
        mend = "lower train.micro_batch_size or eval.batch_size, or take a larger patch"
        print(f"vitmed: {name} may not fit: {numbers}; should it fail, {mend}", file=sys.stderr)


def gigabytes(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:,.1f} GB"


def seconds(planned: experiment.Experiment) -> float:
    """What training and testing take by arithmetic, in seconds of no real machine: the proportion to other runs is what counts."""
    train, examples = planned.config.train, planned.description.num_examples
    steps = train.epochs * math.ceil(examples["train"] / train.batch_size)
    predicted = examples["val"] * (train.epochs + 1) + examples["test"]
    gmacs_forward = sum(form.gmacs_forward for form in planned.forms)
    return steps * planned.step_seconds + predicted * len(planned.seeds) * gmacs_forward / cost.GMACS_PER_SECOND


def seconds_left(done: Sequence[tuple[float, Mapping[str, Any]]], left: Sequence[float]) -> float | None:
    """Seconds for the points left, from (arithmetic, result) of those done and the arithmetic of those left; None before any is done.

    The arithmetic is scaled by what training took so far; each point takes the mean of the compilations besides.
    """
    if not done:
        return None
    scale = sum(result["train_seconds"] for _, result in done) / sum(arithmetic for arithmetic, _ in done)
    compilation = sum(result["compile_seconds"] for _, result in done) / len(done)
    return scale * sum(left) + compilation * len(left)


def duration_text(seconds: float) -> str:
    """Such as 2 d 3 h, 1 h 20 min, 45 s: the two largest units, the second one where it is not zero."""
    rest = max(1, round(seconds))
    parts = []
    for size, unit in UNITS:
        number, rest = divmod(rest, size)
        parts.append((number, unit))
    first = next(index for index, (number, _) in enumerate(parts) if number)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2] if number)
