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
