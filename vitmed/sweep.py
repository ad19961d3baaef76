"""Many runs as one command: the points of a config's `sweep()`, each in a folder and a process of its own.

Whatever arithmetic can tell is checked before the first point runs and before anything is written. Then a point that fails is recorded
in its folder (failure.json) and reported at the end, and the others run all the same. Called again, finished points are left as they are.
"""

import dataclasses
import pathlib
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import rich.table

from vitmed import apart, budget, experiment, forecast
from vitmed import config as config_lib
from vitmed.runs import checkpoint, cluster, folder, guard, machine, processes
from vitmed.study import points, tables

COLUMNS = ("point", "tokens", "GMACs / image", "memory", "state")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A point, its folder (where --workdir is given), what is planned for it (without its weights), and its result if it is finished."""

    point: points.Point
    run_folder: folder.RunFolder | None
    planned: experiment.Experiment
    result: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """The point's name."""
        return self.point.name


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A config file, the overrides for every point, all points and the entries that were asked for.

    `spec` is the file and, after a colon, the arguments that hold for all points.

    `team` are the processes that make each point's run together, each going through the points by itself; None: they are run here alone.
    `together` runs the points within this process, so that plugins of one base share it; what ends one then ends all.
    """

    spec: str
    overrides: Mapping[str, str]
    points: Sequence[points.Point]
    entries: Sequence[Entry]
    team: cluster.Cluster | None = None
    together: bool = False

    @property
    def path(self) -> str:
        """The config file."""
        return self.spec.partition(":")[0]

    @property
    def speaks(self) -> bool:
        """Whether this is the process of a team that records failures and prints tables."""
        return self.team is None or self.team.process_id == 0


def read(spec: str, overrides: Mapping[str, str], *, selection: str | Collection[str] | None, root: pathlib.Path | None) -> Sweep:
    """The sweep of a config file with its points' folders below `root`, if any.

    `selection` is the expression of --points, or names of points in the order in which they shall run; None for all.
    InputError where a point has a fault, an override sets what the sweep varies or a folder belongs to another run. No pretrained weights
    are looked for.
    """
    path, _, argument = spec.partition(":")
    every = points.of_sweep(config_lib.load_module(path), argument)
    varied = points.varied([config_lib.load(f"{path}:{point.argument}").to_dict() for point in every])
    for field in sorted((varied | points.named(every)) & overrides.keys()):
        raise config_lib.InputError(f"--config.{field}: the sweep sets it; leave it out, or run one point without --sweep")
    entries = []
    for point in _chosen(every, selection):
        config = config_lib.load(f"{path}:{point.argument}", overrides)
        run_folder = None if root is None else folder.RunFolder(root / point.name)
        result = run_folder and experiment.finished(config, run_folder)
        recorded = run_folder and experiment.recorded_network(run_folder)
        entries.append(Entry(point, run_folder, forecast.outline(config, recorded), result))
    return Sweep(spec, overrides, every, entries)


def _chosen(every: Sequence[points.Point], selection: str | Collection[str] | None) -> Sequence[points.Point]:
    if selection is None:
        return every
    if isinstance(selection, str):
        return points.selected(every, selection)
    there = {point.name: point for point in every}
    for name in selection:
        if name not in there:
            raise config_lib.InputError(f"{name}: the sweep has no such point; {config_lib.nearest(name, there)}")
    return [there[name] for name in selection]


# --- what there is to do --------------------------------------------------------------------------------------------------------


def show(sweep: Sweep) -> None:
    """Print every point with what it costs and how it stands."""
    device = machine.device_apart()
    table = rich.table.Table(caption=_device_text(device))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("point", "state") else "right", overflow="fold")
    for entry in sweep.entries:
        costs = (f"{entry.planned.num_slices * entry.planned.num_tokens:,}", f"{entry.planned.gmacs_forward:,.3f}")
        table.add_row(entry.name, *costs, _memory_text(entry.planned, device), _state_text(entry))
    tables.show(table)


def _device_text(device: machine.Device | None) -> str:
    if device is None:
        return "memory is for a GPU or TPU of any size: this machine's device could not be asked"
    there = "does not tell its memory" if device.memory_bytes is None else f"has {forecast.gigabytes(device.memory_bytes)}"
    return f"memory is an estimate for all seeds together; {device.name} {there}"


def _memory_text(planned: experiment.Experiment, device: machine.Device | None) -> str:
    device = device or machine.Device("unknown", "unknown", 1, None)
    least, likely = budget.memory(planned, device)
    if device.memory_bytes is not None and least > device.memory_bytes:
        return f"{forecast.gigabytes(likely)}, cannot fit"
    tight = device.memory_bytes is not None and likely > device.memory_bytes
    return f"{forecast.gigabytes(likely)}{', may not fit' if tight else ''}"


def _state_text(entry: Entry) -> str:
    if entry.run_folder is None:
        return "-"
    failure = entry.run_folder.read_failure()
    if entry.result is not None:
        return _fault_of(entry.result) or "finished"
    if failure is not None:
        return f"failed: {_failure_text(failure)}"
    return "begun" if checkpoint.begun(entry.run_folder.checkpoints) else "to do"


def _fault_of(result: Mapping[str, Any]) -> str | None:
    """The failed seeds of a finished run."""
    return f"failed seeds {', '.join(map(str, result['failed_seeds']))}" if result["failed_seeds"] else None


def _failure_text(failure: Mapping[str, Any]) -> str:
    """How a point's process ended, and what it complained of."""
    return config_lib.one_line(f"{failure.get('ended')}{': ' if failure.get('said') else ''}{failure.get('said') or ''}")


def check(sweep: Sweep) -> None:
    """InputError where a point that is not finished cannot be run here: its memory first, then its weights."""
    todo = [entry for entry in sweep.entries if entry.result is None]
    # A process of a team cannot ask for devices without the others; each run asks then.
    device = machine.device_apart() if todo and sweep.team is None else None
    misfits = {} if device is None else {entry.name: fault for entry in todo if (fault := forecast.misfit(entry.planned, device))}
    if misfits:
        kept = [entry.point for entry in sweep.entries if entry.name not in misfits]
        expression = points.expression_of(kept, sweep.points)
        first = next(entry for entry in todo if entry.name in misfits)
        mend = forecast.advice(first.planned, device) + (f"; --points='{expression}' leaves out what cannot fit" if expression else "")
        named = {fault: ", ".join(name for name in misfits if misfits[name] == fault) for fault in misfits.values()}
        raise config_lib.InputError(f"{'; '.join(f'{names}: {fault}' for fault, names in named.items())}; {mend}")
    for entry in todo:
        config = config_lib.load(f"{sweep.path}:{entry.point.argument}", sweep.overrides)
        experiment.plan(config, experiment.recorded_network(entry.run_folder))
    for entry in todo if device is not None else ():  # after all that can be an error, whose line stands alone
        forecast.warn(entry.planned, device, entry.name)


# --- doing it -------------------------------------------------------------------------------------------------------------------


def run(sweep: Sweep) -> int:
    """Check all points, then run them; see `run_each`."""
    check(sweep)
    return run_each(sweep)


def run_each(sweep: Sweep) -> int:
    """Run the points that are not finished and print the table of all results; the exit status: 1 where something has failed.

    Each point has a process of its own: its memory is its own, and what breaks one leaves the others. A point whose folder another process
    holds is left to that one and is no failure of the point.
    """
    results = [entry.result for entry in sweep.entries]
    faults: dict[str, str] = {}
    if any(results):
        _say_progress(sweep.entries, results, faults)
    for index, entry in enumerate(sweep.entries):
        if results[index] is not None:
            continue
        if sweep.team is None and (fault := _held(entry)):  # of a team, process 0's part of the run looks when all have met
            faults[entry.name] = fault
            continue
        print(f"vitmed: {entry.name}, {index + 1} of {len(sweep.entries)}", file=sys.stderr)
        status, said = _run_point(sweep, entry)
        results[index] = entry.run_folder.read_result()
        if results[index] is None:
            faults[entry.name] = _held(entry) or _record(entry.run_folder, status, said, writes=sweep.speaks)
        _say_progress(sweep.entries, results, faults)
    if any(results) and sweep.speaks:
        named: dict[str, Mapping[str, Any]] = {}
        for entry, result in zip(sweep.entries, results, strict=True):
            named |= points.results_of(entry.run_folder, entry.name) if result else {}
        tables.show(tables.of_results(points.ordered(named)))
    faults |= {entry.name: fault for entry, result in zip(sweep.entries, results, strict=True) if result and (fault := _fault_of(result))}
    for name, fault in faults.items():
        print(f"vitmed: {name}: {fault}", file=sys.stderr)
    if faults:
        print(f"vitmed: {len(faults)} of {len(sweep.entries)} points failed, or have failed seeds", file=sys.stderr)
    return 1 if faults else 0


def _run_point(sweep: Sweep, entry: Entry) -> tuple[int, str]:
    """(exit status, what it complained of); LostError or MachineError where a process of the team, or this one's own, was ended.

    The others of the team do not go on to the next point then. What a signal has ended is recorded, so that it need not end the next call.
    """
    if sweep.together:
        return _run_here(sweep, entry)
    given = [f"--config={sweep.path}:{entry.point.argument}", f"--workdir={entry.run_folder.path}"]
    given += [f"--config.{field}={value}" for field, value in sweep.overrides.items()]
    status, said = apart.run([sys.executable, "-m", "vitmed.main", *given, *cluster.flags(sweep.team)])
    if sweep.team is not None and status < 0:
        if status != -signal.SIGABRT:
            _record(entry.run_folder, status, said)
        raise processes.ended(sweep.team, status)
    return status, said


def _run_here(sweep: Sweep, entry: Entry) -> tuple[int, str]:
    """A point within this process: (exit status, what it complained of)."""
    config = config_lib.load(f"{sweep.path}:{entry.point.argument}", sweep.overrides)
    try:
        result = experiment.run(experiment.plan(config, experiment.recorded_network(entry.run_folder)), entry.run_folder)
    except (config_lib.InputError, config_lib.MachineError) as error:
        print(f"vitmed: {error}", file=sys.stderr)
        return 2 if isinstance(error, config_lib.InputError) else 1, str(error)
    return 1 if result["failed_seeds"] else 0, ""


def _held(entry: Entry) -> str | None:
    """Say who else has the folder of a point; None where nobody does."""
    holder = guard.holder(entry.run_folder.path)
    return holder and f"{entry.run_folder.path} is in use by {holder}; left to it"


def _record(run_folder: folder.RunFolder, status: int, said: str, *, writes: bool = True) -> str:
    """Leave in a point's folder that it failed, unless another process `writes`, and say it in a line."""
    if status < 0:
        name = signal.Signals(-status).name
        ended = f"killed by {name}{', perhaps for want of memory' if name == 'SIGKILL' else ''}"
    else:
        ended = f"exit status {status}"
    failure = {"ended": ended, "said": said or None}
    try:
        if writes:
            run_folder.write_failure(failure)
    except (config_lib.InputError, config_lib.MachineError) as error:  # the next point may have a better place
        print(f"vitmed: {error}", file=sys.stderr)
    return _failure_text(failure)


def _say_progress(entries: Sequence[Entry], results: Sequence[Mapping[str, Any] | None], faults: Mapping[str, str]) -> None:
    """A line: how many points are done, how many have failed in this call, and how long the rest will take."""
    done = [(entry, result) for entry, result in zip(entries, results, strict=True) if result]
    left = [entry for entry, result in zip(entries, results, strict=True) if not result and entry.name not in faults]
    failed = f", {len(faults)} failed" if faults else ""
    arithmetic = [(forecast.seconds(entry.planned), result) for entry, result in done]
    seconds = forecast.seconds_left(arithmetic, [forecast.seconds(entry.planned) for entry in left])
    time = f", about {forecast.duration_text(seconds)} left" if left and seconds is not None else ""
    print(f"vitmed: {len(done)} of {len(entries)} points done{failed}{time}", file=sys.stderr, flush=True)
