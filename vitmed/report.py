"""Put finished runs into tables, figures and a page: `python -m vitmed.report --workdir=ROOT --out=DIR`."""

import pathlib
import sys
from collections.abc import Sequence

from vitmed import __version__, cli
from vitmed import config as config_lib
from vitmed.runs import files
from vitmed.study import analysis, collection, figures, formats, medmnist_files, page, results, series, summary

EXAMPLES = """examples:
  python -m vitmed.report --workdir=runs/study2d --out=report
  python -m vitmed.report --workdir=runs/study2d --workdir=runs/study3d --out=report --ensemble=4,7 --ensemble=4,7,14
  python -m vitmed.report --workdir=runs/breast_p7 --out=report --medmnist

DIR gets index.html (a page that needs no network), results.csv (a row per run and seed), classes.csv (a row per run, class and metric),
results.md, results.tex (needs booktabs and graphicx), summary.md and figures/ as SVG and PNG; with --medmnist also medmnist/, for
`python -m medmnist evaluate`.

exit status: 0 done; 1 done, but runs or seeds were left out, each named; 2 wrong input"""

# Files that only a report writes and that the next one, of other data sets or runs, might leave behind.
OWN = ("figures/*_learning.*", "figures/*_confusion.*", "figures/*_roc.*", "figures/*_calibration.*", "medmnist/*_test_[[]AUC[]]*@*.csv")


def make_parser() -> cli.Parser:
    """The flags."""
    parser = cli.Parser(prog="vitmed.report", description="Tables, figures and a page of finished runs.", epilog=EXAMPLES)
    parser.add_argument(
        "--workdir", required=True, action="append", metavar="ROOT", help="a folder that holds runs, at any depth; repeatable"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write; files of an earlier report are replaced")
    parser.add_argument(
        "--ensemble",
        action="append",
        default=[],
        metavar="PATCH,PATCH",
        help="patch sizes whose probabilities are averaged; repeatable (default: those of 1, 2, 4 that there are, and all)",
    )
    parser.add_argument("--resamples", default="2000", metavar="N", help="bootstrap resamples (default: 2000)")
    parser.add_argument("--medmnist", action="store_true", help="also write MedMNIST's own result files")
    return parser


def main(argv: Sequence[str]) -> int:
    """Write the report and print where it is; the exit status."""
    flags, overrides = cli.parse_flags(make_parser(), argv)
    if overrides:
        raise config_lib.InputError(f"--config.{next(iter(overrides))}: a report is made of finished runs; it takes no overrides")
    resamples = config_lib.parse("--resamples", flags.resamples, 2000)
    config_lib.require(100 <= resamples <= 100_000, "--resamples", resamples, "from 100 to 100000")
    for name, given in (("--out", flags.out), *(("--workdir", root) for root in flags.workdir)):
        config_lib.require(bool(given), name, given, "a folder")
    out = pathlib.Path(flags.out).expanduser()
    for path in (out, out / "figures", out / "medmnist")[: 3 if flags.medmnist else 2]:
        files.check_folder(path, f"--out={flags.out}")
    runs, faults = series.collect([pathlib.Path(root).expanduser() for root in flags.workdir])
    study = analysis.analyse(runs, faults=faults, ensembles=wanted(flags.ensemble, runs), resamples=resamples)
    write(study, out, runs=runs if flags.medmnist else ())
    for fault in faults:
        print(f"vitmed: {config_lib.one_line(fault)}", file=sys.stderr)
    print(out / "index.html")
    return 1 if faults else 0


def wanted(ensembles: Sequence[str], runs: Sequence[collection.Run]) -> list[tuple[str, ...]]:
    """The patch sizes of each --ensemble; InputError where no series of a data set has them all."""
    there: dict[str, list[str]] = {}
    for run in runs:
        there.setdefault(", ".join(filter(None, (run.dataset, run.series))), []).append(run.patch)
    asked = []
    for text in ensembles:
        patches = tuple(dict.fromkeys(text.replace("+", ",").split(",")))
        if len(patches) < 2 or not any(set(patches) <= set(known) for known in there.values()):
            listed = "; ".join(f"{name} has {', '.join(known)}" for name, known in there.items())
            raise config_lib.InputError(f"--ensemble={text}: needs two patch sizes or more that one series has all of; {listed}")
        asked.append(patches)
    return asked


def write(study: analysis.Study, out: pathlib.Path, *, runs: Sequence[collection.Run] = ()) -> None:
    """Write all files of a report, of `runs` MedMNIST's files too, and remove those of an earlier report that have no successor."""
    drawn = {name: figures.encode(one) for name, one in figures.draw(study).items()}
    tables = [table for one in study.data_sets for table in results.tables(one)]
    method = results.METHOD.format(resamples=study.resamples)
    texts = {
        "results.csv": formats.as_csv(study),
        "classes.csv": formats.classes_as_csv(study),
        "results.md": "\n".join(["# Results", "", method, "", *map(formats.as_markdown, tables)]),
        "results.tex": "\n".join([f"% {method}", *map(formats.as_latex, tables)]),
        "summary.md": summary.as_markdown(study),
        "index.html": page.render(study, figures=drawn, version=__version__),
    }
    texts |= {f"medmnist/{name}": text for name, text in medmnist_files.of_runs(runs).items()}
    data = {name: text.encode() for name, text in texts.items()}
    data |= {f"figures/{name}.{kind}": encoded for name, one in drawn.items() for kind, encoded in one.items()}
    for name, content in data.items():
        path = out / name
        files.make_folder(path.parent)
        files.write_whole(path, content)
    for stale in (path for pattern in OWN for path in out.glob(pattern) if path.relative_to(out).as_posix() not in data):
        stale.unlink()


if __name__ == "__main__":
    sys.exit(cli.run_cli(main, sys.argv[1:]))
