"""What the numbers say, in words that are computed from them: no claim without its interval, nothing said of what was not run."""

from vitmed.study import analysis, comparisons, formats, results

LEVEL = 0.05


def verdict(one: comparisons.Comparison) -> str:
    """Which of the two is better by the interval, and by the corrected p-value where there is one, or that these data do not tell."""
    if one.difference.low <= 0 <= one.difference.high:
        return "these data do not tell the two apart"
    if one.adjusted is not None and one.adjusted >= LEVEL:
        return f"not told apart once corrected for the number of comparisons (p {results.p_text(one.adjusted)} after Holm)"
    if one.difference.low > 0:
        return f"{one.first.name} is better here"
    return f"{one.second.name} is better here"


def difference_text(one: comparisons.Comparison) -> str:
    """The estimate, its interval, how many seeds, and the verdict."""
    seeds = f"{one.num_seeds} seed{'s' if one.num_seeds > 1 else ''}"
    gap = results.interval_text(one.difference, signed=True)
    return f"{results.NAMES[one.metric]} {gap} ({seeds}, {one.num_images:,} images): {verdict(one)}"


def of_data_set(one: analysis.DataSet) -> list[str]:
    """Sentences about a data set: its plain series, the paper's contrast, corrected gains, ensembles, other series, slices and patches."""
    said = []
    for series in one.series:
        said += [f"{series.name[:1].upper()}{series.name[1:]}:"] if series.name else []
        said += _contrast(series) + _gains(series)
        said += [f"{asked.first.name} against its best member by validation loss, {asked.second.name}: {difference_text(asked)}."
                 for asked in series.of_ensembles if asked.metric == "balanced_accuracy"]  # fmt: skip
        said += [f"{asked.first.name} against {asked.second.name} of the plain recipe: {difference_text(asked)}."
                 for asked in series.against_plain if asked.metric == "balanced_accuracy"]  # fmt: skip
    said += [f"trained alike, {asked.first.name} against {asked.second.name}: {difference_text(asked)}."
             for asked in one.against_patches + one.other_views if asked.metric == "balanced_accuracy"]  # fmt: skip
    if one.plain is None and len(one.series) > 1:
        said.append("no run has all the usual settings, so that no series is held against a plain one.")
    if one.synthetic:
        said.append("These images are generated: they show how the program works, not what a patch size is worth on medical images.")
    return [_range(one, one.series[0]), *(sentence[:1].upper() + sentence[1:] for sentence in said)]


def _range(one: analysis.DataSet, series: analysis.Series) -> str:
    known = [run for run in series.runs if run.intervals["balanced_accuracy"]]
    where = (
        f"{results.title(one)}: {one.num_images:,} test images, {', '.join(filter(None, (results.seeds_text(series.runs), series.name)))}"
    )
    if not known:
        return f"{where}. Balanced accuracy is undefined."
    listed = ", ".join(f"{results.interval_text(run.intervals['balanced_accuracy'])} at patch {run.subject.patch}" for run in known)
    return f"{where}. Balanced accuracy {listed}."


def _contrast(series: analysis.Series) -> list[str]:
    note = f" ({series.contrast.note})" if series.contrast.note else ""
    if not series.contrast.comparisons:
        return [f"the paper's contrast cannot be asked{note}."]
    first = series.contrast.comparisons[0]
    asked = "; ".join(difference_text(one) for one in series.contrast.comparisons)
    return [f"the paper's contrast, {first.first.name} against {first.second.name}{note}: {asked}."]


def _gains(series: analysis.Series) -> list[str]:
    asked = [gain for gain in series.gains if gain.metric == "balanced_accuracy"]
    if len(asked) < 2:
        return []
    clear = [gain for gain in asked if gain.adjusted is not None and gain.adjusted < LEVEL]
    listed = ", ".join(f"{gain.first.patch} ({results.interval_text(gain.difference, signed=True)})" for gain in clear)
    how_many = f"{len(clear) or 'none'} differ{'' if len(clear) > 1 else 's'}"
    found = f"{how_many} from {asked[0].second.name} at the {LEVEL:.0%} level after Holm's correction"
    return [f"of {len(asked)} smaller patch sizes {found}{f': {listed}' if clear else ''}."]


def across(one: analysis.Across) -> str:
    """What holds over the data sets of one rank."""
    listed = ", ".join(
        f"{name} (patch {asked.first.patch} against {asked.second.patch}) {results.interval_text(asked.difference, signed=True)}"
        for name, asked in one.contrasts.items()
    )
    text = f"{one.rank}D, {results.NAMES[one.metric]}, contrast of every data set: {listed}. "
    if one.p_value is None:
        few = len(one.contrasts)
        return f"{text}Too few sets for Wilcoxon's signed-rank test ({few}; six are needed), so nothing is said about data sets in general."
    return f"{text}Wilcoxon's signed-rank test over {len(one.contrasts)} sets: p {results.p_text(one.p_value)}."


def as_markdown(study: analysis.Study) -> str:
    """Everything said, a section per data set."""
    text = formats.markdown_text
    parts = ["# Summary", ""]
    if study.across:
        parts += ["## Over the data sets", "", *(f"- {text(across(one))}" for one in study.across), ""]
    for one in study.data_sets:
        parts += [f"## {text(results.title(one))}", "", *(f"- {text(sentence)}" for sentence in of_data_set(one)), ""]
    if study.faults:
        parts += ["## Left out", "", *(f"- {text(fault)}" for fault in study.faults), ""]
    return "\n".join(parts)
