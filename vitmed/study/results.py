"""A study as tables for people: scores, differences, costs. What they are written as is in `formats`."""

import dataclasses
from collections.abc import Sequence

from vitmed import metrics
from vitmed.study import analysis, comparisons, statistics

NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "auc": "AUC",
    "accuracy": "accuracy",
    "quadratic_weighted_kappa": "quadratic weighted kappa",
    "f1": "F1",
}
METHOD = (
    "Mean ± standard deviation over seeds on the test split, the best in bold. In brackets: the 95 % percentile interval of {resamples:,} "
    "joint resamples of seeds and test images (stratified by class; with one seed of the images alone). Differences are paired by seed and "
    "image; their p-values come from the same resamples, Holm's correction is over the comparisons of one kind and metric."
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What stands in a table, and the number that it is sorted by."""

    text: str
    number: float | None = None
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A titled table; the first column names the row."""

    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def title(data_set: analysis.DataSet) -> str:
    """The data set's name, and that it is synthetic where it is."""
    return f"{data_set.name} (synthetic)" if data_set.synthetic else data_set.name


def seeds_text(members: Sequence[analysis.Measured]) -> str:
    """How many seeds stand behind the numbers."""
    counts = sorted({len(member.subject.seeds) for member in members})
    return f"{counts[0]} seed{'s' if counts != [1] else ''}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def interval_text(interval: statistics.Interval | statistics.Difference, *, signed: bool = False) -> str:
    """.812 [.790, .841], or with signs."""
    sign = "+" if signed else ""
    return f"{interval.estimate:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def p_text(p_value: float | None) -> str:
    """Three digits, or that it is smaller."""
    return "-" if p_value is None else "< .001" if p_value < 0.001 else f"{p_value:.3f}"


def scores(data_set: analysis.DataSet) -> Table:
    """Every subject's metrics, and its gain in balanced accuracy over the largest patch of its series."""
    members = [member for series in data_set.series for member in series.members]
    shown = metrics.metric_names(data_set.task)
    shown = ("balanced_accuracy", *(name for name in shown if name != "balanced_accuracy"))
    best = {name: _best(members, name) for name in shown}
    gains = {id(gain.first): gain for series in data_set.series for gain in series.gains if gain.metric == "balanced_accuracy"}
    rows = []
    for member in members:
        cells = [Cell(member.subject.name), Cell(str(len(member.subject.seeds)), len(member.subject.seeds))]
        cells += [_score_cell(member, name, best=member is best[name]) for name in shown]
        rows.append((*cells, *_gain_cells(gains.get(id(member.subject)))))
    header = ("", "seeds", *(NAMES[name] for name in shown), "gain in balanced accuracy over the largest patch", "p (Holm)")
    caption = f"{data_set.num_images:,} test images, {seeds_text(members)}."
    return Table(f"{title(data_set)}: scores", caption, header, tuple(rows))


def _best(members: Sequence[analysis.Measured], name: str) -> analysis.Measured | None:
    known = [member for member in members if member.intervals[name] is not None]
    return max(known, key=lambda member: member.intervals[name].estimate, default=None)


def _score_cell(member: analysis.Measured, name: str, *, best: bool) -> Cell:
    interval = member.intervals[name]
    if interval is None:
        return Cell("-")
    mean, sd = metrics.mean_and_sd(member.per_seed[name])
    spread = f" ± {sd:.3f}" if sd is not None else ""
    return Cell(f"{mean:.3f}{spread} [{interval.low:.3f}, {interval.high:.3f}]", mean, best)


def _gain_cells(gain: comparisons.Comparison | None) -> tuple[Cell, Cell]:
    if gain is None:
        return Cell("-"), Cell("-")
    return Cell(interval_text(gain.difference, signed=True), gain.difference.estimate), Cell(p_text(gain.adjusted), gain.adjusted)


def costs(data_set: analysis.DataSet) -> Table:
    """What every run took, how it was trained out, and how well calibrated its probabilities are."""
    rows = []
    members = [member for series in data_set.series for member in series.runs]
    for member in members:
        result, last = member.subject.run.result, last_training_losses(member)
        peak = result["peak_memory_bytes"]
        numbers = [
            (f"{result['num_tokens']:,}", result["num_tokens"]),
            (f"{result['gmacs_forward']:.3g}", result["gmacs_forward"]),
            (f"{result['num_trainable_params']:,}", result["num_trainable_params"]),
            (f"{result['train_seconds']:,.0f}", result["train_seconds"]),
            (f"{result['test_milliseconds_per_image']:.2f}", result["test_milliseconds_per_image"]),
            ("-", None) if peak is None else (f"{peak / 2**30:.2f}", peak),
            _mean_cell(last),
            _mean_cell(member.subject.run.of_seeds("val", "loss")),
            _mean_cell(member.brier_score),
            _mean_cell(member.expected_calibration_error),
        ]
        rows.append((Cell(member.subject.name), *(Cell(text, number) for text, number in numbers)))
    header = ("", "tokens", "GMACs", "trained parameters", "training s, all seeds", "ms / test image", "peak GiB")
    header += ("last training loss", "best validation loss", "Brier score", "expected calibration error")
    devices = ", ".join(dict.fromkeys(member.subject.run.result["device"] for member in members))
    caption = f"{data_set.num_images:,} test images, {seeds_text(members)}, on {devices}."
    return Table(f"{title(data_set)}: cost, losses and calibration", caption, header, tuple(rows))


def last_training_losses(member: analysis.Measured) -> list[float | None]:
    """The training loss of the last epoch of each seed of a run, None where none is recorded."""
    run = member.subject.run
    if not run.epochs:
        return [None] * len(member.subject.seeds)
    return [run.epochs[-1]["train_loss"][run.result["seeds"].index(seed)] for seed in member.subject.seeds]


def _mean_cell(values: Sequence[float | None]) -> tuple[str, float | None]:
    mean, _ = metrics.mean_and_sd(values)
    return ("-", None) if mean is None else (f"{mean:.3f}", mean)


def differences(data_set: analysis.DataSet) -> Table:
    """The paper's contrast, ensembles against their best member, other series against the plain one, and slices against patches."""
    asked = [(one, "the paper's contrast") for series in data_set.series for one in series.contrast.comparisons]
    asked += [(one, "ensemble against its best member on validation") for series in data_set.series for one in series.of_ensembles]
    asked += [(one, "against the plain recipe") for series in data_set.series for one in series.against_plain]
    asked += [(one, "slices against patches, trained alike") for one in data_set.against_patches]
    asked += [(one, "other views, trained alike") for one in data_set.other_views]
    rows = tuple(
        (
            Cell(f"{one.first.name} - {one.second.name}"),
            Cell(why),
            Cell(NAMES[one.metric]),
            Cell(interval_text(one.difference, signed=True), one.difference.estimate),
            Cell(p_text(one.difference.p_value if one.adjusted is None else one.adjusted), one.adjusted or one.difference.p_value),
            Cell(str(one.num_seeds), one.num_seeds),
        )
        for one, why in asked
    )
    header = ("difference", "what it is", "metric", "estimate [95 % interval]", "p", "seeds")
    caption = f"{data_set.num_images:,} test images; p of the paper's contrast as it is, all others after Holm's correction."
    return Table(f"{title(data_set)}: paired differences", caption, header, rows)


def of_classes(data_set: analysis.DataSet) -> Table:
    """Every class of every run against the rest."""
    rows = []
    for member in (member for series in data_set.series for member in series.runs):
        for one in member.of_classes:
            known = [one.intervals[name] for name in metrics.CLASS_METRICS]
            scored = (Cell("-") if interval is None else Cell(interval_text(interval), interval.estimate) for interval in known)
            rows.append((Cell(member.subject.name), Cell(str(one.number), one.number), Cell(f"{one.count:,}", one.count), *scored))
    header = ("", "class", "images of it", *(NAMES.get(name, name) for name in metrics.CLASS_METRICS))
    how = "each label above .5" if data_set.task == "multi-label" else "the class of highest probability"
    caption = f"{data_set.num_images:,} test images, {seeds_text(data_set.series[0].runs)}, each class against the rest; decided: {how}."
    return Table(f"{title(data_set)}: classes", caption, header, tuple(rows))


def scaling(data_set: analysis.DataSet) -> Table:
    """The expected calibration error of every run before and after temperature scaling."""
    rows = []
    for member in (member for series in data_set.series for member in series.runs):
        if (one := member.scaling) is not None:
            mean, _ = metrics.mean_and_sd(one.temperatures)
            temperatures = Cell(", ".join(f"{temperature:.2f}" for temperature in one.temperatures), mean)
            errors = (Cell(interval_text(interval), interval.estimate) for interval in (one.before, one.after))
            rows.append((Cell(member.subject.name), temperatures, *errors))
    header = ("", "temperature of each seed", "expected calibration error", "after temperature scaling")
    caption = f"{data_set.num_images:,} test images, {seeds_text(data_set.series[0].runs)}; the temperatures are fitted on validation."
    return Table(f"{title(data_set)}: temperature scaling", caption, header, tuple(rows))


def tables(data_set: analysis.DataSet) -> list[Table]:
    """All tables of a data set that have rows."""
    made = (scores(data_set), differences(data_set), costs(data_set), scaling(data_set), of_classes(data_set))
    return [table for table in made if table.rows]
