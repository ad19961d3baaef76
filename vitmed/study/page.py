"""index.html: one static page with all of a study, which needs no network and no other file."""

import base64
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

import jinja2

from vitmed.study import analysis, results, summary


def render(study: analysis.Study, *, figures: Mapping[str, Mapping[str, bytes]], version: str) -> str:
    """The page; `figures` are encoded ones by name. Everything that is not ours is escaped."""
    templates = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = importlib.resources.files("vitmed.study").joinpath("page.html").read_text(encoding="utf-8")
    return templates.from_string(text).render(
        method=results.METHOD.format(resamples=study.resamples),
        version=version,
        faults=study.faults,
        across=[summary.across(one) for one in study.across],
        overview=[_image(figures, name, alt) for name, alt in (("patch_size", "score against patch size"), ("cost", "score against cost"))],
        data_sets=[_data_set(one, figures) for one in study.data_sets],
    )


def _data_set(one: analysis.DataSet, figures: Mapping[str, Mapping[str, bytes]]) -> dict[str, Any]:
    stem = one.name.replace(" ", "_")
    kinds = {"learning": "learning curves", "confusion": "confusion matrices", "roc": "ROC curves", "calibration": "calibration"}
    return {
        "anchor": stem,
        "title": results.title(one),
        "summary": summary.of_data_set(one),
        "tables": results.tables(one),
        "figures": [_image(figures, f"{stem}_{kind}", words) for kind, words in kinds.items()],
        "runs": [
            {
                "name": run.subject.name,
                "folder": run.subject.run.label,
                "config": json.dumps(dict(run.subject.run.config), indent=1, default=list),
            }
            for series in one.series
            for run in series.runs
        ],
    }


def _image(figures: Mapping[str, Mapping[str, bytes]], name: str, alt: str) -> dict[str, str]:
    data = base64.b64encode(figures[name]["svg"]).decode()
    return {"alt": alt, "source": f"data:image/svg+xml;base64,{data}"}
