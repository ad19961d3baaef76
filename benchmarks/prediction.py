"""What `benchmarks.scale` predicts for a CPU beside what was measured: seconds of a step, and with --memory bytes of its compiled program.

    python -m benchmarks.prediction
    python -m benchmarks.prediction --memory
    python -m benchmarks.prediction --rounds=3
    python -m benchmarks.prediction --runs=docs/results/study/vit2d

The CPU's three rates (memory, linear layers, attention) are fitted to the steps marked so, by least squares of the relative errors, and
predict the others. Measured are times of docs/performance.md's EPYC on 2026-11-27, a quieter day than that of its table, and of its
"Growth"; with --rounds those of this machine, the smallest of the rounds' medians, since others on the machine can only add to them. --runs
holds finished runs against their whole prediction. The memory's factors, in `cost.training_memory`, were fitted to programs of which some
are among these.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import scipy.optimize

from benchmarks import scale, step
from vitmed import budget, cli, cost, experiment
from vitmed import config as config_lib
from vitmed.runs import folder, machine
from vitmed.training import programs

CPU, ALONE = scale.DEVICES["cpu"], scale.Mesh(1, 1, 1)
COLUMNS = "| step | tokens | batch | predicted {0} | measured {0} | ratio |\n|---|---:|---:|---:|---:|---:|"

RUN_FIELDS = ("train.epochs", "train.batch_size", "eval.batch_size")


class Point(NamedTuple):
    """A config's file and arguments, its batch, what the EPYC measured, and whether the rates are fitted to it."""

    spec: str
    batch_size: int
    milliseconds: float | None = None
    fitted: bool = False
    resize: int = 0  # pixels along each axis that the network sees; 0: the data's


POINTS = (
    Point("vit2d.py:patch=28", 16, 18.8, fitted=True),
    Point("vit2d.py:patch=7", 16, 66.3, fitted=True),
    Point("vit2d.py:patch=2", 16, 771.1, fitted=True),
    Point("vit3d.py:patch=2", 1, 2654, fitted=True),
    Point("vit2d.py:patch=14", 16, 31.4),
    Point("vit2d.py:patch=4", 16, 169.4),
    Point("vit2d.py:patch=1", 16, 4538),
    Point("vit3d.py:patch=14", 8, 32.5),
    Point("vit3d.py:patch=7", 8, 119.5),
    Point("vit3d.py:patch=4", 8, 774.0),
    Point("vit2d.py:patch=28", 1, 13.3),
    Point("vit2d.py:patch=14", 1, 11.4),
    Point("vit2d.py:patch=7", 1, 15.6),
    Point("vit2d.py:patch=4", 1, 24.3),
    Point("vit2d.py:patch=2", 1, 66.0),
    Point("vit2d.py:patch=1", 1, 348),
    Point("vit3d.py:patch=4", 1, 112),
    Point("vit3d.py:patch=1", 1, 153_988),
    Point("vit2d.py:patch=4,variant=vit_s", 1, 76.0),
    Point("vit2d.py:patch=4,variant=vit_b", 1, 275),
    # For the memory: images of other sizes.
    Point("vit2d.py:patch=8", 8, resize=64),
    Point("vit2d.py:patch=4", 2, resize=96),
    Point("vit3d.py:patch=8", 8, resize=32),
    Point("vit2d.py:patch=8,variant=vit_s", 4, resize=64),
)


def planned(point: Point) -> experiment.Experiment:
    """One seed of a point's config, planned for the CPU."""
    given = {"train.batch_size": str(point.batch_size), "data.resize": str(point.resize), "seeds": "0", "model.pretrained": ""}
    return scale.plan(f"configs/{point.spec}", given, CPU, ALONE)


def arguments(one: experiment.Experiment, seconds: float = 1.0) -> list[str]:
    """What `benchmarks.step` takes for the same step."""
    size, config = one.image_size, one.config
    shape = [f"--rank={len(size)}", f"--image={size[0]}", f"--batch={config.train.batch_size}", f"--variant={config.model.variant}"]
    return [*shape, f"--seconds={seconds}"]


def measured_ms(one: experiment.Experiment, seconds: float) -> float:
    """Milliseconds of a step on this machine, one round."""
    return step.measure(step.arguments(arguments(one, seconds)), one.patch_size[0])["ms"]


def measured_memory(one: experiment.Experiment) -> int:
    """Bytes of the compiled step: arguments and temporaries as the compiler says, and the best parameters."""
    compiled = []

    def remembered(self: jax.stages.Lowered, *arguments, real=jax.stages.Lowered.compile, **named) -> jax.stages.Compiled:
        compiled.append(real(self, *arguments, **named))
        return compiled[-1]

    shape = (1, step.MOST_STEPS, one.config.train.batch_size)
    batches = {"indices": jax.ShapeDtypeStruct(shape, np.int32), "mask": jax.ShapeDtypeStruct(shape, bool)}
    images = jax.ShapeDtypeStruct((step.NUM_IMAGES, *one.image_size, 1), np.uint8)
    resident = {"images": images, "labels": jax.ShapeDtypeStruct((step.NUM_IMAGES, 1), np.uint8)}
    with mock.patch.object(jax.stages.Lowered, "compile", remembered):
        programs.compile_chunk(step.recipe(step.arguments(arguments(one)), one.patch_size[0]), batches, resident)
    analysis = compiled[0].memory_analysis()
    best = cost.BYTES_OF_A_PARAMETER * cost.num_params(**one.shape)
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + best


def memory(one: experiment.Experiment) -> int:
    """The bytes of the compiled program of a step: `budget.memory` without the process, checkpoints, data and prediction."""
    shape, architecture, cpu = one.shape, one.network.architecture, machine.Device("cpu", "cpu", 1, None)
    images, batch_size, params = budget.micro_batch_size(one, cpu), one.config.train.batch_size, cost.num_params(**shape)
    pixels = int(np.prod(one.image_size))
    waiting = cost.BYTES_OF_A_PARAMETER * (params + batch_size * pixels * one.config.model.in_channels)
    estimate = cost.training_memory(
        num_params=params,
        activations=budget.activations(one, cpu, architecture.depth),
        block_attention_weights=0,
        num_tokens=one.num_tokens,
        width=architecture.width,
        batch_size=images,
        eval_batch_size=0,
        mapped=True,
        split_bytes=step.NUM_IMAGES * pixels,
        waiting_bytes=waiting if images < batch_size else 0,
    )
    return estimate.likely


def fitted(works: Sequence[scale.Work], seconds: Sequence[float]) -> scale.Device:
    """The CPU whose rates explain these steps best."""
    rows = np.array([(work.traffic, work.linear, work.attention) for work in works]) / np.array(seconds)[:, None]
    scales = rows.max(axis=0)
    inverse, _ = scipy.optimize.nnls(rows / scales, np.ones(len(works)))
    memory_rate, linear, attention = scales / np.maximum(inverse, 1e-9)
    return CPU._replace(memory_rate=float(memory_rate), flops={"float32": (float(linear), float(attention))})


def of_times(milliseconds: Mapping[Point, float]) -> str:
    """The rates fitted, and prediction, measurement and ratio of every step."""
    works = {point: scale.work(planned(point), CPU, ALONE) for point in milliseconds}
    basis = [point for point in milliseconds if point.fitted]
    cpu = fitted([works[point] for point in basis], [milliseconds[point] / 1e3 for point in basis])
    linear, attention = cpu.flops["float32"]
    said = f"memory {cpu.memory_rate:.3g} bytes/s, linear layers {linear:.3g} FLOP/s, attention {attention:.3g} FLOP/s\n"
    predicted = {point: 1e3 * scale.step_seconds(works[point], cpu, "float32", 1)[0] for point in milliseconds}
    return "\n".join([said, COLUMNS.format("ms"), *(_row(point, predicted[point], milliseconds[point]) for point in milliseconds)])


def _row(point: Point, predicted: float, measured: float) -> str:
    one = planned(point)
    name = f"{one.config.model.variant}, {'x'.join(map(str, one.image_size))}, patch {one.patch_size[0]}{', fitted' * point.fitted}"
    return f"| {name} | {one.num_tokens:,} | {point.batch_size} | {predicted:,.1f} | {measured:,.1f} | {predicted / measured:.2f} |"


def of_runs(root: str) -> str:
    """Finished runs of a CPU below a folder: seconds of training, and the peak memory of the process."""
    found = sorted(pathlib.Path(root).glob("**/result.json"))
    config_lib.require(bool(found), "--runs", root, "a folder with finished runs below it")
    rows = ["| run | predicted s | measured s | ratio | predicted MB | measured MB | ratio |", "|---|---:|---:|---:|---:|---:|---:|"]
    for file in found:
        run_folder = folder.RunFolder(file.parent)
        result = run_folder.read_result()
        config_lib.require(result["device"].startswith("cpu"), f"{file}: device", result["device"], "a CPU: its rates are known")
        # By the present recipe with what a run varies, since runs of earlier versions lack fields.
        config, patch = run_folder.read_config(), config_lib.patch_text(result["patch_size"])
        spec = f"configs/vit{config['data']['rank']}d.py:dataset={result['dataset']},patch={patch},variant={result['variant']}"
        given = {name: str(config[name.partition(".")[0]][name.partition(".")[2]]) for name in RUN_FIELDS}
        given["seeds"] = ",".join(map(str, result["seeds"]))
        made = scale.estimate(scale.plan(spec, given, CPU, ALONE), CPU, ALONE)
        seconds, measured = 3600 * made.hours[0], result["train_seconds"]
        size, peak = made.memory.likely / 1e6, result["peak_memory_bytes"] / 1e6
        name = f"{result['dataset']}, patch {patch}"
        rows.append(
            f"| {name} | {seconds:,.0f} | {measured:,.0f} | {seconds / measured:.2f} | {size:,.0f} | {peak:,.0f} | {size / peak:.2f} |"
        )
    return "\n".join(rows)


def make_parser() -> cli.Parser:
    """The flags."""
    parser = cli.Parser(prog="benchmarks.prediction", description=__doc__)
    parser.add_argument("--memory", action="store_true", help="compile every step and compare its memory; no times")
    parser.add_argument("--rounds", type=int, default=0, help="measure the times here, so often, instead of taking the recorded ones")
    parser.add_argument("--runs", default="", metavar="DIR", help="finished runs of a CPU below this folder instead of single steps")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time to measure a step in a round")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the table of times or of memory."""
    flags, overrides = cli.parse_flags(make_parser(), argv)
    config_lib.require(not overrides, ", ".join(f"--config.{field}" for field in overrides), "...", "left out: the steps are a fixed list")
    if flags.runs:
        print(of_runs(flags.runs))
        return 0
    machine.cache_programs()  # from the second round on nothing is compiled
    if flags.memory:
        print(COLUMNS.format("MB"))
        for point in dict.fromkeys(point._replace(fitted=False) for point in POINTS):
            one = planned(point)
            print(_row(point, memory(one) / 1e6, measured_memory(one) / 1e6), flush=True)
        return 0
    recorded = {point: point.milliseconds for point in POINTS if point.milliseconds}
    rounds = [{point: measured_ms(planned(point), flags.seconds) for point in recorded} for _ in range(flags.rounds)]
    print(of_times({point: min(one[point] for one in rounds) for point in recorded} if rounds else recorded))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run_cli(main, sys.argv[1:]))
