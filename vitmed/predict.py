"""Predict images and volumes: `python -m vitmed.predict --workdir=DIR --input=FILE|FOLDER|CSV --out=predictions.csv`.

Files are read as the run read its own, some ahead of the device and never all of them; rows are written as they come.
"""

import contextlib
import csv
import io
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import rich.console
import rich.progress

from vitmed import cli, inference
from vitmed import config as config_lib
from vitmed.data import folder as own_data
from vitmed.data import listing, stored, streaming
from vitmed.models import explain
from vitmed.runs import files, guard, machine
from vitmed.study import heatmaps, operating
from vitmed.training import augment

EXAMPLES = """examples:
  python -m vitmed.predict --workdir=runs/breast_p7 --input=scans --out=predictions.csv
  python -m vitmed.predict --workdir=runs/breast_p7 --workdir=runs/breast_p4 --input=list.csv --out=predictions.csv --tta=flips
  python -m vitmed.predict --workdir=runs/chest_p7 --input=chest.nii.gz --out=chest.csv --explain=gradient
  python -m vitmed.predict --workdir=runs/fracture --workdir=runs/adrenal --each --input=ct --out=found.csv

--input is an image or volume (PNG, JPEG, TIFF, NIfTI, DICOM), a folder of which every image or volume below it is taken, or a CSV with a
column `path`. A file that cannot be read is named and gets a row that says why.

exit status: 0 done; 1 done, but some files could not be read or some seeds had failed, or trouble of the machine; 2 wrong input"""

LONGEST_NAME = 60  # characters of a file's name that its picture is called by
POSITIVE = {"positive_at_95_specificity": "specificity_95", "positive_at_youden": "youden"}  # columns of binary tasks, by operating point


def make_parser() -> cli.Parser:
    """The flags."""
    parser = cli.Parser(prog="vitmed.predict", description="Predict images and volumes with finished runs.", epilog=EXAMPLES)
    parser.add_argument("--workdir", required=True, action="append", metavar="DIR", help="a run's folder; given several times: an ensemble")
    parser.add_argument("--input", required=True, metavar="PATH", help="a file, a folder or a CSV")
    parser.add_argument("--out", required=True, metavar="FILE", help="the CSV to write")
    parser.add_argument(
        "--each", action="store_true", help="no ensemble: a table of each run's own task, FILE_RUN.csv; plugins of one base share it"
    )
    parser.add_argument("--batch_size", default="auto", metavar="B", help="images at a time; auto: what suits the device (default)")
    parser.add_argument("--tta", default="none", metavar="KIND", help=f"test-time augmentation: {', '.join(augment.VIEWS)} (default: none)")
    parser.add_argument("--base", metavar="FILE", help="the weights that a plugin stands on, where they do not lie where it was trained")
    parser.add_argument("--explain", metavar="METHOD", help=f"draw where the network looks: {', '.join(explain.METHODS)}")
    return parser


def main(argv: Sequence[str]) -> int:
    """Predict; the exit status."""
    flags, overrides = cli.parse_flags(make_parser(), argv)
    if overrides:
        raise config_lib.InputError(f"--config.{next(iter(overrides))}: a run's config is its own; vitmed.predict takes no overrides")
    config_lib.one_of("--tta", flags.tta, augment.VIEWS)
    method = "" if flags.explain is None else config_lib.one_of("--explain", flags.explain, explain.METHODS)
    batch_size = 0 if flags.batch_size == "auto" else config_lib.parse("--batch_size", flags.batch_size, 1)
    config_lib.require(flags.batch_size == "auto" or batch_size >= 1, "--batch_size", flags.batch_size, "auto, or positive")
    config_lib.require(bool(flags.input), "--input", flags.input, "a file, a folder or a CSV")
    source, paths = listing.existing(pathlib.Path(flags.input)), [pathlib.Path(path).expanduser() for path in flags.workdir]
    outs = tables_of(flags.out, paths) if flags.each else [cli.file_to_write("--out", flags.out)]
    pictures = [out.with_name(f"{out.name.removesuffix('.csv')}_heatmaps") if method else None for out in outs]
    for place in filter(None, pictures):
        files.check_new_folder(place, f"--explain: {place}")
    machine.cache_programs()
    status = 0
    with machine.memory_errors(), guard.Signals() as signals:
        runs = [inference.open_run(path, flags.base) for path in paths]
        groups = [[run] for run in runs] if flags.each else [runs]
        totals = [prepared(group, source, method=method) for group in groups]
        for group, out, place, total in zip(groups, outs, pictures, totals, strict=True):
            ensemble = inference.Ensemble(group, batch_size=batch_size, tta=flags.tta, method=method)
            if place is not None:
                files.make_folder(place)
            with files.writing_whole(out) as write:
                unreadable = predict(ensemble, source, write, pictures=place, total=total, check=signals.check)
            status = max(status, say(ensemble, out, total=total, unreadable=unreadable))
    return status


def tables_of(out: str, paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """A file for each run beside `out`, called by the run's folder; InputError where two of these have one name, or a file cannot be."""
    whole, names = pathlib.Path(out), [path.resolve().name for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise config_lib.InputError(f"--each: several --workdir are called {name}, and so would be their tables; rename a folder")
    return [cli.file_to_write("--out", str(whole.with_name(f"{whole.name.removesuffix('.csv')}_{name}.csv"))) for name in names]


def prepared(group: Sequence[inference.Restored], source: pathlib.Path, *, method: str) -> int:
    """How many files there are for runs that go together; InputError, before anything is predicted, where runs or list have a fault."""
    inference.check_alike(group)
    rank = group[0].planned.description.rank
    if method and rank == 3:
        heatmaps.require_nibabel()
    return sum(1 for _ in listing.find(source, rank))


def predict(
    ensemble: inference.Ensemble,
    source: pathlib.Path,
    write: Callable[[bytes], None],
    *,
    pictures: pathlib.Path | None,
    total: int,
    check: Callable[[], None],
) -> int:
    """Write a row for every file of `source`, and its heat below `pictures`; how many could not be read."""
    table = Table(ensemble, explained=pictures is not None)
    write(table.header())
    done = unreadable = 0
    prepared = streaming.stream(listing.find(source, ensemble.hows[0].rank), ensemble.hows, ensemble.shapes, ahead=2 * ensemble.batch_size)
    with stored.quiet(), progress(total) as advance:
        for batch in streaming.batches(prepared, ensemble.batch_size):
            check()
            readable = [file for file in batch if not file.fault]
            found = ensemble.probabilities(readable) if readable else np.empty((0, 0, 0))
            places = dict(zip(map(id, readable), range(len(readable)), strict=True))
            names = [""] * len(batch)
            if pictures is not None and readable:
                heat = ensemble.heat(readable, found.mean(axis=0).argmax(axis=1))
                for index, file in enumerate(batch):
                    if not file.fault:
                        names[index] = draw(ensemble, file, heat[places[id(file)]], pictures, number=done + index)
            rows = [
                table.row(file, None if file.fault else found[:, places[id(file)]], name) for file, name in zip(batch, names, strict=True)
            ]
            write(b"".join(rows))
            for file in batch:
                if file.fault:
                    print(f"vitmed: {file.fault}", file=sys.stderr)
            unreadable += len(batch) - len(readable)
            done += len(batch)
            advance(len(batch))
    return unreadable


class Table:
    """The rows of predictions.csv."""

    def __init__(self, ensemble: inference.Ensemble, *, explained: bool):
        description = ensemble.runs[0].planned.description
        self._task, self._names, self._explained = description.task, description.class_names, explained
        self._run = ensemble.calibrated_by
        self._rules = POSITIVE if self._run is not None and self._task == "binary" else {}

    def header(self) -> bytes:
        """The columns' names."""
        probabilities, spreads = ([f"{what}_{name}" for name in self._names] for what in ("probability", "sd"))
        calibrated = [f"calibrated_{name}" for name in self._names] if self._run is not None else []
        heatmap = ["heatmap"] if self._explained else []
        return _line(["path", "label", *probabilities, *spreads, *calibrated, *self._rules, *heatmap, "error"])

    def row(self, file: streaming.Prepared, probabilities: np.ndarray | None, heatmap: str) -> bytes:
        """One file: what its members say, [members, K], or nothing but its fault."""
        numbers = [""] * 2 * len(self._names)
        label, decided = "", [""] * (len(self._names) * (self._run is not None) + len(self._rules))
        if probabilities is not None:
            mean = probabilities.mean(axis=0, dtype=np.float64)
            alone = len(probabilities) == 1  # one member alone does not tell how members differ
            spread = [""] * len(mean) if alone else [f"{value:.6g}" for value in probabilities.std(axis=0, ddof=1, dtype=np.float64)]
            numbers, label = [*(f"{value:.6g}" for value in mean), *spread], self._label(mean)
            if self._run is not None:
                decided = self._decided(probabilities)
        return _line([file.entry.name, label, *numbers, *decided, *([heatmap] if self._explained else []), file.fault])

    def _decided(self, probabilities: np.ndarray) -> list[str]:
        """Calibrated probabilities, and of binary tasks 0 or 1 by each rule, empty where validation gave no threshold."""
        calibrated = self._run.calibrated(probabilities[:, None])
        found = [operating.decide(self._run.calibration, calibrated, rule=rule).item() for rule in self._rules.values()]
        return [*(f"{value:.6g}" for value in calibrated[0]), *("" if one == operating.UNDECIDED else str(one) for one in found)]

    def _label(self, mean: np.ndarray) -> str:
        if self._task == "multi-label":
            return own_data.JOINT.join(name for name, value in zip(self._names, mean, strict=True) if value > 0.5) or own_data.NONE
        return self._names[int(mean.argmax())]


def _line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode("utf-8", "surrogateescape")


def draw(ensemble: inference.Ensemble, file: streaming.Prepared, heat: Sequence[np.ndarray], pictures: pathlib.Path, *, number: int) -> str:
    """Draw a file's heat, and of a volume write it as NIfTI too; the picture's name, which begins with the number of the file's row."""
    stem = f"{number + 1:06d}_{file.entry.path.name.split('.')[0][:LONGEST_NAME] or 'image'}"
    image = file.images[0]
    places = heatmaps.in_file(heatmaps.centres(image.shape[:-1]), file.resampled[0], image.shape[:-1])
    on_image = ensemble.spread(heat, file, places)
    if image.ndim == 3:
        files.write_whole(pictures / f"{stem}.png", heatmaps.picture(image, on_image))
        return f"{stem}.png"
    files.write_whole(pictures / f"{stem}.png", heatmaps.montage(image, on_image, radiological=file.affine is not None))
    on_file = ensemble.spread(heat, file, heatmaps.centres(file.size))
    files.write_whole(pictures / f"{stem}.nii.gz", heatmaps.nifti(on_file, file.affine))
    return f"{stem}.png"


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; what is given moves it by so many files."""
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("files", total=total)
        yield lambda count: bar.advance(task, count)


def say(ensemble: inference.Ensemble, out: pathlib.Path, *, total: int, unreadable: int) -> int:
    """What was done; the exit status."""
    members = sum(len(run.seeds) for run in ensemble.runs)
    print(f"{out}: {total - unreadable:,} of {total:,} files predicted, the mean of {members} members")
    if unreadable:
        print(f"vitmed: {unreadable:,} of {total:,} files could not be read; the column error says why", file=sys.stderr)
    for run in ensemble.runs:
        if run.failed_seeds:
            print(f"vitmed: {run.path}: failed seeds {', '.join(map(str, run.failed_seeds))} are left out", file=sys.stderr)
    return 1 if unreadable or any(run.failed_seeds for run in ensemble.runs) else 0


if __name__ == "__main__":
    sys.exit(cli.run_cli(main, sys.argv[1:]))
