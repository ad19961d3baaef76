"""One finished run at a glance: its tables and figures, for whoever follows it from outside."""

import pathlib

import matplotlib

from vitmed.study import analysis, figures, results, series


def of_run(path: pathlib.Path) -> tuple[dict[str, list[tuple[str, ...]]], dict[str, bytes]]:
    """(tables by name, each with its header first; figures as PNG by name) of the run in a folder.

    InputError where it cannot be read or every seed has failed.
    """
    runs, _ = series.collect([path])
    (one,) = analysis.analyse(runs).data_sets
    made = {"scores": results.scores(one), "classes": results.of_classes(one)}
    tables = {name: [table.header, *(tuple(cell.text for cell in row) for row in table.rows)] for name, table in made.items()}
    kinds = {
        "learning_curves": figures.learning_curves,
        "confusion": figures.confusion,
        "roc": figures.roc,
        "calibration": figures.reliability,
    }
    with matplotlib.rc_context(figures.STYLE):
        drawn = {name: draw(one) for name, draw in kinds.items()}
    return tables, {name: figures.encode(figure, "png")["png"] for name, figure in drawn.items()}
