"""Run a sweep on many machines: `python -m launch.sweep --config=FILE --workdir=DIR --to=ENGINE`. The same command again submits the rest.

An engine is a module launch/ENGINE.py with these functions; it is imported only where --to names it.

    add_flags(parser: cli.Parser) -> None
        The engine's own flags. Mind the names that every engine shares: see `make_parser`.
    render(manifest: manifest.Manifest, options: argparse.Namespace) -> dict[str, str]
        File name -> text, of all that the engine will submit. Pure: asks no machine, reads and writes nothing. InputError for options
        that make no sense. --dry-run prints it, and without --dry-run it is written to DIR/launch/ENGINE/.
    require(options: argparse.Namespace) -> None
        InputError, one line that says what to install or mend, where the launcher's command is not installed or what the options name
        (a partition, a queue) is not there. Called after `render` and before anything is written; not at all by --dry-run.
    submit(folder: pathlib.Path, options: argparse.Namespace) -> str
        Hand the files, which lie in `folder` now, to the launcher; a line that says what was submitted and how to watch it. MachineError
        where the launcher refuses, with its own words.
    queued(options: argparse.Namespace) -> frozenset[int]      (optional)
        The tasks that an earlier call has submitted and that wait or run: they are not submitted again. Called after `require`.

`options` holds all flags, the engine's and the shared ones, and besides
    options.workdir: str            DIR as an absolute path, on this machine
    options.manifest: str           DIR/manifest.json as an absolute path, on this machine
    options.tasks: tuple[int, ...]  the numbers of the tasks to submit, ascending, at least one; not always 0 to n-1
Overrides (--config.FIELD=VALUE) are in the manifest. On its machine a task is `manifest.task_command(...)`, run in the checkout; its exit
status is the contract's: 0 done, 1 some points failed (others done), 2 wrong input, 75 after SIGTERM: run the same again, 130 by SIGINT.
Only 75 is worth another start. When all have ended, `manifest.report_command(...)` makes the report, whatever their status was.
"""

import argparse
import dataclasses
import importlib
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from launch import manifest as manifest_lib
from launch import status
from vitmed import cli, forecast, sweep
from vitmed import config as config_lib
from vitmed.runs import files, folder, guard

ENGINES = ("local", "slurm", "kubernetes", "skypilot", "tpu")
EXAMPLES = """examples:
  python -m launch.sweep --config=configs/quickstart.py --workdir=runs/quickstart --to=local
  python -m launch.sweep --config=configs/vit2d.py --workdir=/scratch/study --to=slurm --partition=gpu --time=24:00:00 --dry-run
  python -m launch.sweep --to=slurm --help
  python -m launch.sweep --workdir=/scratch/study --status
  python -m launch.sweep --config=configs/vit2d.py --workdir=/scratch/study --to=slurm --partition=gpu --retry

The same command again submits what is neither done nor running nor failed nor queued. Another --points adds its points to the sweep.

exit status: 0 done or submitted; 1 points have failed, or trouble of the machine or the launcher; 2 wrong input, nothing submitted; 75
stopped by SIGTERM, run again; 130 by SIGINT"""


def make_parser(engine: Any = None) -> cli.Parser:
    """The flags that all engines share, and the engine's own."""
    about = "Run a config's sweep() on many machines: one GPU a task, cheap points packed together."
    parser = cli.Parser(prog="launch.sweep", description=about, epilog=EXAMPLES)
    parser.add_argument("--config", default="", metavar="FILE", help="a config file that has a sweep()")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the sweep's folder, which all machines see under this name")
    parser.add_argument("--to", default="", metavar="ENGINE", help=f"what runs the tasks: {', '.join(ENGINES)}")
    parser.add_argument("--points", metavar="KEY=VALUE|VALUE,...", help="only the points whose arguments have these values")
    parser.add_argument(
        "--pack",
        metavar="SHARE",
        help="how much several points in one task may cost together, as a share of the costliest point, by the GMAC estimate; "
        f"0: every point alone (default: {manifest_lib.PACK})",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted; write and submit nothing")
    parser.add_argument("--status", action="store_true", help="print how every point stands; needs --workdir alone")
    parser.add_argument("--retry", action="store_true", help="submit the failed points alone, each as a task of its own")
    if engine is not None:
        engine.add_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Submit a sweep, or show how it stands; the exit status."""
    early = cli.Parser(prog="launch.sweep", add_help=False)
    early.add_argument("--to", default="")
    name = early.parse_known_args(list(argv))[0].to
    if name:
        config_lib.one_of("--to", name, ENGINES)
    engine = importlib.import_module(f"launch.{name}") if name else None
    flags, overrides = cli.parse_flags(make_parser(engine), argv)
    config_lib.require(bool(flags.workdir), "--workdir", flags.workdir, "the name of a folder; see launch.sweep --help")
    workdir = pathlib.Path(flags.workdir).expanduser().absolute()
    if flags.status:
        return show(flags, overrides, workdir)
    config_lib.require(bool(flags.config), "--config", flags.config, "a config file such as configs/vit2d.py")
    config_lib.require(engine is not None, "--to", name, f"one of {', '.join(ENGINES)}")
    return submit(flags, overrides, workdir=workdir, engine=engine)


# --- what there is to do --------------------------------------------------------------------------------------------------------


def show(flags: argparse.Namespace, overrides: Mapping[str, str], workdir: pathlib.Path) -> int:
    """Print how the sweep in a folder stands."""
    given = [f"--{name}" for name in ("config", "points", "pack", "retry", "dry_run") if getattr(flags, name)]
    given += [f"--config.{field}" for field in overrides]
    if given:
        raise config_lib.InputError(f"{given[0].replace('_', '-')}: --status reads the manifest in --workdir; leave out {given[0]}")
    manifest = there(workdir, runs=False)
    if manifest is None:
        raise config_lib.InputError(f"--workdir={flags.workdir}: holds no sweep: there is no {manifest_lib.FILE_NAME} in it")
    status.show(manifest, status.of_all(manifest, workdir))
    return 0


def there(workdir: pathlib.Path, *, runs: bool = True) -> manifest_lib.Manifest | None:
    """The manifest of a folder, whose config must be there where it `runs`; None where there is none."""
    try:
        return manifest_lib.read(workdir / manifest_lib.FILE_NAME, runs=runs)
    except FileNotFoundError:
        return None


def point_of(entry: sweep.Entry) -> manifest_lib.Point:
    """A point with its arithmetic: a training step is three forward passes, and after each epoch and at the end there are evaluations."""
    planned, examples = entry.planned, entry.planned.description.num_examples
    epochs = planned.config.train.epochs
    # Of several patch sizes each has its share of the steps, and all of the evaluations.
    trained, evaluated = 3 * epochs * examples["train"] / len(planned.forms), (epochs + 1) * examples["val"] + examples["test"]
    gmacs = (trained + evaluated) * len(planned.seeds) * sum(form.gmacs_forward for form in planned.forms)
    return manifest_lib.Point(entry.name, entry.point.argument, gmacs, forecast.seconds(planned))


def merged(asked: sweep.Sweep, entries: Sequence[sweep.Entry], *, pack: float | None, workdir: pathlib.Path) -> manifest_lib.Manifest:
    """The manifest in the folder with these entries added, or a new one; InputError where the folder holds another sweep."""
    found = [point_of(entry) for entry in entries]
    former = there(workdir)
    if former is None:
        pack = manifest_lib.PACK if pack is None else pack
        return manifest_lib.Manifest(asked.spec, dict(asked.overrides), tuple(found), manifest_lib.packed(found, pack), pack)
    path = workdir / manifest_lib.FILE_NAME
    fault = _other_sweep(former, asked)
    if fault is None and pack not in (None, former.pack):
        fault = f"its tasks were made with --pack={former.pack:g}, here is --pack={pack:g}"
    if fault is not None:
        raise config_lib.InputError(f"{path} is of another sweep: {fault}; give another --workdir, or the same flags as before")
    return manifest_lib.grown(dataclasses.replace(former, overrides=dict(asked.overrides)), found)


def _other_sweep(former: manifest_lib.Manifest, asked: sweep.Sweep) -> str | None:
    """In what a manifest's sweep differs from the one that is asked for: what decides nothing about results may differ."""
    if config_lib.find_file(former.config.partition(":")[0]).resolve() != config_lib.find_file(asked.path).resolve():
        return f"--config={former.config} there, --config={asked.spec} here"
    for field in sorted(former.overrides.keys() | asked.overrides.keys()):
        one, other = (overrides.get(field, "not given") for overrides in (former.overrides, asked.overrides))
        if one != other and not any(f"{field}.".startswith(f"{free}.") for free in folder.MAY_CHANGE):
            return f"--config.{field} is {one} there, {other} here"
    arguments = {point.name: point.argument for point in asked.points}
    for point in former.points:
        if arguments.get(point.name) != point.argument:
            return f"point {point.name} is {point.argument} there, {arguments.get(point.name, 'not in sweep()')} here"
    return None


# --- doing it -------------------------------------------------------------------------------------------------------------------


def submit(flags: argparse.Namespace, overrides: Mapping[str, str], *, workdir: pathlib.Path, engine: Any) -> int:
    """Hand the tasks that are left to an engine, after everything has been checked and before that nothing written.

    What is left is found out once more with the folder locked: of two such commands at the same time one would forget the other's points.
    """
    pack = None if flags.pack is None else config_lib.parse("--pack", flags.pack, manifest_lib.PACK)
    config_lib.require(pack is None or (math.isfinite(pack) and pack >= 0), "--pack", flags.pack, "a number, at least 0")
    config_lib.require(str(workdir).isprintable(), "--workdir", config_lib.one_line(workdir), "a path of printable characters")
    place = workdir / "launch" / flags.to
    files.check_folder(place, f"--workdir={flags.workdir}")
    left = _left(flags, overrides, pack=pack, workdir=workdir)
    if not left.tasks:
        return _nothing(flags, left.states, workdir)
    rendered = engine.render(left.manifest, left.options)
    if flags.dry_run:
        _show_files(left.manifest, left.tasks, rendered)
        return 0
    engine.require(left.options)
    files.make_folder(place)
    with guard.lock(place.parent):
        left = _left(flags, overrides, pack=pack, workdir=workdir)
        return _hand_over(left, retry=flags.retry, workdir=workdir, place=place, engine=engine)


class _Left(NamedTuple):
    """How the points stand, the manifest with those that are asked for, which are to be run, by which tasks, and the engine's options."""

    states: Mapping[str, status.State]
    manifest: manifest_lib.Manifest
    wanted: Sequence[str]
    tasks: tuple[int, ...]
    options: argparse.Namespace


def _left(flags: argparse.Namespace, overrides: Mapping[str, str], *, pack: float | None, workdir: pathlib.Path) -> _Left:
    """What there is to do now."""
    asked = sweep.read(flags.config, overrides, selection=flags.points, root=workdir)
    states = {entry.name: status.of(entry.run_folder) for entry in asked.entries}
    wanted = [name for name, state in states.items() if state.word == (status.FAILED if flags.retry else status.WAITING)]
    entries = [entry for entry in asked.entries if entry.name in wanted] if flags.retry else asked.entries
    manifest = merged(asked, entries, pack=pack, workdir=workdir)
    if flags.retry:
        manifest = manifest_lib.alone(manifest, wanted)
    tasks = tuple(number for number, names in enumerate(manifest.tasks) if set(names) & set(wanted))
    options = argparse.Namespace(**vars(flags) | {"workdir": str(workdir), "manifest": str(workdir / manifest_lib.FILE_NAME)})
    options.tasks = tasks
    return _Left(states, manifest, wanted, tasks, options)


def _hand_over(left: _Left, *, retry: bool, workdir: pathlib.Path, place: pathlib.Path, engine: Any) -> int:
    """Write the manifest and the engine's files, and submit what is not in the engine's queue already."""
    options = left.options
    if queued := frozenset(left.tasks) & (engine.queued(options) if hasattr(engine, "queued") else frozenset()):
        print(f"vitmed: {len(queued)} of {len(left.tasks)} tasks are in the queue already", file=sys.stderr)
        options.tasks = tuple(number for number in left.tasks if number not in queued)
    if not options.tasks:
        return 0
    rendered = engine.render(left.manifest, options)
    manifest_lib.write(left.manifest, workdir)
    for name, text in rendered.items():
        files.write_whole(place / name, text.encode())
    for name in left.wanted if retry else ():
        folder.RunFolder(workdir / name).failure.unlink(missing_ok=True)
    print(f"vitmed: {status.totals(left.states)}; tasks to run: {len(options.tasks)}", file=sys.stderr)
    print(engine.submit(place, options))
    return 0


def _nothing(flags: argparse.Namespace, states: Mapping[str, status.State], workdir: pathlib.Path) -> int:
    """Say that there is nothing to submit, and why; 1 where points or seeds have failed."""
    failed = [name for name, state in states.items() if state.word == status.FAILED or (state.word == status.DONE and state.note)]
    mend = "; --retry runs failed points again" if any(states[name].word == status.FAILED for name in failed) and not flags.retry else ""
    if flags.retry and any(state.word == status.WAITING for state in states.values()):
        mend = "; without --retry those that wait are submitted"
    print(f"vitmed: nothing to submit: {status.totals(states)}{mend}", file=sys.stderr)
    for name in failed:
        print(f"vitmed: {name}: {states[name].note}", file=sys.stderr)
    if any(state.word == status.DONE for state in states.values()):
        print(f"vitmed: the report: {' '.join(manifest_lib.report_command('python', workdir=str(workdir)))}", file=sys.stderr)
    return 1 if failed else 0


def _show_files(manifest: manifest_lib.Manifest, tasks: Sequence[int], rendered: Mapping[str, str]) -> None:
    """Print what would be submitted."""
    for number in tasks:
        print(f"# task {number}: {', '.join(manifest.tasks[number])}")
    for name, text in rendered.items():
        print(f"# ---- {name}\n{text}")


if __name__ == "__main__":
    sys.exit(cli.run_cli(main, sys.argv[1:]))
