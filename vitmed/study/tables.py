"""The table of results that a person reads: a line per run, mean and standard deviation over its seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table

from vitmed import config, metrics

COLUMNS = ("data set", "patch", "tokens", "balanced accuracy", "AUC", "training s", "ms / test image")


def spread_text(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation over seeds, such as .812 ± .034; a dash where undefined for all."""
    mean, sd = metrics.mean_and_sd(values)
    if mean is None:
        return "-"
    return f"{mean:.3f}" if sd is None else f"{mean:.3f} ± {sd:.3f}"


def row(result: Mapping[str, Any]) -> tuple[str, ...]:
    """One run's cells, in the order of COLUMNS."""
    name = result["dataset"]
    return (
        f"{name} (synthetic)" if name.startswith("phantom") else name,
        config.patch_text(result["patch_size"]),
        f"{result['num_tokens']:,}",
        spread_text(result["test"]["balanced_accuracy"]),
        spread_text(result["test"]["auc"]),
        f"{result['train_seconds']:.1f}",
        f"{result['test_milliseconds_per_image']:.2f}",
    )


def of_results(results: Mapping[str, Mapping[str, Any]]) -> rich.table.Table:
    """The table of runs by name; its caption says over how many seeds. Names are shown where data set and patch do not tell runs apart."""
    counts = sorted({len(result["seeds"]) - len(result["failed_seeds"]) for result in results.values()})
    alike = len({(result["dataset"], *result["patch_size"]) for result in results.values()}) < len(results)
    seeds = f"{counts[0]} seed{'s' if counts[0] != 1 else ''}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    table = rich.table.Table(caption=f"test split, mean ± standard deviation over {seeds}; training seconds of all seeds together")
    for column in ("point",) * alike + COLUMNS:
        table.add_column(column, justify="left" if column in ("point", "data set") else "right", overflow="fold")
    for name, result in results.items():
        table.add_row(*(name,) * alike, *row(result))
    return table


def show(table: rich.table.Table) -> None:
    """Print a table on standard output, whole also where that is no terminal."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=120)
    console.print(table)
