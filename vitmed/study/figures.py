"""The figures of a study, as SVG and PNG: nothing is drawn that its tables do not hold.

Patch sizes have one colour each, from dark (coarse) to light (fine); a filled band or bar is a 95 % interval.
"""

import io
import math
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib import axes, figure, ticker

from vitmed import metrics
from vitmed.study import analysis, calibration, results, subjects

# Text stays text, and the same study gives the same bytes.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "vitmed", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
PANEL = (3.4, 2.7)  # inches
DOTS_PER_INCH = 110


def draw(study: analysis.Study) -> dict[str, figure.Figure]:
    """Every figure by its file's name: two over all data sets, four of each."""
    with matplotlib.rc_context(STYLE):
        drawn = {"patch_size": patch_size(study), "cost": cost(study)}
        for one in study.data_sets:
            name = one.name.replace(" ", "_")
            drawn[f"{name}_learning"] = learning_curves(one)
            drawn[f"{name}_confusion"] = confusion(one)
            drawn[f"{name}_roc"] = roc(one)
            drawn[f"{name}_calibration"] = reliability(one)
    return drawn


def encode(drawn: figure.Figure, *kinds: str) -> dict[str, bytes]:
    """The figure as svg and png, or as the kinds that are named."""
    encoded, unsaid = {}, {"svg": {"Date": None}, "png": {"Software": None}}
    with matplotlib.rc_context(STYLE):
        for kind in kinds or unsaid:
            data = io.BytesIO()
            drawn.savefig(data, format=kind, dpi=DOTS_PER_INCH, metadata=unsaid[kind])
            encoded[kind] = data.getvalue()
    return encoded


def _panels(count: int, *, columns: int = 4, scale: float = 1.0) -> tuple[figure.Figure, list[axes.Axes]]:
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    drawn = figure.Figure(figsize=(PANEL[0] * columns * scale, PANEL[1] * rows * scale), layout="constrained")
    grid = drawn.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in grid[count:]:
        spare.remove()
    return drawn, grid[:count]


def _colours(members: Sequence[analysis.Measured]) -> list[tuple[float, ...]]:
    return [tuple(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, max(len(members), 2)))][: len(members)]


def _words(*parts: str) -> str:
    """Text of a figure as it is written: matplotlib would take what stands between two $ for a formula."""
    return ", ".join(filter(None, parts)).replace("$", r"\$")


def _isotropic(series: analysis.Series) -> list[analysis.Measured]:
    return [member for member in series.runs if "x" not in member.subject.patch]


def patch_size(study: analysis.Study) -> figure.Figure:
    """Balanced accuracy against patch size, a panel per set, a line per series, with intervals; a dotted line for the best ensemble."""
    drawn, panels = _panels(len(study.data_sets))
    for panel, one in zip(panels, study.data_sets, strict=True):
        for index, series in enumerate(one.series):
            members = [member for member in _isotropic(series) if member.intervals["balanced_accuracy"]]
            if not members:
                continue
            sizes = [int(member.subject.patch) for member in members]
            found = [member.intervals["balanced_accuracy"] for member in members]
            middle = [each.estimate for each in found]
            reach = [[each.estimate - each.low for each in found], [each.high - each.estimate for each in found]]
            nudged = [size * 1.03**index for size in sizes]  # so that bars of several series stand side by side
            panel.errorbar(
                nudged, middle, yerr=np.clip(reach, 0, None), marker="o", markersize=3, capsize=2, linewidth=1, label=_words(series.name)
            )
        sizes = sorted({int(member.subject.patch) for series in one.series for member in _isotropic(series)})
        panel.set_xscale("log")
        panel.set_xticks(sizes, map(str, sizes))
        panel.minorticks_off()
        panel.invert_xaxis()
        panel.set_title(_words(results.title(one), f"{one.num_images:,} images", results.seeds_text(one.series[0].runs)), fontsize=8)
        panel.set_xlabel("patch size (pixels)" if one.rank == 2 else "patch size (voxels)")
        panel.set_ylabel("balanced accuracy")
        if len(one.series) > 1:
            handles, labels = panel.get_legend_handles_labels()
            panel.legend(handles, [label or "plain" for label in labels], fontsize=6)
    return drawn


def cost(study: analysis.Study) -> figure.Figure:
    """Balanced accuracy against GMACs, training time and time per image, a row per set; the line joins what nothing cheaper beats."""
    drawn, panels = _panels(3 * len(study.data_sets), columns=3)
    kinds = (
        ("gmacs_forward", "GMACs per image"),
        ("train_seconds", "training s, all seeds"),
        ("test_milliseconds_per_image", "ms per image"),
    )
    for row, one in enumerate(study.data_sets):
        members = [member for member in one.series[0].runs if member.intervals["balanced_accuracy"]]
        for panel, (field, label) in zip(panels[3 * row : 3 * row + 3], kinds, strict=True):
            points = [(member.subject.run.result[field], member.intervals["balanced_accuracy"].estimate) for member in members]
            for (x, y), colour, member in zip(points, _colours(members), members, strict=True):
                panel.plot(x, y, "o", color=colour, markersize=4)
                panel.annotate(member.subject.patch, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
            best = pareto(points)
            panel.plot([x for x, _ in best], [y for _, y in best], color="grey", linewidth=0.8, zorder=0)
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=6))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
            panel.set_xlabel(label)
            panel.set_ylabel("balanced accuracy")
            panel.set_title(_words(results.title(one), one.series[0].name), fontsize=8)
    return drawn


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, score) those that no cheaper or equally dear point reaches in score, by rising cost."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def learning_curves(one: analysis.DataSet) -> figure.Figure:
    """Training loss (dashed) and validation loss against epoch, the mean over seeds; a panel per series."""
    drawn, panels = _panels(len(one.series), columns=3)
    for panel, series in zip(panels, one.series, strict=True):
        for member, colour in zip(series.runs, _colours(series.runs), strict=True):
            epochs = member.subject.run.epochs
            for values, line, label in (
                ([row["train_loss"] for row in epochs], "--", None),
                ([row["val"]["loss"] for row in epochs], "-", member.subject.patch),
            ):
                means = [metrics.mean_and_sd(of_epoch)[0] for of_epoch in values]
                panel.plot(
                    range(1, len(means) + 1), [math.nan if mean is None else mean for mean in means], line, color=colour, lw=1, label=label
                )
        panel.set_title(_words(results.title(one), series.name), fontsize=8)
        panel.set_xlabel("epoch")
        panel.set_ylabel("loss (training dashed)")
        panel.legend(title="patch", fontsize=6, title_fontsize=6)
    return drawn


def confusion(one: analysis.DataSet) -> figure.Figure:
    """The share of each true class's images given to each class, mean over seeds: a panel per run; of multi-label sets per label."""
    members = one.series[0].members
    drawn, panels = _panels(len(members))
    for panel, member in zip(panels, members, strict=True):
        shares = confusion_shares(member.subject)
        panel.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        for (row, column), share in np.ndenumerate(shares):
            panel.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=6, color="white" if share > 0.5 else "black")
        panel.set_title(_words(member.subject.name), fontsize=8)
        if one.task == "multi-label":
            panel.set_xticks([0, 1], ["missed", "found"])
            panel.set_ylabel("label")
        else:
            panel.set_xlabel("predicted class")
            panel.set_ylabel("true class")
            panel.set_xticks(range(shares.shape[1]))
        panel.set_yticks(range(shares.shape[0]))
    drawn.suptitle(_words(results.title(one)), fontsize=8)
    return drawn


def confusion_shares(subject: subjects.Subject) -> np.ndarray:
    """[K, K], a row per true class, mean over seeds; multi-label: [L, 2], of the images with each label the share missed and found."""
    if subject.task == "multi-label":
        found = ((subject.probabilities > 0.5) & (subject.labels == 1)).sum(axis=1) / np.maximum((subject.labels == 1).sum(axis=0), 1)
        return np.stack([1 - found.mean(axis=0), found.mean(axis=0)], axis=1)
    num_classes = subject.probabilities.shape[2]
    cells = subject.labels[:, 0] * num_classes + subject.probabilities.argmax(axis=2)  # [R, N]
    counts = np.bincount(cells.ravel(), minlength=num_classes**2).reshape(num_classes, num_classes)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _overlaid(one: analysis.DataSet, line: Callable[[axes.Axes, analysis.Measured, tuple], None], labels: tuple[str, str]) -> figure.Figure:
    """One panel with a line per run of the plain series and the diagonal."""
    drawn, (panel,) = _panels(1, scale=1.2)
    panel.plot([0, 1], [0, 1], color="lightgrey", lw=0.8)
    for member, colour in zip(one.series[0].runs, _colours(one.series[0].runs), strict=True):
        line(panel, member, colour)
    panel.set_xlabel(labels[0])
    panel.set_ylabel(labels[1])
    panel.set_title(_words(results.title(one), one.series[0].name), fontsize=8)
    panel.legend(title="patch", fontsize=6, title_fontsize=6)
    return drawn


def roc(one: analysis.DataSet) -> figure.Figure:
    """ROC curves, mean over seeds and over what the AUC is a mean of: class 1, every class against the rest, or every label."""

    def line(panel: axes.Axes, member: analysis.Measured, colour: tuple) -> None:
        rates, hits = mean_roc(member.subject)
        panel.plot(rates, hits, color=colour, lw=1, label=member.subject.patch)

    return _overlaid(one, line, ("false positive rate", "true positive rate"))


def mean_roc(subject: subjects.Subject, *, points: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """(false positive rates, mean true positive rates at them), each [points]; sides of which there is no example are left out."""
    grid = np.linspace(0.0, 1.0, points)
    if subject.task == "multi-label":
        sides = [(subject.labels[:, k] == 1, k) for k in range(subject.labels.shape[1])]
    else:
        scored = [1] if subject.task == "binary" else range(subject.probabilities.shape[2])
        sides = [(subject.labels[:, 0] == k, k) for k in scored]
    usable = [(positive, k) for positive, k in sides if positive.any() and not positive.all()]
    curves = [roc_at(grid, positive, of_seed[:, k]) for of_seed in subject.probabilities for positive, k in usable]
    return grid, np.mean(curves, axis=0) if curves else np.full(points, math.nan)


def roc_at(grid: np.ndarray, positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """True positive rates at the false positive rates of `grid`, tied scores joined by a straight line."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.concatenate([[0], np.cumsum(positive[order])[ends]]) / positive.sum()
    alarms = np.concatenate([[0], np.cumsum(~positive[order])[ends]]) / (~positive).sum()
    return np.interp(grid, alarms, hits)


def reliability(one: analysis.DataSet) -> figure.Figure:
    """How often a prediction of some confidence is right, over all seeds; the diagonal is perfect calibration."""

    def line(panel: axes.Axes, member: analysis.Measured, colour: tuple) -> None:
        subject = member.subject
        labels = np.concatenate([subject.labels] * len(subject.seeds))
        found = calibration.reliability(subject.task, labels, np.concatenate(list(subject.probabilities)), bins=10)
        error = np.mean(member.expected_calibration_error)
        panel.plot(found.confidence, found.accuracy, "o-", color=colour, lw=1, markersize=3, label=f"{subject.patch} (ECE {error:.3f})")

    return _overlaid(one, line, ("confidence", "share that is right"))
