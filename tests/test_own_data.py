"""Own data, folder:PATH: what is found, how it is split, what is kept, and what is said where something is wrong."""

import collections
import csv
import json
import os
import pathlib

import numpy as np
import own_files
import pytest

from vitmed import config, experiment, main
from vitmed.data import folder, listing, prepared, splits
from vitmed.runs import folder as run_folders

IN_2D, IN_3D = folder.Settings(rank=2), folder.Settings(rank=3)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def table(path, rows, columns=("path", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def pictures(root, labels, *, size=(12, 10), folders=False, seed=0):
    """A picture for each label, in a folder per class or beside a labels.csv."""
    rng = np.random.default_rng(seed)
    rows = []
    for index, label in enumerate(labels):
        name = f"{label}/{index:03d}.png" if folders else f"images/{index:03d}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        own_files.write_picture(root / name, rng.integers(0, 256, size, np.uint8))
        rows.append((name, label))
    if not folders:
        table(root / "labels.csv", rows)
    return rows


def load(path, settings=IN_2D, size=(8,), **how):
    return folder.load(f"folder:{path}", size, settings, **how)


def test_a_table_and_folders_of_classes_make_the_same_set(tmp_path):
    labels = ["cat", "dog"] * 10
    pictures(tmp_path / "table", labels)
    pictures(tmp_path / "folders", labels, folders=True)
    (tmp_path / "folders" / "notes.txt").write_text("not an image")
    sets = [load(tmp_path / name) for name in ("table", "folders", "table/labels.csv")]
    assert {made.description.class_names for made in sets} == {("cat", "dog")}
    assert {made.description.task for made in sets} == {"binary"}
    for made in sets:
        assert (
            {split: len(of.labels) for split, of in made.splits.items()}
            == made.description.num_examples
            == {"train": 14, "val": 2, "test": 4}
        )
        assert all(of.images.shape[1:] == (8, 8, 1) and of.labels.dtype == np.int32 for of in made.splits.values())
        assert all(of.labels.sum() * 2 == len(of.labels) for of in made.splits.values())  # stratified
    images = [np.sort(np.concatenate([of.images for of in made.splits.values()]).reshape(20, -1), axis=0) for made in sets]
    np.testing.assert_array_equal(images[0], images[1])
    assert "1 files, no image by its name" in sets[1].words
    assert "train     14: cat 7, dog 7" in sets[0].words
    assert "12x10 (20)" in sets[0].words


def test_each_image_keeps_its_own_label_and_name(tmp_path):
    rows = []
    for index in range(20):
        own_files.write_picture(tmp_path / f"{index}.png", np.full((4, 4), 10 * index, np.uint8))
        rows.append((f"{index}.png", f"class{index % 4}"))
    table(tmp_path / "labels.csv", rows)
    made = load(tmp_path, size=(4,))
    for split in made.splits.values():
        for image, label, example in zip(split.images, split.labels, split.examples, strict=True):
            index = int(image[0, 0, 0]) // 10
            assert example["path"] == f"{index}.png"
            assert made.description.class_names[label[0]] == example["label"] == f"class{index % 4}"


def test_copies_of_an_image_are_told(tmp_path):
    rows = pictures(tmp_path, ["a", "b"] * 10)
    (tmp_path / "images" / "002.png").write_bytes((tmp_path / "images" / "000.png").read_bytes())
    table(
        tmp_path / "labels.csv",
        [(*row, "test" if index in (0, 1) else "train") for index, row in enumerate(rows)],
        ("path", "label", "split"),
    )
    for _ in range(2):  # read, and from the cache
        said = "1 files are copies of others (images/000.png and images/002.png); 1 of them are in another split"
        assert said in load(tmp_path).words


def test_describe_says_what_load_brings(tmp_path):
    pictures(tmp_path, ["a", "b", "c"] * 10)
    own_files.write_picture(tmp_path / "images" / "000.png", np.zeros((5, 5, 3), np.uint8))  # one in colours
    described = folder.describe(f"folder:{tmp_path}", (8, 6), IN_2D)
    made = load(tmp_path, size=(8, 6))
    assert described == made.description
    assert made.splits["train"].images.shape == (21, 8, 6, 3)
    assert described.task == "multi-class"


def test_numbers_are_sorted_as_numbers_and_classes_can_be_ordered(tmp_path):
    pictures(tmp_path, ["10", "9"] * 10)
    assert folder.inventory(f"folder:{tmp_path}", IN_2D).class_names == ("9", "10")
    ordered = folder.Settings(rank=2, classes=("10", "9"), task="ordinal")
    made = folder.inventory(f"folder:{tmp_path}", ordered)
    assert (made.class_names, made.task, made.labels[0, 0]) == (("10", "9"), "ordinal", 0)


def test_several_labels_of_one_image(tmp_path):
    pictures(tmp_path, ["a|b", "b", "none", "a"] * 10)
    made = folder.inventory(f"folder:{tmp_path}", IN_2D)
    assert (made.task, made.class_names) == ("multi-label", ("a", "b"))
    assert made.labels[:4].tolist() == [[1, 1], [0, 1], [0, 0], [1, 0]]


# --- splits ---------------------------------------------------------------------------------------------------------------------


def test_no_patient_is_in_two_splits_and_classes_keep_their_shares():
    rng = np.random.default_rng(0)
    groups = [f"patient{index}" for index in rng.integers(0, 60, 400)]
    classes = [f"class{hash_ % 3}" for hash_ in rng.integers(0, 10, 400)]
    for seed in range(3):
        parts = splits.drawn(classes, groups, shares=(0.6, 0.2, 0.2), seed=seed)
        of_group = collections.defaultdict(set)
        for part, group in zip(parts, groups, strict=True):
            of_group[group].add(part)
        assert all(len(found) == 1 for found in of_group.values())
        for name in set(classes):
            counts = collections.Counter(part for part, each in zip(parts, classes, strict=True) if each == name)
            assert counts["train"] / counts.total() == pytest.approx(0.6, abs=0.08)
            assert counts["test"] / counts.total() == pytest.approx(0.2, abs=0.06)


def test_a_split_does_not_depend_on_the_order_of_the_rows_but_on_the_seed():
    classes, groups = [f"c{index % 2}" for index in range(50)], [f"g{index}" for index in range(50)]
    how = {"shares": (0.7, 0.1, 0.2)}
    first = dict(zip(groups, splits.drawn(classes, groups, seed=0, **how), strict=True))
    assert dict(zip(groups[::-1], splits.drawn(classes[::-1], groups[::-1], seed=0, **how), strict=True)) == first
    assert dict(zip(groups, splits.drawn(classes, groups, seed=1, **how), strict=True)) != first


def test_in_folds_every_group_is_tested_once():
    groups = [f"g{index // 3}" for index in range(60)]
    classes = [f"c{index // 3 % 2}" for index in range(60)]
    tested = collections.Counter()
    for fold in range(5):
        parts = splits.drawn(classes, groups, shares=(1.0,), seed=0, folds=5, fold=fold)
        assert collections.Counter(parts) == {"train": 36, "val": 12, "test": 12}
        tested.update(group for part, group in zip(parts, groups, strict=True) if part == "test")
    assert tested == collections.Counter(groups)


def test_folds_are_not_drawn_over_splits_that_a_table_names(tmp_path):
    rows = pictures(tmp_path, ["a", "b"] * 10)
    table(tmp_path / "labels.csv", [(*row, "test" if index < 6 else "train") for index, row in enumerate(rows)], ("path", "label", "split"))
    with pytest.raises(config.InputError, match="names splits of its own"):
        folder.inventory(f"folder:{tmp_path}", folder.Settings(rank=2, folds=4))


def test_what_a_table_does_not_say_is_told(tmp_path):
    rows = pictures(tmp_path, ["a", "b"] * 10)
    own_files.write_picture(tmp_path / "images" / "extra.png", np.zeros((4, 4), np.uint8))
    own_files.write_picture(tmp_path / "flat.png", np.full((4, 4), 9, np.uint8))
    table(tmp_path / "labels.csv", [*((*row, 50) for row in rows), ("flat.png", "a", 50)], ("path", "label", "age"))
    said = load(tmp_path).words
    assert "columns not used: age" in said
    assert "1 files, images that labels.csv does not list" in said
    assert "every file counts as a patient of its own" in said
    assert "of 1 images one value is left everywhere" in said


def test_a_table_may_name_the_splits_and_validation_is_drawn_from_training(tmp_path):
    rows = pictures(tmp_path, ["a", "b"] * 20)
    named = [(*row, "test" if index < 10 else "train", f"p{index // 2}") for index, row in enumerate(rows)]
    table(tmp_path / "labels.csv", named, ("path", "label", "split", "group"))
    made = folder.inventory(f"folder:{tmp_path}", IN_2D)
    assert made.of_split("test") == list(range(10))
    assert len(made.of_split("val")) == 4  # an eighth of 30, in whole groups
    assert folder.inventory(f"folder:{tmp_path}", IN_2D, whole=True).of_split("train") == list(range(10, 40))


# --- DICOM and masks ------------------------------------------------------------------------------------------------------------


def test_dicom_series_are_examples_and_masks_come_along(tmp_path):
    rows = []
    for index in range(12):
        values = own_files.landmarks((4, 6, 6)) + 1000 * (index % 2)
        own_files.write_series(tmp_path / f"case{index}", values)
        own_files.write_nifti(
            tmp_path / f"mask{index}.nii.gz", (values % 100 < 30).astype(np.uint8), orientation="LPS", spacing=(2, 1, 0.5)
        )
        rows.append((f"case{index}", "ab"[index % 2], f"mask{index}.nii.gz" if index % 3 else ""))
    table(tmp_path / "labels.csv", rows, ("path", "label", "mask"))
    made = load(tmp_path, folder.Settings(rank=3, window="0:2000", shares=(0.5, 0.25, 0.25)), size=(4, 6, 6))
    train = made.splits["train"]
    for image, mask, example in zip(train.images, train.masks, train.examples, strict=True):
        index = int(example["path"].removeprefix("case"))
        values = own_files.landmarks((4, 6, 6)) + 1000 * (index % 2)
        np.testing.assert_array_equal(image[..., 0], np.rint(values / 2000 * 255))
        np.testing.assert_array_equal(mask, (values % 100 < 30) & bool(index % 3))


def test_a_folder_lists_every_image_below_it_once(tmp_path):
    own_files.write_series(tmp_path / "a" / "ct", own_files.landmarks())
    own_files.write_nifti(tmp_path / "b.nii.gz", own_files.landmarks())
    own_files.write_dicom(tmp_path / "single.dcm", own_files.landmarks().astype(np.uint16))
    (tmp_path / "labels.csv").write_text("path,label\nnothing.nii,a\n")
    (tmp_path / ".hidden.nii").write_text("")
    found = [entry.path.relative_to(tmp_path).as_posix() for entry in listing.find(tmp_path, 3)]
    assert found == ["b.nii.gz", "single.dcm", "a/ct"]
    assert len(list(listing.find(tmp_path, 2))) == 2 + 5  # in 2D every slice is an image
    (tmp_path / "a" / "up").symlink_to(tmp_path)  # a way round in a circle
    assert len(list(listing.find(tmp_path, 3))) == 3
    with pytest.raises(config.InputError, match="no image or volume"):
        list(listing.find(_empty(tmp_path), 3))


def _empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


# --- the cache ------------------------------------------------------------------------------------------------------------------


def test_files_are_prepared_once_and_again_when_they_change(tmp_path, monkeypatch):
    pictures(tmp_path / "set", ["a", "b"] * 10)
    first = load(tmp_path / "set")
    calls = []
    prepare = prepared._prepare
    monkeypatch.setattr(prepared, "_prepare", lambda *arguments: calls.append(1) or prepare(*arguments))
    again = load(tmp_path / "set")
    assert not calls
    assert again.md5 == first.md5
    assert again.words == first.words
    np.testing.assert_array_equal(again.splits["test"].images, first.splits["test"].images)

    changed = tmp_path / "set" / "images" / "003.png"
    os.utime(changed)  # another time, the same bytes
    assert load(tmp_path / "set").md5 == first.md5
    assert not calls
    own_files.write_picture(changed, np.zeros((12, 10), np.uint8))
    assert load(tmp_path / "set").md5 != first.md5
    assert calls == [1]


@pytest.mark.parametrize("damage", ["npz", "json", "form"])
def test_a_damaged_cache_is_prepared_anew(tmp_path, damage, monkeypatch):
    pictures(tmp_path / "set", ["a", "b"] * 10)
    first = load(tmp_path / "set")
    data, manifest = (next(prepared.folder("").glob(f"*.{kind}")) for kind in ("npz", "json"))
    if damage == "npz":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "json":
        manifest.write_text("{")
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "form": 99}))
    calls = []
    prepare = prepared._prepare
    monkeypatch.setattr(prepared, "_prepare", lambda *arguments: calls.append(1) or prepare(*arguments))
    again = load(tmp_path / "set")
    assert calls == [1]
    np.testing.assert_array_equal(again.splits["train"].images, first.splits["train"].images)


def test_what_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch, capsys):
    pictures(tmp_path / "set", ["a", "b"] * 10)
    prepare, changed = prepared._prepare, tmp_path / "set" / "images" / "003.png"

    def change(*arguments):
        made = prepare(*arguments)
        own_files.write_picture(changed, np.full((12, 10), 7, np.uint8))
        return made

    monkeypatch.setattr(prepared, "_prepare", change)
    first = load(tmp_path / "set")
    assert "files changed while they were read" in capsys.readouterr().err
    monkeypatch.setattr(prepared, "_prepare", prepare)
    assert load(tmp_path / "set").md5 != first.md5


def test_other_labels_or_splits_are_other_data(tmp_path):
    rows = pictures(tmp_path, ["a", "b"] * 10)
    first = load(tmp_path).md5
    assert load(tmp_path, folder.Settings(rank=2, split_seed=1)).md5 != first
    table(tmp_path / "labels.csv", [rows[0], (rows[1][0], "a"), *rows[2:]])
    assert load(tmp_path).md5 != first


# --- what is wrong --------------------------------------------------------------------------------------------------------------


def _corrupt(root, rows):
    for name in ("images/001.png", "images/004.png"):
        (root / name).write_bytes(b"\x89PNG\r\n\x1a\n broken")


def _mixed(root, rows):
    own_files.write_picture(root / "images/004.png", np.zeros((9, 9), np.uint8))


def _missing(root, rows):
    (root / "images/007.png").unlink()


def _twice(root, rows):
    table(root / "labels.csv", [*rows, rows[3]])


def _group_in_two(root, rows):
    named = [(*row, "val" if index > 14 else "test" if index > 9 else "train", f"p{index // 4}") for index, row in enumerate(rows)]
    table(root / "labels.csv", named, ("path", "label", "split", "group"))


def _unseen(root, rows):
    named = [(*row, "val" if index > 14 else "test" if index > 9 else "train") for index, row in enumerate(rows)]
    table(root / "labels.csv", [(*named[-1][:1], "rare", "test"), *named[:-1]], ("path", "label", "split"))


def _word(root, rows):
    table(root / "labels.csv", [(*row, "tset") for row in rows], ("path", "label", "split"))


def _column(root, rows):
    table(root / "labels.csv", rows, ("file", "label"))


def _no_label(root, rows):
    table(root / "labels.csv", [*rows[:3], (rows[3][0], ""), *rows[4:]])


def _one_class(root, rows):
    table(root / "labels.csv", [(name, "a") for name, _ in rows])


def _mask(root, rows):
    own_files.write_picture(root / "mask.png", np.zeros((5, 5), np.uint8))
    table(root / "labels.csv", [(*row, "mask.png" if index == 2 else "") for index, row in enumerate(rows)], ("path", "label", "mask"))


def _volume(root, rows):
    own_files.write_nifti(root / "v.nii", own_files.landmarks())
    table(root / "labels.csv", [("v.nii", "a"), *rows])


def _patients(root, rows):
    table(root / "labels.csv", [(*row, f"p{index // 4}") for index, row in enumerate(rows)], ("path", "label", "Patient_ID"))


def _label_twice(root, rows):
    table(root / "labels.csv", [(*row, "c") for row in rows], ("path", "label", "label"))


def _folders_of_splits(root, rows):
    (root / "labels.csv").unlink()
    (root / "images").rename(root / "train")
    (root / "test").mkdir()


def _some_groups(root, rows):
    table(root / "labels.csv", [(*row, "p1" if index else "") for index, row in enumerate(rows)], ("path", "label", "group"))


@pytest.mark.parametrize(
    ("spoil", "size", "says"),
    [
        (_corrupt, 8, ["2 of 20 examples cannot be used", "001.png", "004.png", "nothing is left out"]),
        (_mixed, 0, ["data.size=0", "19 of 12x10", "1 of 9x9", "004.png"]),
        (_missing, 8, ["1 file is not there", "007.png"]),
        (_twice, 8, ["listed twice", "003.png"]),
        (_group_in_two, 8, ["2 groups are in more than one split", "p2, p3"]),
        (_unseen, 8, ["no training example of rare"]),
        (_word, 8, ["'tset' is unknown", "train, val, test"]),
        (_column, 8, ["no column path", "file,label"]),
        (_no_label, 8, ["line 5", "no label"]),
        (_one_class, 8, ["at least two classes"]),
        (_mask, 8, ["1 of 20", "a mask of [5, 5] for an image of [12, 10]"]),
        (_volume, 8, ["1 of 21", "v.nii", "configs/vit3d.py"]),
        (_some_groups, 8, ["1 row has no group"]),
        (_patients, 8, ["patient_id would not be used", "call it group"]),
        (_label_twice, 8, ["column label stands there twice"]),
        (_folders_of_splits, 8, ["test, train are named as splits"]),
    ],
)
def test_what_is_wrong_is_counted_and_named_and_nothing_is_written(tmp_path, capsys, spoil, size, says):
    root = tmp_path / "set"
    spoil(root, pictures(root, ["a", "b"] * 10))
    from vitmed import cli

    patch = {8: 4, 0: 2}[size]
    flags = [f"--config=configs/vit2d.py:dataset=folder:{root},size={size},patch={patch},variant=vit_micro,pretrained="]
    status = cli.run_cli(main.main, [*flags, f"--workdir={tmp_path / 'run'}"])
    said = capsys.readouterr().err.strip()
    assert status == 2, said
    assert len(said.splitlines()) == 1, said
    assert all(word in said for word in says), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("data.spacing=1", "data.spacing=1.0: must be 0.0 with phantom2d"),
        ("data.window=lungs", "data.window"),
        ("data.folds=5", "data.folds"),
    ],
)
def test_options_of_own_data_are_refused_for_other_sets(argument, says):
    field, _, value = argument.partition("=")
    made = config.load("configs/vit2d.py:dataset=phantom2d,pretrained=", {field: value})
    with pytest.raises(config.InputError, match=says):
        experiment.plan(made)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("data.window", "lungs", "did you mean lung"),
        ("data.shares", "0.5,0.5", "three numbers"),
        ("data.folds", "2", "from 3"),
        ("data.fold", "1", "less than data.folds"),
        ("data.task", "classes", "unknown"),
        ("data.task", "binary", "has 3 classes"),
        ("data.classes", "a,b", "has the labels c besides"),
        ("data.size", "8,8,8", "one number, or 2"),
        ("data.spacing", "-1", "data.spacing"),
    ],
)
def test_options_that_make_no_sense(tmp_path, field, value, says):
    pictures(tmp_path, ["a", "b", "c"] * 10)
    made = config.load(f"configs/vit2d.py:dataset=folder:{tmp_path},size=8,patch=4,pretrained=", {field: value})
    with pytest.raises(config.InputError, match=says):
        experiment.plan(made)


# --- a whole run ----------------------------------------------------------------------------------------------------------------


def test_a_run_on_own_volumes_says_what_it_read_and_whose_predictions_are_whose(tmp_path, capsys):
    root, rng = tmp_path / "set", np.random.default_rng(0)
    root.mkdir()
    rows = []
    for index in range(30):
        values = rng.normal(0, 100, (8, 9, 10)).astype(np.int16) + 300 * (index % 2)
        own_files.write_nifti(root / f"{index}.nii.gz", values, orientation="LPS", spacing=(3, 1, 1))
        rows.append((f"{index}.nii.gz", ["low", "high"][index % 2], f"p{index // 3}"))
    table(root / "labels.csv", rows, ("path", "label", "group"))
    flags = [
        f"--config=configs/vit3d.py:dataset=folder:{root},size=8,patch=4,variant=vit_micro,pretrained=",
        "--config.data.window=-300:600",
    ]
    flags += ["--config.train.epochs=2", "--config.seeds=0", "--config.augment.quarter_turns=false", f"--workdir={tmp_path / 'run'}"]
    assert main.main(flags) == 0
    said = capsys.readouterr().err
    assert "30 examples, binary" in said
    assert "spacings in mm: 3x1x1 (30)" in said
    assert "groups 10, none in two splits" in said
    run = run_folders.RunFolder(tmp_path / "run")
    assert run.read_result()["image_size"] == [8, 8, 8]
    rows = list(csv.DictReader(run.examples.read_text().splitlines()))
    test = [row for row in rows if row["split"] == "test"]
    classes = run.read_model()["data"]["class_names"]
    assert [classes[label] for (label,) in run.read_predictions("test").labels] == [row["label"] for row in test]
    assert {row["group"] for row in test}.isdisjoint(row["group"] for row in rows if row["split"] != "test")
    assert len(rows) == 30
    pathlib.Path(root / "0.nii.gz").unlink()
    assert main.main(flags) == 0  # finished: the data are not looked at any more
