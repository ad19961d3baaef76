"""The report's files, and its page in a real browser."""

import csv
import io
import json
import shutil
import xml.dom.minidom

import made_runs
import numpy as np
import pytest

from vitmed import cli, metrics, report
from vitmed import config as config_lib
from vitmed.runs import folder
from vitmed.study import calibration, figures, formats, operating, results

BROWSER = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")


def run(*arguments):
    return cli.run_cli(report.main, [*arguments, "--resamples=200"])


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Two data sets of several patch sizes, one with an odd run."""
    root = tmp_path_factory.mktemp("runs")
    for patch, skill in (("28", 0.3), ("7", 1.0), ("4", 2.0)):
        made_runs.write(root / f"breast{patch}", patch=patch, skill=skill)
    made_runs.write(root / "breast_odd", patch="7", skill=1.0, train__learning_rate=1e-5)
    labels = made_runs.labels_of("ordinal", num_classes=5)
    for patch in ("28", "7"):
        made_runs.write(root / f"retina{patch}", dataset="retinamnist", task="multi-class", patch=patch, labels=labels % 3)
    return root


@pytest.fixture(scope="module")
def out(roots, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert run(f"--workdir={roots}", f"--out={folder}", "--medmnist") == 0
    return folder


def test_every_file_is_there(out):
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and path.parent.name != "medmnist"}
    names = ["patch_size", "cost"] + [
        f"{one}_{kind}" for one in ("breastmnist", "retinamnist") for kind in ("learning", "confusion", "roc", "calibration")
    ]
    drawn = {f"figures/{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert there == {"index.html", "results.csv", "classes.csv", "results.md", "results.tex", "summary.md"} | drawn
    for name in names:
        assert (out / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert xml.dom.minidom.parse(str(out / f"figures/{name}.svg")).documentElement.tagName == "svg"


def test_csv_has_a_row_per_run_and_seed(out, roots):
    rows = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    of_runs = [row for row in rows if row["kind"] == "run" and row["series"] != "learning rate chosen on validation loss"]
    assert len(of_runs) == 6 * 3
    file = np.load(roots / "breast4" / "predictions" / "test.npz")
    for row in (row for row in of_runs if row["run"] == "breast4"):
        right = file["probabilities"][int(row["seed"])].argmax(axis=1) == file["labels"][:, 0]
        assert float(row["test_accuracy"]) == pytest.approx(right.mean())
        assert (row["patch"], row["num_tokens"], row["num_test_images"]) == ("4", "50", "60")


def test_markdown_puts_the_best_in_bold_and_says_n_and_seeds(out):
    text = (out / "results.md").read_text()
    table = text.partition("### breastmnist: scores")[2].partition("###")[0]
    assert "60 test images, 3 seeds" in table
    rows = [line for line in table.splitlines() if line.startswith("| patch") or line.startswith("| ensemble")]
    bold = [row for row in rows if row.split("|")[3].strip().startswith("**")]
    means = {row: float(row.split("|")[3].strip(" *").split(" ±")[0]) for row in rows}
    assert len(bold) == 1
    assert means[bold[0]] == max(means.values())
    assert "gain in balanced accuracy over the largest patch" in table


def test_classes_have_a_row_per_run_class_and_metric(out, roots):
    rows = list(csv.DictReader(io.StringIO((out / "classes.csv").read_text())))
    plain = [row for row in rows if row["series"] == ""]
    assert len(plain) == 3 * 2 * 4 + 2 * 3 * 4  # patches of breast, classes, metrics; of retina
    file = np.load(roots / "breast4" / "predictions" / "test.npz")
    for row in (row for row in plain if row["run"] == "breast4"):
        found = [metrics.per_class("binary", file["labels"], one) for one in file["probabilities"]]
        k = int(row["class"])
        assert float(row["mean"]) == pytest.approx(np.mean([one.values[row["metric"]][k] for one in found]))
        assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
        assert (row["num_images_of_class"], row["num_seeds_defined"], row["num_test_images"]) == (str(found[0].counts[k]), "3", "60")
    table = (out / "results.md").read_text().partition("### breastmnist: classes")[2].partition("###")[0]
    assert "| patch 4 | 1 | 30 |" in table


def test_the_calibration_error_before_and_after_temperature_scaling(out, roots):
    table = (out / "results.md").read_text().partition("### breastmnist: temperature scaling")[2].partition("###")[0]
    (line,) = (line for line in table.splitlines() if line.startswith("| patch 4 |"))
    temperatures, before, after = (cell.strip() for cell in line.split("|")[2:5])
    run_folder = folder.RunFolder(roots / "breast4")
    record, stored = operating.of_run(run_folder, task="binary", seeds=[0, 1, 2]), run_folder.read_predictions("test")
    assert temperatures == ", ".join(f"{fitted['temperature']:.2f}" for fitted in record["of_seeds"])
    for text, probabilities in ((before, stored.probabilities), (after, operating.apply(record, stored.probabilities).of_seeds)):
        error = np.mean([calibration.expected_calibration_error("binary", stored.labels, one) for one in probabilities])
        assert text.startswith(f"{error:.3f} [")


def test_a_run_without_its_validation_is_reported_without_its_calibration(roots, tmp_path, capsys):
    copy = tmp_path / "runs" / "breast4"
    shutil.copytree(roots / "breast4", copy)
    (copy / "predictions" / "val.npz").unlink()
    assert run(f"--workdir={copy}", f"--out={tmp_path / 'out'}") == 1
    assert f"{copy}: calibration left out: holds no predictions of split 'val'" in capsys.readouterr().err
    assert "temperature scaling" not in (tmp_path / "out" / "results.md").read_text()


def test_latex_is_escaped_and_balanced(out):
    text = (out / "results.tex").read_text()
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 10
    assert r"$\pm$" in text
    for line in text.splitlines():
        if line.endswith(r"\\"):
            assert "_" not in line.replace(r"\_", "")
            assert "%" not in line.replace(r"\%", "")


@pytest.mark.parametrize("text", ["a_b & 5% #1 {x} ~ ^ \\ $"])
def test_latex_text(text):
    assert formats.latex_text(text) == r"a\_b \& 5\% \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$"


def test_words_say_intervals_and_what_was_not_run(out):
    text = (out / "summary.md").read_text()
    assert "patch 2, the paper's small patch, was not run; 4 is the smallest that was" in text
    assert "Too few sets for Wilcoxon's signed-rank test (2; six are needed)" in text
    contrast = next(line for line in text.splitlines() if line.startswith("- The paper's contrast, patch 4 against patch 28"))
    assert "(3 seeds, 60 images)" in contrast
    assert contrast.count("[") == 2


def test_the_same_runs_give_the_same_bytes(out, roots, tmp_path):
    assert run(f"--workdir={roots}", f"--out={tmp_path}", "--medmnist") == 0
    for path in out.rglob("*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(out)).read_bytes() == path.read_bytes(), path.name


def test_medmnists_evaluator_reads_its_files_and_agrees(out, roots, evaluator, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluator, "INFO", {"breastmnist": {"task": "binary-class"}, "retinamnist": {"task": "ordinal-regression"}})
    paths = sorted((out / "medmnist").iterdir())
    assert len(paths) == 6 * 3
    for flag, name in (("breastmnist", "breast28"), ("retinamnist", "retina28")):
        labels = np.load(roots / name / "predictions" / "test.npz")["labels"]
        np.savez(tmp_path / f"{flag}.npz", test_labels=labels)
    monkeypatch.setattr(evaluator.Evaluator.__init__, "__defaults__", (None, str(tmp_path)))
    for path in paths:
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        found = evaluator.Evaluator.parse_and_evaluate(str(copy))
        said = path.name.partition("[AUC]")[2]
        assert f"{found.AUC:.3f}_[ACC]{found.ACC:.3f}@" in said
        assert (tmp_path / path.name).exists()  # which it writes again under the same name


def test_a_fault_is_named_and_the_rest_is_reported(roots, tmp_path, capsys):
    copy = tmp_path / "runs"
    shutil.copytree(roots, copy)
    (copy / "breast4" / "result.json").unlink()
    assert run(f"--workdir={copy}", f"--out={tmp_path / 'out'}") == 1
    said = capsys.readouterr()
    assert f"vitmed: {copy / 'breast4'}: left out: not finished" in said.err
    assert said.out.strip() == str(tmp_path / "out" / "index.html")
    assert "not finished" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workdir={empty}", "--out={out}"], "no finished run there"),
        (["--workdir={empty}/absent", "--out={out}"], "no such folder"),
        (["--workdir={roots}", "--out={file}"], "is a file where a folder should be"),
        (["--workdir={roots}", "--out={out}", "--ensemble=4,2"], "breastmnist has 28, 7, 4"),
        (["--workdir={roots}", "--out={out}", "--ensemble=7"], "two patch sizes or more"),
        (["--workdir={roots}", "--out={out}", "--config.seeds=1"], "takes no overrides"),
        (["--workdir={roots}"], "--out"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(arguments, says, roots, tmp_path, capsys):
    places = {"empty": tmp_path / "empty", "out": tmp_path / "out", "file": tmp_path / "file", "roots": roots}
    places["empty"].mkdir()
    places["file"].write_text("")
    assert run(*(argument.format(**places) for argument in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not places["out"].exists()


def test_an_ensemble_can_be_asked_for(roots, tmp_path):
    assert run(f"--workdir={roots}", f"--out={tmp_path}", "--ensemble=4,7") == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert {row["patch"] for row in rows if row["kind"] == "ensemble"} == {"4+7"}


def test_pareto_keeps_what_nothing_cheaper_reaches():
    points = [(1, 0.5), (2, 0.4), (3, 0.7), (3, 0.6), (4, 0.7), (5, 0.9)]
    assert figures.pareto(points) == [(1, 0.5), (3, 0.7), (5, 0.9)]


def test_roc_curve_equals_scikit_learns():
    from sklearn import metrics as peer

    rng = np.random.default_rng(0)
    positive, scores = rng.random(200) < 0.4, np.round(rng.random(200), 1)
    grid = np.linspace(0.001, 0.999, 57)
    rates, hits, _ = peer.roc_curve(positive, scores, drop_intermediate=False)
    np.testing.assert_allclose(figures.roc_at(grid, positive, scores), np.interp(grid, rates, hits), atol=1e-12)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (BROWSER and DRIVER):
        pytest.skip("no chromium and chromedriver on this machine; install Debian's chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_the_page_opens_without_errors_and_sorts(out, browser):
    browser.get((out / "index.html").as_uri())
    assert browser.title == "vitmed: patch size study"
    images = "return [...document.images].map(image => image.complete && image.naturalWidth > 0)"
    loaded = browser.execute_script(images)
    assert len(loaded) == 10
    assert all(loaded)
    column = (
        "return [...document.querySelectorAll('#breastmnist table')[0].tBodies[0].rows].map(row => parseFloat(row.cells[2].textContent))"
    )
    head = browser.find_elements("css selector", "#breastmnist table th button")[2]
    assert head.text == results.NAMES["balanced_accuracy"]
    before = browser.execute_script(column)
    head.click()
    assert browser.execute_script(column) == sorted(before)
    head.click()
    assert browser.execute_script(column) == sorted(before, reverse=True)
    assert before != sorted(before)
    assert browser.get_log("browser") == []


def test_the_page_needs_no_network_and_no_other_file(out):
    text = (out / "index.html").read_text()
    addresses = [part.split('"')[0] for mark in ('src="', 'href="') for part in text.split(mark)[1:]]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)


def test_what_is_not_ours_is_escaped(tmp_path, capsys):
    """Names of folders, and whatever text the files of a run can hold."""
    tag = "<img src=x onerror=alert(1)>"
    path = tmp_path / "runs" / "<script>alert(1)<"
    made_runs.write(path, patch="7")
    run_folder = folder.RunFolder(path)
    config = run_folder.read_config()
    config["model"] |= {"pretrained": tag, "variant": tag}
    run_folder.config.write_text(json.dumps(config))
    words = {"dataset": f"breast{tag}", "device": tag, "variant": tag, "pretrained": tag, "versions": {tag: tag}}
    run_folder.write_result(run_folder.read_result() | words | {"config_digest": folder.digest(config_lib.as_tuples(config))})
    folder.RunFolder(tmp_path / "runs" / "failed").write_failure({"ended": "\x1b[2J", "said": tag})
    assert run(f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}") == 1
    page = (tmp_path / "out" / "index.html").read_text()
    assert "&lt;img src=x onerror" in page
    assert "<img src=x" not in page
    assert "<script>alert" not in page
    for file in (tmp_path / "out" / "figures").glob("*.svg"):
        assert "<img" not in file.read_text()
    assert "\x1b" not in capsys.readouterr().err


def test_empty_folders_are_refused(capsys, roots, tmp_path):
    assert run("--workdir=", f"--out={tmp_path / 'out'}") == 2
    assert run(f"--workdir={roots}", "--out=") == 2
    assert capsys.readouterr().err.splitlines() == ["vitmed: --workdir=: must be a folder", "vitmed: --out=: must be a folder"]


def test_a_file_in_the_place_of_a_subfolder_is_found_before_anything_is_written(roots, tmp_path):
    (tmp_path / "figures").write_text("")
    assert run(f"--workdir={roots}", f"--out={tmp_path}") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]


def test_figures_of_an_earlier_report_go_and_files_of_others_stay(roots, tmp_path):
    out = tmp_path / "out"
    assert run(f"--workdir={roots}", f"--out={out}", "--medmnist") == 0
    (out / "figures" / "mine.png").write_text("")
    assert run(f"--workdir={roots / 'breast7'}", f"--out={out}") == 0
    there = {path.name for path in (out / "figures").glob("*.png")}
    kinds = ("learning", "confusion", "roc", "calibration")
    assert there == {"mine.png", "patch_size.png", "cost.png", *(f"breastmnist_{kind}.png" for kind in kinds)}
    assert list((out / "medmnist").iterdir()) == []


def test_runs_in_folders_of_one_name_keep_files_of_their_own(tmp_path):
    for rate in (1e-4, 1e-5):
        made_runs.write(tmp_path / f"{rate}" / "run", patch="7", train__learning_rate=rate)
    assert run(f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}", "--medmnist") == 0
    assert len({path.name.partition("@")[2] for path in (tmp_path / "out" / "medmnist").iterdir()}) == 2 * 3


def test_the_working_folder_is_called_by_its_name(tmp_path, monkeypatch):
    made_runs.write(tmp_path / "breast7", patch="7")
    monkeypatch.chdir(tmp_path / "breast7")
    assert run("--workdir=.", f"--out={tmp_path / 'out'}") == 0
    rows = csv.DictReader(io.StringIO((tmp_path / "out" / "results.csv").read_text()))
    assert {row["run"] for row in rows} == {"breast7"}


def test_an_ensemble_that_no_series_has_is_refused(capsys, roots, tmp_path):
    made_runs.write(tmp_path / "a", patch="7")
    made_runs.write(tmp_path / "b", patch="28")
    made_runs.write(tmp_path / "c", patch="4", train__learning_rate=1e-5)
    assert run(f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}", "--ensemble=7,4") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "breastmnist has 28, 7; breastmnist, learning rate 1e-05 has 4" in line


def test_signs_that_have_a_meaning_elsewhere_are_shown_as_they_are(tmp_path):
    """$ begins a formula for matplotlib, * and < mean something in Markdown."""
    made_runs.write(tmp_path / "a", patch="7")
    made_runs.write(tmp_path / "b", patch="7", model__pretrained="runs/$^_*<b>$")
    made_runs.write(tmp_path / "c", patch="28")
    out = tmp_path / "out"
    assert run(f"--workdir={tmp_path}", f"--out={out}") == 0
    assert ">pretrained $^_*&lt;b&gt;$</text>" in (out / "figures" / "patch_size.svg").read_text()
    assert r"pretrained $^\_\*\<b\>$" in (out / "results.md").read_text()


def test_an_area_that_hardly_any_resample_has_gets_no_interval(tmp_path):
    """A label that one image has is drawn in 63 % of resamples; with five such, all in 10 %."""
    labels = np.zeros((40, 5), np.int64)
    labels[np.arange(5), np.arange(5)] = 1
    for patch in ("28", "7"):
        made_runs.write(tmp_path / patch, dataset="chestmnist", task="multi-label", patch=patch, labels=labels)
    assert run(f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}") == 0
    scores = (tmp_path / "out" / "results.md").read_text().partition("paired differences")
    assert "| AUC |" not in scores[2]
    assert "| balanced accuracy |" in scores[2]
