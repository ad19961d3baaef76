"""Which files there are, and what a CSV or the folders say of them: label, split, group (a patient), mask; no pixel is read.

A DICOM series is one entry in 3D: the folder that holds its slices. Hidden files and what is no image by its name are passed over, and
counted where it matters.
"""

import collections
import csv
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from vitmed import config
from vitmed.data import dicom, stored

TABLE = "labels.csv"
LIKE_GROUP = ("groups", "patient", "patients", "patient_id", "patientid", "subject", "subject_id", "subjectid", "case_id")
LIKE_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
COLUMNS = ("path", "label", "split", "group", "mask")
SHOWN = 5  # of the files at fault, in an error


@dataclasses.dataclass(frozen=True)
class Entry:
    """One example: a file, or the folder of a DICOM series, and what is known of it; `name` is how the user wrote the path."""

    path: pathlib.Path
    name: str
    label: str | None = None
    split: str | None = None
    group: str | None = None
    mask: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Listing:
    """The examples of a set, how many files were passed over, by reason, and the columns of its table that nothing is read from."""

    entries: tuple[Entry, ...]
    skipped: dict[str, int]
    unused: tuple[str, ...] = ()


def is_image(path: pathlib.Path) -> bool:
    """Whether a file is an image or a volume by its name, or DICOM by its first bytes."""
    if path.name.startswith(".") or path.name == "DICOMDIR":
        return False
    return stored.suffix(path) in (*stored.PICTURES, *stored.TIFFS, *stored.NIFTIS) or dicom.is_dicom(path)


def find(path: pathlib.Path, rank: int) -> Iterator[Entry]:
    """What a FILE, a FOLDER (every image or volume below it, whatever a labels.csv lists) or a CSV names, one at a time.

    InputError where there is nothing of that name, a CSV has no column `path`, or a folder holds no image at all.
    """
    path = existing(path)
    if path.is_file() and stored.suffix(path) == ".csv":
        yield from of_table(path, labelled=False)
    elif path.is_file():
        yield Entry(path, str(path))
    else:
        found = below(path, rank, collections.Counter())
        first = next(found, None)
        if first is None:
            raise config.InputError(f"{path}: no image or volume in this folder or below it; PNG, JPEG, TIFF, NIfTI and DICOM are read")
        yield first
        yield from found


def existing(path: pathlib.Path) -> pathlib.Path:
    """The path, with ~ expanded; InputError where nothing is there."""
    path = pathlib.Path(os.path.expanduser(path))
    if not os.path.exists(path):  # also False of a name that no file can have
        raise config.InputError(f"{path}: no such file or folder; name a CSV, a folder or an image")
    return path


def labelled(path: pathlib.Path, rank: int) -> Listing:
    """The examples that a CSV, a folder with labels.csv, or a folder with one folder per class names; InputError."""
    path = existing(path)
    table = path / TABLE if path.is_dir() else path
    if table.is_file() and (path.is_dir() or stored.suffix(path) == ".csv"):
        entries = tuple(of_table(table, labelled=True))
        return Listing(entries, _unlisted(path, rank, entries) if path.is_dir() else {}, _unused(table))
    if not path.is_dir():
        raise config.InputError(f"{path}: neither a CSV nor a folder; write a CSV with the columns path,label")
    skipped: collections.Counter[str] = collections.Counter()
    entries = []
    folders = [folder.name for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    if folders and all(name.lower() in LIKE_SPLITS for name in folders):
        raise config.InputError(
            f"{path}: its folders {', '.join(sorted(folders))} are named as splits, and each would be a class; "
            f"write {TABLE} with the columns path,label,split"
        )
    for folder in sorted(path.iterdir()):
        if folder.name.startswith("."):
            continue
        if not folder.is_dir():
            skipped["images beside the folders of the classes" if is_image(folder) else "no image by its name"] += 1
            continue
        found = [dataclasses.replace(entry, name=str(entry.path.relative_to(path))) for entry in below(folder, rank, skipped)]
        entries += [dataclasses.replace(entry, label=folder.name) for entry in found]
    if not entries:
        raise config.InputError(f"{path}: no {TABLE} in it and no folder per class with images; write {TABLE} with the columns path,label")
    return Listing(tuple(entries), dict(skipped))


def _unlisted(path: pathlib.Path, rank: int, entries: Iterable[Entry]) -> dict[str, int]:
    """How many images lie in a folder of which its table says nothing."""
    known = {os.path.realpath(file) for entry in entries for file in (entry.path, entry.mask) if file is not None}
    skipped: collections.Counter[str] = collections.Counter()
    skipped[f"images that {TABLE} does not list"] = sum(
        os.path.realpath(entry.path) not in known and os.path.realpath(entry.path.parent) not in known
        for entry in below(path, rank, collections.Counter())
    )
    return dict(skipped)


def below(folder: pathlib.Path, rank: int, skipped: collections.Counter[str]) -> Iterator[Entry]:
    """Every image file below a folder, in the order of their names; in 3D a folder of DICOM slices as one."""
    seen = {os.path.realpath(folder)}  # a link may lead back up, or two to the same

    def is_new(path: str) -> bool:
        before = len(seen)
        seen.add(os.path.realpath(path))
        return len(seen) > before

    for here, folders, files in os.walk(folder, followlinks=True, onerror=_closed):
        folders[:] = [name for name in sorted(folders) if not name.startswith(".") and is_new(os.path.join(here, name))]
        paths = [pathlib.Path(here, name) for name in sorted(files)]
        images = [path for path in paths if is_image(path)]
        skipped["no image by its name"] += sum(not path.name.startswith(".") for path in paths) - len(images)
        slices = [path for path in images if dicom.is_dicom(path)] if rank == 3 else []
        if len(slices) > 1 and dicom.is_slice(slices[0]):
            yield Entry(pathlib.Path(here), here)
            images = [path for path in images if path not in set(slices)]
        yield from (Entry(path, str(path)) for path in images)


def _closed(error: OSError) -> None:
    """A folder that cannot be looked into ends the search: what it holds would be left out."""
    raise config.InputError(f"{error.filename}: cannot be looked into ({error.strerror}); mend that") from error


def _columns(table: pathlib.Path, names: Sequence[str]) -> list[str]:
    """A table's columns by their usual names; InputError where one stands twice, or is a group by another name."""
    columns = [name.strip().lower() for name in names]
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise config.InputError(f"{table}: the column {twice[0]} stands there twice; rename one")
    meant = [name for name in columns if name in LIKE_GROUP]
    if meant and "group" not in columns:
        raise config.InputError(f"{table}: the column {meant[0]} would not be used; call it group, so that no {meant[0]} is in two splits")
    return columns


def _unused(table: pathlib.Path) -> tuple[str, ...]:
    with open(table, newline="", encoding="utf-8-sig") as file:
        return tuple(name for name in _columns(table, next(csv.reader(file, skipinitialspace=True), [])) if name and name not in COLUMNS)


def of_table(table: pathlib.Path, *, labelled: bool) -> Iterator[Entry]:
    """The rows of a CSV; paths are relative to its folder. InputError that names the line, before the first entry where `labelled`."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            columns = _columns(table, rows.fieldnames or ())
            rows.fieldnames = columns
            needed = ("path", "label") if labelled else ("path",)
            if missing := [name for name in needed if name not in columns]:
                raise config.InputError(
                    f"{table}: no column {' or '.join(missing)}; its first line is {','.join(columns)[:200]!r}, "
                    f"it must name path,label and may name {','.join(COLUMNS[2:])}"
                )
            entries = (_of_row(row, table, rows.line_num, labelled=labelled) for row in rows)
            if not labelled:
                yield from entries
                return
            entries = list(entries)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise config.InputError(f"{table}: cannot be read as a CSV in UTF-8 ({config.one_line(error)[:200]})") from error
    _check(entries, table)
    yield from entries


def _of_row(row: dict, table: pathlib.Path, line: int, *, labelled: bool) -> Entry:
    values = {name: (row.get(name) or "").strip() or None for name in COLUMNS}
    if None in row or values["path"] is None or (labelled and values["label"] is None):
        fault = "more values than columns" if None in row else f"no {'path' if values['path'] is None else 'label'}"
        raise config.InputError(f"{table}, line {line}: {fault}; mend the line or take it out")
    mask = values["mask"] and table.parent / os.path.expanduser(values["mask"])
    path = table.parent / os.path.expanduser(values["path"])
    return Entry(path, values["path"], values["label"], values["split"], values["group"], mask or None)


def _check(entries: list[Entry], table: pathlib.Path) -> None:
    """InputError where a table is empty, names files that are not there, or one twice, or only sometimes a group or a split."""
    if not entries:
        raise config.InputError(f"{table}: no rows; a row for each image is needed")
    missing = [str(path) for entry in entries for path in (entry.path, entry.mask) if path and not os.path.exists(path)]
    if missing:
        raise config.InputError(
            f"{table}: {counted(missing, 'file', 'is not there', 'are not there')}; mend the paths or take the rows out"
        )
    counts = collections.Counter(os.path.realpath(entry.path) for entry in entries)
    twice = [path for path, count in counts.items() if count > 1]
    if twice:
        raise config.InputError(f"{table}: {counted(twice, 'file', 'is listed twice', 'are listed twice')}; one row each")
    for column in ("split", "group"):
        without = [entry.name for entry in entries if getattr(entry, column) is None]
        if without and len(without) < len(entries):
            raise config.InputError(
                f"{table}: {counted(without, 'row', f'has no {column}', f'have no {column}')}; give all rows one, or none"
            )


def counted(names: list[str], noun: str, one: str, many: str) -> str:
    """'3 files are missing (a, b, c)', with the first few names."""
    shown = ", ".join(config.one_line(name)[:300] for name in names[:SHOWN]) + (
        f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    )
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} {many if len(names) > 1 else one} ({shown})"
