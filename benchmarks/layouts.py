"""What a training step takes of each device's memory on several meshes, by XLA's own account of the compiled program: a table.

    python -m benchmarks.layouts --config=configs/vit3d.py:dataset=phantom3d,patch=4,pretrained= --devices=8

The devices are simulated on the CPU, whose program is compiled and not run. `given` are parameters, moments and data, `besides` what the
step needs on top.
"""

import itertools
import sys
from collections.abc import Sequence

import jax
import numpy as np

from vitmed import cli, experiment
from vitmed import config as config_lib
from vitmed.training import programs, sharding


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="benchmarks.layouts", description=__doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARGUMENTS]", help="a config file and its arguments; --config.FIELD=VALUE too"
    )
    parser.add_argument("--devices", type=int, default=8, help="how many to simulate")
    return parser


def meshes(devices: int) -> list[tuple[int, int, int]]:
    """One device, each axis with all of them, and all three with two each or as many as there are."""
    alone = [(1, 1, 1), (devices, 1, 1), (1, devices, 1), (1, 1, devices)]
    return alone + [mesh for mesh in itertools.product((1, 2), (1, 2), (devices // 4,)) if np.prod(mesh) == devices and min(mesh) > 1]


def measured(config_path: str, overrides: dict[str, str], mesh: tuple[int, int, int]) -> tuple[int, int]:
    """(bytes given, bytes besides) per device of the training program on a mesh of data x fsdp x sequence."""
    axes = {f"mesh.{name}": str(size) for name, size in zip(sharding.AXES, mesh, strict=True)}
    planned = experiment.plan(config_lib.load(config_path, overrides | axes))
    recipe = experiment.recipe(planned, steps_per_epoch=1)
    runs, batch_size, channels = len(recipe.seeds), planned.config.train.batch_size, planned.description.num_channels
    batches = {"indices": np.zeros((runs, 1, batch_size), np.int32), "mask": np.ones((runs, 1, batch_size), bool)}
    columns = planned.description.num_classes if planned.description.task == "multi-label" else 1
    image = np.zeros((1, *planned.description.image_size, channels), np.uint8)  # one will do: where a split lies is another matter
    resident = {"images": image, "labels": np.zeros((1, columns), np.uint8)}
    program, _ = programs.compile_chunk(recipe, batches, resident)
    return program.memory.argument_size_in_bytes, program.memory.temp_size_in_bytes


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    flags, overrides = cli.parse_flags(make_parser(), argv)
    config_lib.require(1 <= flags.devices <= 64, "--devices", flags.devices, "from 1 to 64")
    jax.config.update("jax_num_cpu_devices", flags.devices)
    print("| data x fsdp x sequence | given, MB | besides, MB |\n|---|---:|---:|")
    for mesh in meshes(flags.devices):
        given, besides = measured(flags.config, overrides, mesh)
        print(f"| {' x '.join(map(str, mesh))} | {given / 1e6:,.1f} | {besides / 1e6:,.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run_cli(main, sys.argv[1:]))
