"""Train and test: `python -m vitmed.main --config=FILE[:ARGUMENTS] --workdir=DIR`. Run it again to go on or to see the result."""

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

from vitmed import apart, cli
from vitmed import config as config_lib
from vitmed.runs import cluster, folder, guard, processes
from vitmed.study import points, tables

EXAMPLES = """examples:
  python -m vitmed.main --config=configs/vit2d.py:dataset=breastmnist,patch=7 --workdir=runs/breast_p7
  python -m vitmed.main --config=configs/vit3d.py:patch=2x7x7 --workdir=runs/fracture --config.train.epochs=5 --config.seeds=0
  python -m vitmed.main --config=configs/quickstart.py --sweep --workdir=runs/quickstart
  python -m vitmed.main --config=configs/vit2d.py --sweep --points='dataset=breastmnist,patch=7|4' --workdir=runs/study2d
  python -m vitmed.main --config=configs/vit3d.py --list
  srun --nodes=2 --ntasks-per-node=1 python -m vitmed.main --config=configs/vit3d.py:patch=1 --workdir=runs/large --config.mesh.sequence=2

exit status: 0 done; 1 finished with named failures, or trouble of the machine; 2 wrong input; 75 stopped by SIGTERM, run again; 130 by
SIGINT"""


def make_parser() -> cli.Parser:
    """The flags."""
    about = "Train a ViT and test it once. --config.FIELD=VALUE sets any field of the config."
    parser = cli.Parser(prog="vitmed.main", description=about, epilog=EXAMPLES)
    parser.add_argument("--config", required=True, metavar="FILE[:ARGUMENTS]", help="a config file and its arguments, key=value,...")
    parser.add_argument("--workdir", default="", metavar="DIR", help="the run's folder, or of a sweep the folder of the points' folders")
    parser.add_argument("--sweep", action="store_true", help="run every point of the config's sweep(), finished ones left as they are")
    parser.add_argument("--list", action="store_true", help="print the sweep's points, their cost and with --workdir their state; run none")
    parser.add_argument(
        "--together", action="store_true", help="the sweep's points in one process: plugins of the same frozen base hold it once"
    )
    parser.add_argument("--points", metavar="KEY=VALUE|VALUE,...", help="of the sweep, only the points whose arguments have these values")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of a run of several processes: where process 0 waits for the others")
    parser.add_argument("--num_processes", metavar="N", help="how many; under SLURM, Open MPI, on a TPU all three are found out")
    parser.add_argument("--process_id", metavar="I", help="which of them this is, from 0")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one point or all of a sweep, or list them; the exit status."""
    if cli.LAST_WORDS in os.environ:  # a sweep, or what watches a process of several, started this one
        guard.end_with_parent()
    flags, overrides = cli.parse_flags(make_parser(), argv)
    of_sweep = flags.sweep or flags.list
    if flags.points is not None and not of_sweep:
        raise config_lib.InputError(f"--points={flags.points}: chooses among a sweep's points; give --sweep or --list with it")
    if flags.together and not flags.sweep:
        raise config_lib.InputError("--together: is of a sweep's points; give --sweep with it")
    config_lib.require(bool(flags.workdir) or flags.list, "--workdir", flags.workdir, "the name of a folder; see vitmed.main --help")
    workdir = pathlib.Path(flags.workdir).expanduser()
    given = {name: getattr(flags, name) for name in cluster.FLAGS}
    found = cluster.detect(os.environ, **given)
    if of_sweep:
        return run_sweep(flags, overrides, workdir if flags.workdir else None, found)
    if found is not None and cli.LAST_WORDS not in os.environ:
        return run_watched(argv, found)
    with processes.together(found):
        return run(flags.config, overrides, workdir)


def run_watched(argv: Sequence[str], found: cluster.Cluster) -> int:
    """Run this same command in a process of its own: JAX aborts it where another process of the run is lost, and somebody must say so."""
    status, _ = apart.run([sys.executable, "-m", "vitmed.main", *argv], stdout=None)
    if status < 0:
        raise processes.ended(found, status)
    return status


def run(spec: str, overrides: dict[str, str], workdir: pathlib.Path) -> int:
    """Run one point, or show it where it is finished; 1 where seeds have failed."""
    from vitmed import experiment, forecast  # here, since JAX takes a second to import, and until signals are handled one would kill
    from vitmed.runs import machine

    config = processes.by_all(lambda: config_lib.load(spec, overrides))
    run_folder = folder.RunFolder(workdir, writes=processes.is_main())
    result = processes.by_main(lambda: experiment.finished(config, run_folder))
    if result is None:
        recorded = experiment.recorded_network(run_folder)
        planned = processes.by_all(lambda: experiment.plan(config, recorded))
        device = machine.device()
        processes.by_main(lambda: forecast.require_fit(planned, device))
        result = experiment.run(planned, run_folder)
    if not processes.is_main():
        return 1 if result["failed_seeds"] else 0
    tables.show(tables.of_results(points.ordered(points.results_of(run_folder, workdir.name))))
    if result["failed_seeds"]:
        print(f"vitmed: {workdir}: failed seeds {', '.join(map(str, result['failed_seeds']))}", file=sys.stderr)
    return 1 if result["failed_seeds"] else 0


def run_sweep(flags: argparse.Namespace, overrides: dict[str, str], root: pathlib.Path | None, found: cluster.Cluster | None) -> int:
    """List the points of a sweep, or run them; each of several processes runs them all, together with the others."""
    from vitmed import sweep

    asked = sweep.read(flags.config, overrides, selection=flags.points, root=root)
    if flags.list:
        sweep.show(asked)
        return 0
    if flags.together and found is not None:
        raise config_lib.InputError("--together: a process of its own makes all points, and here several make each; leave it out")
    return sweep.run(dataclasses.replace(asked, team=found, together=flags.together))


if __name__ == "__main__":
    processes.leave(cli.run_cli(main, sys.argv[1:]))
