"""What tables are written as: Markdown, LaTeX, results.csv (a row per subject and seed), classes.csv (per run, class and metric)."""

import csv
import io
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vitmed import metrics
from vitmed.study import analysis, results


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"[\\`*_<>|]", r"\\\g<0>", text)


def as_markdown(table: results.Table) -> str:
    """GitHub's tables."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    ruler = line(["---"] + ["---:"] * (len(table.header) - 1))
    rows = [line([f"**{markdown_text(cell.text)}**" if cell.best else markdown_text(cell.text) for cell in row]) for row in table.rows]
    header = line([markdown_text(name) for name in table.header])
    return "\n".join([f"### {markdown_text(table.title)}", "", markdown_text(table.caption), "", header, ruler, *rows, ""])


LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    sign: f"\\{sign}" for sign in "&%$#_{}"
}


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(LATEX.get(sign, sign) for sign in text)


def as_latex(table: results.Table) -> str:
    """A table for papers; needs the packages booktabs and graphicx."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cells) + r" \\"

    rows = [line([rf"\textbf{{{latex_text(cell.text)}}}" if cell.best else latex_text(cell.text) for cell in row]) for row in table.rows]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_text(table.title)}. {latex_text(table.caption)}}}",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
            r"\toprule",
            line([latex_text(name) for name in table.header]),
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )


def as_csv(study: analysis.Study) -> str:
    """A row per subject and seed: settings, metrics of test and validation, calibration, cost and provenance."""
    rows = [row for one in study.data_sets for series in one.series for member in series.members for row in _csv_rows(one, member)]
    return _csv_text(rows)


def classes_as_csv(study: analysis.Study) -> str:
    """A row per run, class and metric: the mean over the seeds for which it is defined, with its interval."""
    rows = []
    for one in study.data_sets:
        for member in (member for series in one.series for member in series.runs):
            run = {"dataset": one.name, "task": one.task, "patch": member.subject.patch, "series": member.subject.series}
            run |= {
                "run": member.subject.run.label,
                "num_seeds": len(member.subject.seeds),
                "num_test_images": one.num_images,
            }
            for of_class in member.of_classes:
                for name, interval in of_class.intervals.items():
                    mean, _ = metrics.mean_and_sd(of_class.per_seed[name])
                    ends = {"low": None, "high": None} if interval is None else {"low": interval.low, "high": interval.high}
                    defined = sum(value is not None for value in of_class.per_seed[name])
                    place = {"class": of_class.number, "num_images_of_class": of_class.count, "metric": name}
                    rows.append(run | place | {"mean": mean} | ends | {"num_seeds_defined": defined})
    return _csv_text(rows)


def _csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    header = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(header), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({name: "" if _undefined(value) else value for name, value in row.items()} for row in rows)
    return text.getvalue()


def _csv_rows(data_set: analysis.DataSet, member: analysis.Measured) -> list[dict[str, Any]]:
    subject = member.subject
    kind = "run" if subject.run else "ensemble"
    common = {"dataset": data_set.name, "task": data_set.task, "kind": kind, "patch": subject.patch, "series": subject.series}
    rows = []
    for index, seed in enumerate(subject.seeds):
        row = common | {"seed": seed, "num_test_images": data_set.num_images}
        row |= {f"test_{name}": values[index] for name, values in member.per_seed.items()}
        row |= {"test_brier_score": member.brier_score[index]}
        row |= {"test_expected_calibration_error": member.expected_calibration_error[index]}
        rows.append(row | (_csv_of_run(member, index) if subject.run else {}))
    return rows


def _undefined(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _csv_of_run(member: analysis.Measured, index: int) -> dict[str, Any]:
    run = member.subject.run
    result, place = run.result, run.result["seeds"].index(member.subject.seeds[index])
    row = {f"val_{name}": values[place] for name, values in result["val"].items()}
    row |= {"test_loss": result["test"]["loss"][place], "best_epoch": result["best_epoch"][place]}
    row |= {"last_training_loss": results.last_training_losses(member)[index], "image_size": "x".join(map(str, result["image_size"]))}
    row |= {"temperature": member.scaling.temperatures[index] if member.scaling else None}
    names = ("variant", "pretrained", "num_tokens", "num_params", "num_trainable_params", "gmacs_forward", "train_seconds")
    names += ("compile_seconds", "train_images_per_second", "test_milliseconds_per_image", "peak_memory_bytes", "device", "config_digest")
    row |= {name: result[name] for name in names}
    if pathlib.PurePath(result["pretrained"] or "").is_absolute():
        row["pretrained"] = pathlib.PurePath(result["pretrained"]).name
    return row | {
        "jax": result["versions"].get("jax", ""),
        "learning_rate": run.config["train.learning_rate"],
        "run": run.label,
    }
