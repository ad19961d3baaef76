"""What a run or a study takes on devices that need not be here: seconds, device hours, memory and communication, by arithmetic.

    python -m benchmarks.scale --config=configs/vit3d.py:size=64,patch=1 --device=h100 --mesh=1,1,8 --config.model.dtype=bfloat16
    python -m benchmarks.scale --config=configs/vit2d.py --sweep --datasets=all --variants=vit_ti,vit_s,vit_b --device=a100

A step is arithmetic, memory traffic, communication and a floor for starting its kernels. On accelerators, where this project has measured
nothing, each has a best and a worst case: the best step is the largest of the four in their best case (all at once), the worst is the sum
of their worst. The CPU's rates are fitted to measured steps (benchmarks.prediction). See docs/scale.md.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks import communication as communications
from vitmed import budget, cli, cost, experiment, forecast
from vitmed import config as config_lib
from vitmed.data import medmnist
from vitmed.models import build
from vitmed.runs import machine
from vitmed.study import points

UTILISATION = (0.5, 0.25)  # of the published peak, best and worst: an assumption
LINK_SHARE = (1.0, 0.5)  # of a link's published rate: an assumption
KERNELS_PER_BLOCK = 150  # 1,800 kernels of the CPU's program of 12 blocks (docs/performance.md); an accelerator's were not counted
# Passes over the main memory in a forward and backward pass, an assumption: each number that the backward pass keeps is written, read,
# read again and met by its gradient; scores are written and read as scores and as weights, and twice that going back. cuDNN keeps none.
ACTIVATION_PASSES, SCORE_PASSES = 4, 12


class Device(NamedTuple):
    """A device: bytes, bytes/s and FLOP/s, the latter by the config's dtype, in linear layers and in attention.

    `links` are bytes/s one way, among the `node` devices that share the fast one and beyond them. `launch` is what a kernel costs to
    start, best and worst. `fitted` rates were measured and are taken as they are; others are published peaks.
    """

    name: str
    platform: str
    flops: dict[str, tuple[float, float]]
    memory_rate: float
    memory_bytes: int | None
    links: tuple[float, float] = (math.inf, math.inf)
    node: int = 8
    launch: tuple[float, float] = (1e-6, 5e-6)
    fitted: bool = False


def _peaks(float32: float, bfloat16: float) -> dict[str, tuple[float, float]]:
    """FLOP/s by dtype from dense TFLOP/s. JAX multiplies float32 in TF32 where a GPU has it, in bfloat16 on a TPU."""
    return {"float32": (float32 * 1e12,) * 2, "bfloat16": (bfloat16 * 1e12,) * 2}


# Published peaks, dense; sources in docs/scale.md. Beyond a node: one 400 Gb/s (A100: 200) adapter per GPU.
DEVICES = {
    "h200": Device("NVIDIA H200 SXM", "gpu", _peaks(494.7, 989.4), 4.8e12, 141 * 10**9, (450e9, 50e9)),
    "h100": Device("NVIDIA H100 SXM", "gpu", _peaks(494.7, 989.4), 3.35e12, 80 * 10**9, (450e9, 50e9)),
    "a100": Device("NVIDIA A100 SXM 80 GB", "gpu", _peaks(156, 312), 2.039e12, 80 * 10**9, (300e9, 25e9)),
    "t4": Device("NVIDIA T4", "gpu", {"float32": (8.1e12, 8.1e12)}, 0.32e12, 16 * 10**9, (16e9, 16e9), node=1),
    "v5e": Device("TPU v5e", "tpu", _peaks(197, 197), 0.819e12, 16 * 10**9, (200e9, 200e9), node=256, launch=(0.0, 1e-6)),
    # Fitted by benchmarks.prediction to four steps on the two cores of docs/performance.md.
    "cpu": Device("two CPU cores", "cpu", {"float32": (156e9, 106e9)}, 18.9e9, None, launch=(0.0, 0.0), fitted=True),
}


class Mesh(NamedTuple):
    """Devices along the axes of the mesh."""

    data: int
    fsdp: int
    sequence: int


class Work(NamedTuple):
    """A step on one device: FLOP in linear layers and in attention, bytes through memory and over links, kernels."""

    linear: float
    attention: float
    traffic: float
    communication: communications.Communication
    kernels: int


class Estimate(NamedTuple):
    """What a run takes: `seconds` of a step and `hours` of all devices together, best and worst; bytes on each device; how often a step."""

    work: Work
    seconds: tuple[float, float]
    hours: tuple[float, float]
    memory: cost.Memory
    remat: str
    attention: str
    steps: float


# --- the arithmetic -------------------------------------------------------------------------------------------------------------


def work(planned: experiment.Experiment, device: Device, mesh: Mesh) -> Work:
    """A step of all seeds on one device of the mesh."""
    architecture, config, there = planned.network.architecture, planned.config, _machine(device, mesh)
    form, remat = planned.attention_form(device.platform), budget.remat(planned, there)
    sizes = {"num_tokens": planned.num_tokens, "width": architecture.width, "depth": architecture.depth}
    pooled = build.model(architecture, patch_size=planned.patch_size, num_classes=1).num_pooled_tokens
    of_attention = cost.attention_gmacs(**sizes, num_pooled_tokens=pooled)
    forward = cost.gmacs_forward(**planned.shape, pooling=architecture.pooling, num_pooled_tokens=pooled)
    once = {"remat": remat, "keeps_weights": form == "plain"}
    kept = cost.activations_per_example(
        **{name: value for name, value in planned.shape.items() if name != "num_classes"}, num_heads=architecture.num_heads
    )
    width = 2 if config.model.dtype == "bfloat16" else 4
    images = config.train.batch_size * len(planned.seeds)  # of which a device computes a share of
    share = images / math.prod(mesh)
    parts = config.train.batch_size // budget.micro_batch_size(planned, there)
    params = cost.num_params(**planned.shape)
    traffic = cost.BYTES_OF_A_PARAMETER * params * len(planned.seeds) / mesh.fsdp * (7 + (3 if parts == 1 else 5 * parts))
    if not device.fitted:  # a CPU's rates hold what its caches leave of these
        scores = 0 if form == "cudnn" else SCORE_PASSES * kept.attention_weights * cost.BYTES_OF_A_SCORE
        traffic += share * (1 + (remat == "blocks") / 3) * (ACTIVATION_PASSES * kept.linear * width + scores)
    moved = communications.communication(
        num_params=params,
        batch_size=config.train.batch_size // parts,
        **sizes,
        **mesh._asdict(),
        num_runs=len(planned.seeds),
        recomputed=remat == "blocks",
        bytes_per_activation=width,
    )
    return Work(
        linear=2e9 * share * cost.training_gmacs(linear=forward - of_attention, attention=0, **once),
        attention=2e9 * share * cost.training_gmacs(linear=0, attention=of_attention, **once),
        traffic=traffic,
        communication=communications.Communication(*(parts * size for size in moved)),
        kernels=KERNELS_PER_BLOCK * architecture.depth,
    )


def step_seconds(done: Work, device: Device, dtype: str, count: int) -> tuple[float, float]:
    """Seconds of a step on `count` devices, best and worst."""
    rates = device.flops[dtype]
    arithmetic, memory = done.linear / rates[0] + done.attention / rates[1], done.traffic / device.memory_rate
    if device.fitted:
        return (arithmetic + memory,) * 2
    link, received = device.links[count > device.node], sum(done.communication)
    cases = [
        (arithmetic / share, memory, received / (link * of_link), done.kernels * launch)
        for share, of_link, launch in zip(UTILISATION, LINK_SHARE, device.launch, strict=True)
    ]
    return max(cases[0]), sum(cases[1])


def estimate(planned: experiment.Experiment, device: Device, mesh: Mesh) -> Estimate:
    """A run of all seeds. A validation after every epoch and the test count as a third of a step for as many images."""
    there, train, examples = _machine(device, mesh), planned.config.train, planned.description.num_examples
    done = work(planned, device, mesh)
    seconds = step_seconds(done, device, planned.config.model.dtype, math.prod(mesh))
    predicted = (examples["val"] * (train.epochs + 1) + examples["test"]) / train.batch_size
    steps = train.epochs * math.ceil(examples["train"] / train.batch_size) + predicted / 3
    return Estimate(
        work=done,
        seconds=seconds,
        hours=tuple(math.prod(mesh) * steps * one / 3600 for one in seconds),
        memory=budget.memory(planned, there),
        remat=budget.remat(planned, there),
        attention=planned.attention_form(device.platform),
        steps=steps,
    )


def _machine(device: Device, mesh: Mesh) -> machine.Device:
    return machine.Device(device.platform, device.name, math.prod(mesh), device.memory_bytes)


# --- a config, a sweep ----------------------------------------------------------------------------------------------------------


def plan(spec: str, overrides: dict[str, str], device: Device, mesh: Mesh) -> experiment.Experiment:
    """The run of a config on a mesh; InputError where its batches do not divide over it or the device has no such dtype."""
    planned = forecast.outline(config_lib.load(spec, overrides | {f"mesh.{axis}": str(size) for axis, size in mesh._asdict().items()}))
    config, parts = planned.config, mesh.data * mesh.fsdp
    config_lib.one_of("model.dtype", config.model.dtype, device.flops)
    for name, size in (("train.batch_size", config.train.batch_size), ("eval.batch_size", config.eval.batch_size)):
        config_lib.require(size % parts == 0, name, size, f"a multiple of data x fsdp = {parts}, over which --mesh splits it")
    config_lib.require(mesh.sequence <= planned.num_tokens, "--mesh sequence", mesh.sequence, f"at most {planned.num_tokens}, the tokens")
    return planned


def specs(flags: argparse.Namespace) -> list[str]:
    """--config as it is, or of its sweep every point, with other data sets and variants where these are given."""
    path, _, argument = flags.config.partition(":")
    if not flags.sweep:
        config_lib.require(not flags.datasets and not flags.variants, "--datasets or --variants", "...", "given together with --sweep")
        return [flags.config]
    config_lib.require(not argument, "--config", flags.config, "without arguments: with --sweep the points give them")
    found = [dict(point.arguments) for point in points.of_sweep(config_lib.load_module(path))]
    datasets = flags.datasets.split(",")
    if flags.datasets == "all":
        rank = config_lib.load(path).data.rank
        datasets = [name for name, entry in medmnist.entries().items() if entry.description.rank == rank]
    for key, values in (("dataset", datasets), ("variant", flags.variants.split(","))):
        if values != [""]:
            found = [point | {key: value} for value in values for point in found]
    return list(dict.fromkeys(f"{path}:{points.Point(point).argument}" for point in found))


def describe(planned: experiment.Experiment, device: Device, mesh: Mesh) -> str:
    """One run with its arithmetic."""
    made, config = estimate(planned, device, mesh), planned.config
    done, moved, count = made.work, made.work.communication, math.prod(mesh)
    several = f"{count} x " if count > 1 else ""
    lines = [
        f"{planned.label}, {config.model.variant}, {config.model.dtype}, on {several}{device.name} (mesh {','.join(map(str, mesh))})",
        f"  model          {planned.num_tokens:,} tokens, {cost.num_params(**planned.shape):,} parameters, attention {made.attention},"
        f" computed again: {made.remat}",
        f"  a step         {config.train.batch_size} images of each of {len(planned.seeds)} seeds; on a device:",
        f"  arithmetic     {(done.linear + done.attention) / 1e12:,.3f} TFLOP, of which attention {done.attention / 1e12:,.3f}",
        f"  memory traffic {done.traffic / 1e9:,.3f} GB",
        f"  communication  {sum(moved) / 1e9:,.3f} GB: gradients {moved.gradients / 1e9:,.3f}, parameters {moved.parameters / 1e9:,.3f},"
        f" keys and values {moved.tokens / 1e9:,.3f}",
        f"  memory         {forecast.gigabytes(made.memory.likely)} likely, {forecast.gigabytes(made.memory.least)} at least"
        + (f", of {forecast.gigabytes(device.memory_bytes)}" if device.memory_bytes else ""),
        f"  seconds        {_range(made.seconds)} a step, {made.steps:,.0f} steps (validation and test counted in)",
        f"  device hours   {_range(made.hours)}",
    ]
    return "\n".join(lines)


def summarise(planned: Sequence[experiment.Experiment], device: Device, mesh: Mesh) -> str:
    """A sweep as a table: a row for each model and patch, all of its data sets together, and the sum."""
    groups: dict[tuple[str, str, int], list[Estimate]] = {}
    for one in planned:
        key = (one.config.model.variant, config_lib.patch_text(one.patch_size), one.num_tokens)
        groups.setdefault(key, []).append(estimate(one, device, mesh))
    rows = [
        "| model | patch | tokens | runs | steps | device hours | memory, likely GB | computed again |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for (variant, patch, tokens), made in groups.items():
        hours = [sum(one.hours[case] for one in made) for case in (0, 1)]
        remats = ", ".join(dict.fromkeys(one.remat for one in made))
        most = max(one.memory.likely for one in made)
        memory = f"{most / 1e9:,.1f}{', more than it has' if most > (device.memory_bytes or math.inf) else ''}"
        steps = sum(one.steps for one in made)
        rows.append(f"| {variant} | {patch} | {tokens:,} | {len(made)} | {steps:,.0f} | {_range(hours)} | {memory} | {remats} |")
    every = [one for made in groups.values() for one in made]
    hours = [sum(one.hours[case] for one in every) for case in (0, 1)]
    rows.append(f"| all | | | {len(every)} | {sum(one.steps for one in every):,.0f} | {_range(hours)} | | |")
    return "\n".join(rows)


def _range(values: Sequence[float]) -> str:
    best, worst = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)
    return best if best == worst else f"{best} to {worst}"


def make_parser() -> cli.Parser:
    """The flags."""
    parser = cli.Parser(prog="benchmarks.scale", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE[:ARGUMENTS]", help="as vitmed.main takes it, and --config.FIELD=VALUE")
    parser.add_argument("--device", default="h100", help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--mesh", default="1,1,1", metavar="DATA,FSDP,SEQUENCE", help="devices along each axis; default 1,1,1")
    parser.add_argument("--sweep", action="store_true", help="every point of the config's sweep(), as one table")
    parser.add_argument("--datasets", default="", help="with --sweep: these sets instead of its own; all: every MedMNIST set of its rank")
    parser.add_argument("--variants", default="", help="with --sweep: these models instead of its own, such as vit_ti,vit_s")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the estimate of a run or the table of a sweep."""
    flags, overrides = cli.parse_flags(make_parser(), argv)
    device = DEVICES[config_lib.one_of("--device", flags.device, DEVICES)]
    sizes = config_lib.parse("--mesh", flags.mesh, (1, 1, 1))
    config_lib.require(len(sizes) == 3 and min(sizes) > 0, "--mesh", sizes, "three positive numbers: data,fsdp,sequence")
    given = sorted(f"--config.{field}" for field in overrides if field.startswith("mesh."))
    config_lib.require(not given, ", ".join(given), "...", "given as --mesh=DATA,FSDP,SEQUENCE")
    mesh = Mesh(*sizes)
    several = device.fitted and math.prod(mesh) > 1
    config_lib.require(not several, "--mesh", sizes, f"1,1,1 on --device={flags.device}: devices of one machine would share its cores")
    planned = [plan(spec, overrides, device, mesh) for spec in specs(flags)]
    print(summarise(planned, device, mesh) if flags.sweep else describe(planned[0], device, mesh))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run_cli(main, sys.argv[1:]))
