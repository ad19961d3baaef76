"""The schemas of result.json and calibration.json, which lie beside this file."""

import functools
import importlib.resources
import json
from typing import Any

import jsonschema


@functools.cache
def _schema(name: str) -> jsonschema.Draft202012Validator:
    text = importlib.resources.files("vitmed.runs").joinpath(f"{name}.schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def fault(name: str, record: Any) -> str | None:
    """Say what in a `result` or a `calibration` departs from its schema; None if nothing does."""
    found = jsonschema.exceptions.best_match(_schema(name).iter_errors(record))
    return None if found is None else f"{found.json_path}: {found.message[:200]}"
