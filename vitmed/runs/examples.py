"""examples.csv of a run on own data: which file each row of its predictions is of."""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence

from vitmed import config as config_lib
from vitmed.runs import files

COLUMNS = ("split", "row", "path", "label", "group")


def pack(examples: Mapping[str, Sequence[Mapping[str, str]]]) -> bytes:
    """The file's bytes for the examples (path, label, group) of each split, in the order of its rows."""
    text = io.StringIO()
    rows = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    rows.writeheader()
    for split, of_split in examples.items():
        rows.writerows({"split": split, "row": row, **example} for row, example in enumerate(of_split))
    return text.getvalue().encode()


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows; InputError if the file is absent or broken."""
    try:
        rows = list(csv.DictReader(io.StringIO(files.read(path).decode())))
    except FileNotFoundError as error:
        raise config_lib.InputError(f"{path} is missing; only runs on own data have it") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise config_lib.InputError(f"{path} is broken: {config_lib.one_line(error)[:200]}; restore it from a copy") from error
    if any(set(row) != set(COLUMNS) or None in row.values() for row in rows):
        raise config_lib.InputError(f"{path} is broken: it lacks columns or values; restore it from a copy")
    return rows
