"""Measure finished runs from their checkpoints alone: `python -m vitmed.evaluate --workdir=DIR`; several folders make an ensemble.

The members of an ensemble may differ in patch size, variant and recipe, not in data: their probabilities are averaged seed by seed.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
import rich.console
import rich.table

from vitmed import cli, experiment, external, inference, metrics
from vitmed import config as config_lib
from vitmed.data import sources
from vitmed.runs import files, folder, machine
from vitmed.study import classes, results, tables
from vitmed.training import evaluation, programs

SPLITS = ("train", "val", "test")
EXAMPLES = """examples:
  python -m vitmed.evaluate --workdir=runs/breast_p7
  python -m vitmed.evaluate --workdir=runs/breast_p4 --workdir=runs/breast_p7 --out=ensemble.json
  python -m vitmed.evaluate --workdir=runs/breast_p7 --split=val --data_root=/data/medmnist
  python -m vitmed.evaluate --workdir=runs/breast_p7 --dataset=folder:/data/other_hospital"""


def make_parser() -> cli.Parser:
    """The flags."""
    parser = cli.Parser(prog="vitmed.evaluate", description="Measure runs from their checkpoints.", epilog=EXAMPLES)
    parser.add_argument("--workdir", required=True, action="append", metavar="DIR", help="a run's folder; given several times: an ensemble")
    parser.add_argument("--split", default="test", metavar="SPLIT", help=f"one of {', '.join(SPLITS)} (default: test)")
    parser.add_argument(
        "--dataset", metavar="NAME", help="external validation: another set, by name or as folder:PATH, of the same classes"
    )
    parser.add_argument("--data_root", metavar="DIR", help="folder of .npz files, where it is not the one that the run used")
    parser.add_argument("--base", metavar="FILE", help="the weights that a plugin stands on, where they do not lie where it was trained")
    parser.add_argument("--out", metavar="FILE", help="also write the numbers there, as JSON")
    return parser


@dataclasses.dataclass(frozen=True)
class Member:
    """One run's predictions [R, N, K] of a split, with what must agree between the members of an ensemble."""

    path: pathlib.Path
    description: sources.Description
    seeds: tuple[int, ...]
    failed: list[bool]
    labels: np.ndarray
    predictions: evaluation.Predictions


def main(argv: Sequence[str]) -> int:
    """Evaluate and print; the exit status."""
    flags, overrides = cli.parse_flags(make_parser(), argv)
    machine.cache_programs()
    if overrides:
        raise config_lib.InputError(f"--config.{next(iter(overrides))}: a run's config is its own; vitmed.evaluate takes no overrides")
    config_lib.one_of("--split", flags.split, SPLITS)
    out = flags.out and cli.file_to_write("--out", flags.out)
    paths = [pathlib.Path(path).expanduser() for path in flags.workdir]
    configs = [inference.restored_config(folder.RunFolder(path), flags.data_root, flags.base) for path in paths]
    check_alike(paths, configs)
    with machine.memory_errors():
        members = [predict(path, config, split=flags.split, name=flags.dataset) for path, config in zip(paths, configs, strict=True)]
    evaluated = measure(members)
    for warning in evaluated.warnings:
        print(f"vitmed: {flags.split}: {warning}", file=sys.stderr)
    show(members, flags.split, evaluated, trained_on=configs[0].data.name)
    if out:
        description = members[0].description
        record = {"workdirs": flags.workdir, "dataset": description.name, "synthetic": description.synthetic, "seeds": members[0].seeds}
        record |= {"external": flags.dataset is not None, "trained_on": configs[0].data.name}
        record |= {flags.split: evaluated.metrics, "per_class": classes_record(evaluated, description.class_names)}
        files.write_whole(out, json.dumps(record, indent=2).encode() + b"\n")
    failed = sorted({seed for member in members for seed, bad in zip(member.seeds, member.failed, strict=True) if bad})
    if failed:
        print(f"vitmed: failed seeds {', '.join(map(str, failed))} are left out", file=sys.stderr)
    return 1 if failed else 0


def check_alike(paths: Sequence[pathlib.Path], configs: Sequence[ml_collections.ConfigDict]) -> None:
    """InputError where runs do not belong together, before any of them is predicted."""
    for path, config in zip(paths, configs, strict=True):
        for what, mine, first in (("data set", config.data.name, configs[0].data.name), ("seeds", config.seeds, configs[0].seeds)):
            if mine != first:
                raise config_lib.InputError(f"{path}: its {what} is {mine}, that of {paths[0]} is {first}; an ensemble shares it")


def predict(path: pathlib.Path, config: ml_collections.ConfigDict, *, split: str, name: str | None = None) -> Member:
    """Restore a run's best parameters and take them over a split of its own data, or of the set of that `name`, by training's program."""
    planned = inference.plan(path, config)
    if name is None:
        dataset = planned.load()
        num_examples = len(dataset.splits["train"].labels)
    else:
        dataset = external.load(name, planned, root=config.data.root)
        if dataset.words:
            print(f"vitmed: {dataset.words}", file=sys.stderr)
        num_examples = planned.description.num_examples["train"]
    images, labels = dataset.splits[split].images, dataset.splits[split].labels
    if not len(labels):
        there = ", ".join(known for known, arrays in dataset.splits.items() if len(arrays.labels))
        raise config_lib.InputError(f"--split={split}: {dataset.description.name} has no such examples; choose one of {there}")
    schedule = experiment.step_plan(planned, num_examples)
    run = inference.restore(path, planned, steps_per_epoch=schedule.steps_per_epoch)
    progress = run.progress
    if name is None and progress.data_md5 != dataset.md5:
        raise config_lib.InputError(f"{path}: trained on data of MD5 {progress.data_md5}, these have {dataset.md5}; give --data_root")
    if not progress.ended(schedule, run.recipe.patience):
        print(f"vitmed: {path}: not finished, {len(progress.rows)} of {schedule.epochs} epochs", file=sys.stderr)
    batch_size = config.eval.batch_size
    program, _ = programs.compile_predict(run.recipe, images, labels, batch_size=batch_size)
    predictions = evaluation.predict(program, run.params, images, labels, batch_size=batch_size)
    return Member(path, dataset.description, planned.seeds, progress.failed, labels, predictions)


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What one run or an ensemble scores: metrics as training measures them, every class by itself, and what is undefined."""

    metrics: dict[str, list[float | None]]
    classes: tuple[classes.OfClass, ...]  # of the seeds that have not failed
    warnings: list[str]


def measure(members: Sequence[Member]) -> Evaluated:
    """Measure one run, or the mean of several runs' probabilities, seed by seed."""
    first = members[0]
    for other in members[1:]:
        if not np.array_equal(first.labels, other.labels):
            raise config_lib.InputError(f"{other.path}: its labels are not those of {first.path}; an ensemble needs the same examples")
    task, labels = first.description.task, first.labels
    if len(members) == 1:
        probabilities, losses = first.predictions.probabilities, evaluation.mean_losses(first.predictions)
    else:
        probabilities = np.mean([member.predictions.probabilities for member in members], axis=0, dtype=np.float64)
        losses = np.array([metrics.log_loss(task, labels, of_seed) for of_seed in probabilities])
    failed = [any(bad) for bad in zip(*(member.failed for member in members), strict=True)]
    names = first.description.class_names
    measured, warnings = evaluation.measure(task, labels, probabilities=probabilities, losses=losses, class_names=names, failed=failed)
    alive = probabilities[~np.array(failed)]
    for of_seed in alive:
        warnings += [warning for warning in metrics.per_class(task, labels, of_seed, class_names=names).warnings if warning not in warnings]
    return Evaluated(measured, classes.resampled(task, labels, alive) if len(alive) and len(labels) else (), warnings)


def classes_record(evaluated: Evaluated, names: Sequence[str]) -> list[dict[str, Any]]:
    """What --out says of the classes: per metric a value for each seed that has not failed, and the ends of the mean's interval."""
    record = []
    for one in evaluated.classes:
        row = {"class": one.number, "name": names[one.number], "num_images": one.count, **one.per_seed}
        record.append(row | {f"{name}_interval": known and [known.low, known.high] for name, known in one.intervals.items()})
    return record


def show(members: Sequence[Member], split: str, evaluated: Evaluated, *, trained_on: str) -> None:
    """Two tables: a line per metric, a column per seed and their mean; and a line per class."""
    title = " + ".join(str(member.path) for member in members)
    synthetic = " (synthetic)" if members[0].description.synthetic else ""
    name = members[0].description.name
    where = "" if name == trained_on else f", external validation: trained on {trained_on}"
    table = rich.table.Table(title=f"{title}: {name}{synthetic}, {split}{where}", title_justify="left")
    for name in ("metric", *(f"seed {seed}" for seed in members[0].seeds), "mean ± sd"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name, values in evaluated.metrics.items():
        table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values), tables.spread_text(values))
    tables.show(table)
    if evaluated.classes:
        tables.show(classes_table(evaluated.classes, members[0].description.class_names))


def classes_table(found: Sequence[classes.OfClass], names: Sequence[str]) -> rich.table.Table:
    """A line per class: the mean over seeds and its interval."""
    table = rich.table.Table(caption="each class against the rest: mean over seeds [95 % interval over seeds and images]")
    for column in ("class", "images", *metrics.CLASS_METRICS):
        table.add_column(column, justify="left" if column == "class" else "right", overflow="fold")
    for one in found:
        cells = ("-" if known is None else results.interval_text(known) for known in one.intervals.values())
        table.add_row(f"{one.number} {names[one.number]}", f"{one.count:,}", *cells)
    return table


if __name__ == "__main__":
    sys.exit(cli.run_cli(main, sys.argv[1:]))
