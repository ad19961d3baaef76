"""One task of a sweep, on the machine that an engine gave it: `python -m launch.task --manifest=FILE --workdir=DIR --task=N`.

Each point runs in a process of its own; finished ones are skipped, and so are those that have failed, until launch.sweep --retry says that
they are to be tried again: a task that is started again after a signal must not repeat them.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

from launch import manifest as manifest_lib
from vitmed import cli
from vitmed import config as config_lib
from vitmed.runs import cluster, guard

EXAMPLES = """examples:
  python -m launch.task --manifest=runs/study/manifest.json --workdir=runs/study --task=0
  python -m launch.task --manifest=runs/study/manifest.json --workdir=runs/study --task=all

exit status: 0 done; 1 some points failed or were in use, the others are done; 2 wrong input; 75 stopped by SIGTERM, run again; 130 by
SIGINT"""


def make_parser() -> cli.Parser:
    """The flags."""
    parser = cli.Parser(prog="launch.task", description="Run one task of a sweep's manifest.", epilog=EXAMPLES)
    parser.add_argument("--manifest", required=True, metavar="FILE", help="the manifest.json that launch.sweep wrote")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the folder of the points' folders")
    parser.add_argument("--task", required=True, metavar="N", help="the task's number, from 0; all: one after another")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the points of a task; the exit status."""
    if cli.LAST_WORDS in os.environ:  # launch/local.py started this process
        guard.end_with_parent()
    flags, overrides = cli.parse_flags(make_parser(), argv)
    if overrides:
        raise config_lib.InputError(f"--config.{next(iter(overrides))}: the manifest has the overrides; give them to launch.sweep")
    config_lib.require(bool(flags.workdir), "--workdir", flags.workdir, "the name of a folder; see launch.task --help")
    try:
        manifest = manifest_lib.read(pathlib.Path(flags.manifest).expanduser())
    except FileNotFoundError as error:
        raise config_lib.InputError(f"--manifest={flags.manifest}: no such file; launch.sweep writes it as DIR/manifest.json") from error
    names = names_of(manifest, flags.task)
    return run(manifest, names, pathlib.Path(flags.workdir).expanduser())


def names_of(manifest: manifest_lib.Manifest, task: str) -> tuple[str, ...]:
    """The points of --task; InputError where there is no such task."""
    if task == "all":
        return tuple(name for names in manifest.tasks for name in names)
    number = int(task) if task.isascii() and task.isdecimal() else -1
    config_lib.require(0 <= number < len(manifest.tasks), "--task", task, f"from 0 to {len(manifest.tasks) - 1}, or all")
    return manifest.tasks[number]


def run(manifest: manifest_lib.Manifest, names: Sequence[str], workdir: pathlib.Path) -> int:
    """Run the points that are neither finished nor failed; 1 where one has failed, now or before."""
    from vitmed import sweep  # here, since JAX takes a second to import, and until then a signal ends the process at once

    if not names:
        print("vitmed: the task has no points any more: they were moved to tasks of their own", file=sys.stderr)
        return 0
    asked = sweep.read(manifest.config, manifest.overrides, selection=names, root=workdir)
    arguments = {point.name: point.argument for point in manifest.points}
    for entry in asked.entries:
        if arguments[entry.name] != entry.point.argument:
            said = f"{arguments[entry.name][:100]!r} in the manifest and {entry.point.argument} in {manifest.config}"
            raise config_lib.InputError(f"point {entry.name} is {said}; use the config that the manifest was made from")
    failed = [entry for entry in asked.entries if entry.result is None and entry.run_folder.read_failure() is not None]
    for entry in failed:
        print(f"vitmed: {entry.name} has failed before and is left as it is; launch.sweep --retry runs it again", file=sys.stderr)
    left = [entry for entry in asked.entries if entry not in failed]
    status = sweep.run_each(dataclasses.replace(asked, entries=left, team=cluster.detect(os.environ)))
    return 1 if failed else status


if __name__ == "__main__":
    sys.exit(cli.run_cli(main, sys.argv[1:]))
