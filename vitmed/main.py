"""Train and test: `python -m vitmed.main --config=FILE[:ARGUMENTS] --workdir=DIR`. Run it again to go on or to see the result."""

import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence

from vitmed import config as config_lib
from vitmed.runs import folder
from vitmed.study import points, tables

EXAMPLES = """examples:
  python -m vitmed.main --config=configs/vit2d.py:dataset=breastmnist,patch=7 --workdir=runs/breast_p7
  python -m vitmed.main --config=configs/vit3d.py:patch=2x7x7 --workdir=runs/fracture --config.train.epochs=5 --config.seeds=0
  python -m vitmed.main --config=configs/quickstart.py --sweep --workdir=runs/quickstart

exit status: 0 done; 1 finished with named failures, or trouble of the machine; 2 wrong input; 75 stopped by SIGTERM, run again; 130 by
SIGINT"""


def make_parser() -> config_lib.Parser:
    """The flags."""
    about = "Train a ViT and test it once. --config.FIELD=VALUE sets any field of the config."
    parser = config_lib.Parser(prog="vitmed.main", description=about, epilog=EXAMPLES)
    parser.add_argument("--config", required=True, metavar="FILE[:ARGUMENTS]", help="a config file and its arguments, key=value,...")
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="the run's folder, or with --sweep the folder of the points' folders"
    )
    parser.add_argument("--sweep", action="store_true", help="run every point of the config's sweep(), finished ones left as they are")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one point or all of a sweep; the exit status."""
    flags, overrides = config_lib.parse_flags(make_parser(), argv)
    config_lib.require(bool(flags.workdir), "--workdir", flags.workdir, "the name of a folder")
    workdir = pathlib.Path(flags.workdir).expanduser()
    return run_sweep(flags.config, overrides, workdir) if flags.sweep else run(flags.config, overrides, workdir)


def run(spec: str, overrides: dict[str, str], workdir: pathlib.Path) -> int:
    """Run one point, or show it where it is finished; 1 where seeds have failed."""
    from vitmed import experiment  # here, since JAX takes a second to import, and until signals are handled one would kill

    config = config_lib.load(spec, overrides)
    run_folder = folder.RunFolder(workdir)
    result = experiment.finished(config, run_folder)
    if result is None:
        result = experiment.run(experiment.plan(config, experiment.recorded_network(run_folder)), run_folder)
    tables.show(tables.of_results([result]))
    if result["failed_seeds"]:
        print(f"vitmed: {workdir}: failed seeds {', '.join(map(str, result['failed_seeds']))}", file=sys.stderr)
    return 1 if result["failed_seeds"] else 0


def run_sweep(spec: str, overrides: dict[str, str], workdir: pathlib.Path) -> int:
    """Run all points of a sweep, each in a process of its own: its memory is its own, and what breaks one leaves the others.

    Every point is checked before the first is run. The exit status: 1 where a point has failed or has failed seeds.
    """
    path, _, argument = spec.partition(":")
    if argument:
        raise config_lib.InputError(f"--config={spec}: with --sweep the points give the arguments; leave out :{argument}")
    todo = points.of_sweep(config_lib.load_module(path))
    folders = [folder.RunFolder(workdir / point.name) for point in todo]
    finished = check_points(path, todo, folders, overrides)
    for number, (point, run_folder, done) in enumerate(zip(todo, folders, finished, strict=True), start=1):
        print(f"vitmed: {point.name}, {number} of {len(todo)}{': finished before' if done else ''}", file=sys.stderr)
        given = [f"--config={path}:{point.argument}", f"--workdir={run_folder.path}"]
        given += [f"--config.{field}={value}" for field, value in overrides.items()]
        if not done:
            run_apart([sys.executable, "-m", "vitmed.main", *given])
    results = [run_folder.read_result() for run_folder in folders]
    if any(results):
        tables.show(tables.of_results(points.ordered([result for result in results if result])))
    failed = [point.name for point, result in zip(todo, results, strict=True) if result is None or result["failed_seeds"]]
    if failed:
        print(f"vitmed: failed, or with failed seeds: {', '.join(failed)}; what was said above tells why", file=sys.stderr)
    return 1 if failed else 0


def check_points(path: str, todo: Sequence[points.Point], folders: Sequence[folder.RunFolder], overrides: dict[str, str]) -> list[bool]:
    """Which points are finished; InputError where one cannot run, or an override sets what the sweep varies."""
    from vitmed import experiment

    varied = points.varied([config_lib.load(f"{path}:{point.argument}").to_dict() for point in todo])
    for field in sorted(varied & overrides.keys()):
        raise config_lib.InputError(f"--config.{field}: the sweep varies it; leave it out, or run one point without --sweep")
    finished = []
    for point, run_folder in zip(todo, folders, strict=True):
        config = config_lib.load(f"{path}:{point.argument}", overrides)
        finished.append(experiment.finished(config, run_folder) is not None)
        if not finished[-1]:
            experiment.plan(config, experiment.recorded_network(run_folder))
    return finished


def run_apart(command: Sequence[str]) -> None:
    """Run a command in a process of its own and pass signals on to it; Stopped where one came or the command says that it was stopped."""
    received: list[int] = []
    child: subprocess.Popen | None = None

    def forward(signum: int, _: object) -> None:
        received.append(signum)
        if child is not None:
            child.send_signal(signal.SIGTERM if signum == signal.SIGHUP else signum)

    former = {signum: signal.signal(signum, forward) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        # A session of its own: a terminal's Ctrl-C reaches this process alone, which passes it on once.
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        if received:
            child.terminate()  # it came before there was a child
        status = child.wait()
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)
    if received or status in (75, 130):
        raise config_lib.Stopped(signal.SIGINT if signal.SIGINT in received or status == 130 else signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(config_lib.run_cli(main, sys.argv[1:]))
