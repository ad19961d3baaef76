"""A run's folder: written whole, refused for another config, read back with its faults named."""

import copy
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from vitmed import config as config_lib
from vitmed.runs import files, folder

CONFIG = {
    "data": {"name": "breastmnist", "size": 28, "root": "/data"},
    "model": {"variant": "vit_ti", "patch_size": (7, 7), "pretrained": ""},
    "train": {"epochs": 20, "learning_rate": 1e-4, "checkpoint_seconds": 600},
    "mesh": {"data": -1, "fsdp": 1},
    "tracking": {"tensorboard": False},
    "seeds": (0, 1, 2),
}
MEASURED = {"loss": [0.4, 0.5], "accuracy": [0.8, 0.7], "balanced_accuracy": [0.75, None], "auc": [0.9, None]}
RESULT = {
    "schema_version": 1,
    "dataset": "breastmnist",
    "data_md5": None,
    "task": "binary",
    "image_size": [28, 28],
    "patch_size": [7, 7],
    "variant": "vit_ti",
    "pretrained": None,
    "normalisation": {"mean": [0.5], "std": [0.5]},
    "seeds": [0, 1],
    "failed_seeds": [],
    "num_tokens": 17,
    "num_params": 5_400_000,
    "num_trainable_params": 5_400_000,
    "gmacs_forward": 0.092,
    "test": MEASURED,
    "val": MEASURED,
    "best_epoch": [3, 4],
    "train_seconds": 12.5,
    "compile_seconds": 3.0,
    "train_images_per_second": 900.0,
    "test_milliseconds_per_image": 0.5,
    "peak_memory_bytes": 10**9,
    "device": "cpu",
    "versions": {"jax": "0.10.2"},
    "config_digest": "0123456789abcdef",
}


def altered(**changes):
    """CONFIG with fields changed by dotted name (a double underscore is the dot)."""
    config = copy.deepcopy(CONFIG)
    for name, value in changes.items():
        *path, last = name.split("__")
        target = config
        for key in path:
            target = target[key]
        target[last] = value
    return config


def everything_under(path):
    return {file.relative_to(path): file.read_bytes() if file.is_file() else None for file in path.rglob("*")}


# --- write_whole


def test_write_whole_replaces_and_leaves_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    files.write_whole(file, b"old")
    files.write_whole(file, b"new")
    assert everything_under(tmp_path) == {file.relative_to(tmp_path): b"new"}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask  # readable by whom the user wants, unlike mkstemp's files


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_whole_on_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, call):
    file = tmp_path / "a.json"
    files.write_whole(file, b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(config_lib.MachineError, match=r"a\.json could not be written: No space left"):
        files.write_whole(file, b"new")
    assert everything_under(tmp_path) == {file.relative_to(tmp_path): b"old"}


def test_write_whole_into_an_absent_folder(tmp_path):
    with pytest.raises(config_lib.MachineError, match="No such file"):
        files.write_whole(tmp_path / "absent" / "a.json", b"new")


def test_write_whole_survives_kills(tmp_path):
    """A writer killed at any moment leaves one of the versions, entire."""
    file = tmp_path / "a.bin"
    program = (
        "import sys; from vitmed.runs import files\nwhile True:\n  for b in b'ab': files.write_whole(sys.argv[1], bytes([b]) * 500_000)"
    )
    for pause in (0.02, 0.05, 0.09):
        file.unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", program, str(file)]) as writer:
            while not file.exists() and writer.poll() is None:
                time.sleep(0.005)
            time.sleep(pause)
            writer.send_signal(signal.SIGKILL)
        data = file.read_bytes()
        assert len(data) == 500_000
        assert len(set(data)) == 1


# --- digest and config


def test_digest_sees_what_a_run_is_and_not_how_it_is_run():
    digest = folder.digest(CONFIG)
    assert len(digest) == 16
    assert int(digest, 16) >= 0
    assert digest == folder.digest(json.loads(json.dumps(CONFIG)))  # lists for tuples
    assert digest == folder.digest(dict(reversed(CONFIG.items())))
    free = altered(data__root="/elsewhere", mesh={"data": 8}, tracking__tensorboard=True, train__checkpoint_seconds=1)
    assert digest == folder.digest(free)
    changed = [
        altered(seeds=(0, 1)),
        altered(data__size=64),
        altered(model__patch_size=(7,)),
        altered(train__learning_rate=2e-4),
        altered(train__epochs=True),
        altered(mesh_shape=3),
        altered(data__root_kind="x"),
    ]
    assert len({digest, *map(folder.digest, changed)}) == 1 + len(changed)


def test_digest_is_stable():
    """Folders of earlier versions are recognised by it: if this fails, users' runs no longer continue; bump SCHEMA_VERSION and say so."""
    assert folder.digest(CONFIG) == "ff707b3d0e773dec"


def test_create_then_check_and_read(tmp_path):
    run = folder.RunFolder(tmp_path / "a" / "b")
    run.check(CONFIG)
    assert not (tmp_path / "a").exists()
    run.create(CONFIG)
    run.check(CONFIG)
    run.check(altered(data__root="/elsewhere", mesh={"data": 8}))
    assert folder.digest(run.read_config()) == folder.digest(CONFIG)
    assert run.read_config() == json.loads(json.dumps(CONFIG))
    run.create(altered(data__root="/elsewhere"))
    assert run.read_config()["data"]["root"] == "/data"
    assert [file.name for file in run.path.iterdir()] == ["config.json"]


def test_another_config_is_refused_with_the_difference(tmp_path):
    run = folder.RunFolder(tmp_path / "run")
    run.create(CONFIG)
    before = everything_under(tmp_path)
    with pytest.raises(config_lib.InputError) as raised:
        run.check(altered(model__patch_size=(4, 4), seeds=(0,), data__root="/elsewhere", model__extra=1))
    message = str(raised.value)
    assert "model.patch_size is [7, 7] there, [4, 4] here" in message
    assert "seeds is [0, 1, 2] there, [0] here" in message
    assert "model.extra is absent there, 1 here" in message
    assert "data.root" not in message
    assert "more" not in message
    assert "another --workdir" in message
    assert everything_under(tmp_path) == before


def test_many_differences_are_counted(tmp_path):
    run = folder.RunFolder(tmp_path)
    run.create({**CONFIG, "loss": dict.fromkeys("abcdefgh", 1)})
    with pytest.raises(config_lib.InputError, match="and 3 more"):
        run.check({**CONFIG, "loss": dict.fromkeys("abcdefgh", 2)})


def test_a_setting_that_json_does_not_have(tmp_path):
    run = folder.RunFolder(tmp_path / "run")
    with pytest.raises(config_lib.InputError, match="NaN or infinite"):
        run.create(altered(train__learning_rate=float("nan")))
    assert not run.path.exists()


def test_a_folder_with_other_files_is_fine(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run = folder.RunFolder(tmp_path)
    run.check(CONFIG)
    run.create(CONFIG)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("below", [".", "run", "deep/er"])
def test_a_file_where_a_folder_should_be(tmp_path, below):
    (tmp_path / "taken").write_text("mine")
    run = folder.RunFolder(tmp_path / "taken" / below)
    with pytest.raises(config_lib.InputError, match="taken is a file where a folder should be"):
        run.check(CONFIG)
    with pytest.raises(config_lib.InputError, match="cannot be made"):
        run.create(CONFIG)
    assert everything_under(tmp_path) == {(tmp_path / "taken").relative_to(tmp_path): b"mine"}


def test_a_link_to_nowhere_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(config_lib.InputError, match="file where a folder"):
        folder.RunFolder(tmp_path / "link").check(CONFIG)


@pytest.mark.parametrize("there", [True, False])
def test_a_read_only_file_system(tmp_path, monkeypatch, there):
    """Root may write anything but a read-only file system, for which os.access says no."""
    run = folder.RunFolder(tmp_path / "a" / "b")
    if there:
        run.path.mkdir(parents=True)
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((str(path), mode)))
    with pytest.raises(config_lib.InputError, match="is not writable"):
        run.check(CONFIG)
    assert asked == [(str(run.path if there else tmp_path), os.W_OK | os.X_OK)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_of_someone_else(tmp_path):
    tmp_path.chmod(0o500)
    run = folder.RunFolder(tmp_path / "run")
    for refuses in (run.check, run.create):
        with pytest.raises(config_lib.InputError):
            refuses(CONFIG)


def test_a_path_too_long(tmp_path):
    run = folder.RunFolder(tmp_path / ("x" * 300))
    for refuses in (run.check, run.create):
        with pytest.raises(config_lib.InputError, match="File name too long"):
            refuses(CONFIG)


def test_a_full_disk_is_the_machines_fault(tmp_path, monkeypatch):
    run = folder.RunFolder(tmp_path / "run")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(config_lib.MachineError, match="No space left"):
        run.create(CONFIG)


@pytest.mark.parametrize("content", [b"", b'{"data": ', b"[1]", b"\xff\xfe{", b'{"a": NaN}', b"[" * 100_000])
def test_a_broken_config_is_named(tmp_path, content):
    run = folder.RunFolder(tmp_path)
    run.config.write_bytes(content)
    for refuses in (run.read_config, lambda: run.check(CONFIG)):
        with pytest.raises(config_lib.InputError, match=r"config\.json is broken"):
            refuses()


def test_an_absent_or_unreadable_config(tmp_path):
    run = folder.RunFolder(tmp_path / "run")
    with pytest.raises(config_lib.InputError, match="holds no run"):
        run.read_config()
    run.config.mkdir(parents=True)
    with pytest.raises(config_lib.InputError, match=r"config\.json cannot be read: Is a directory"):
        run.check(CONFIG)


# --- metrics


def test_metrics_come_back_and_what_is_not_a_number_is_null(tmp_path):
    run = folder.RunFolder(tmp_path)
    assert run.read_metrics() == []
    rows = [
        {"epoch": 1, "loss": np.array([0.5, np.nan], np.float32), "val": {"auc": (np.float64(0.25), float("inf"))}},
        {"epoch": np.int64(2), "note": "\u2028 is no line break here"},
    ]
    run.write_metrics(rows[:1])
    run.write_metrics(rows)
    assert run.read_metrics() == [{"epoch": 1, "loss": [0.5, None], "val": {"auc": [0.25, None]}}, {"epoch": 2, "note": rows[1]["note"]}]
    assert run.metrics.read_bytes().count(b"\n") == 2


def test_a_broken_line_of_metrics_is_named(tmp_path):
    run = folder.RunFolder(tmp_path)
    run.write_metrics([{"epoch": 1}])
    with run.metrics.open("a") as file:
        file.write('{"epoch": ')
    with pytest.raises(config_lib.InputError, match=r"metrics\.jsonl line 2 is broken"):
        run.read_metrics()


# --- predictions


def predictions(num_runs=2, num_examples=3, num_classes=2):
    rng = np.random.default_rng(0)
    return {
        "labels": rng.integers(0, num_classes, (num_examples, 1)),
        "probabilities": rng.random((num_runs, num_examples, num_classes), np.float32),
        "seeds": list(range(num_runs)),
    }


def test_predictions_come_back(tmp_path):
    run, written = folder.RunFolder(tmp_path), predictions()
    written["probabilities"][1] = np.nan  # a failed seed
    run.write_predictions("val", **written)
    read = run.read_predictions("val")
    for name, dtype in (("labels", np.int64), ("probabilities", np.float32), ("seeds", np.int64)):
        array = getattr(read, name)
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, written[name])


def test_the_same_predictions_are_the_same_bytes(tmp_path):
    run, written = folder.RunFolder(tmp_path), predictions()
    run.write_predictions("val", **written)
    turned = {
        **written,
        "probabilities": np.asfortranarray(written["probabilities"].astype(np.float64)),
        "labels": written["labels"].astype(np.uint8),
    }
    run.write_predictions("test", **turned)
    assert run.predictions("val").read_bytes() == run.predictions("test").read_bytes()
    with zipfile.ZipFile(run.predictions("val")) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"labels": np.zeros(3, int)},
        {"labels": np.zeros((4, 1), int)},
        {"labels": np.zeros((3, 1))},
        {"probabilities": np.zeros((3, 2), np.float32)},
        {"probabilities": np.zeros((2, 3, 2), int)},
        {"seeds": [0]},
        {"seeds": [0.5, 1.5]},
    ],
)
def test_predictions_that_do_not_fit(tmp_path, wrong):
    run = folder.RunFolder(tmp_path)
    with pytest.raises(ValueError, match="expected"):
        run.write_predictions("val", **{**predictions(), **wrong})
    assert not list(tmp_path.iterdir())
    run.write_predictions("val", **predictions())
    np.savez(run.predictions("val"), **{**predictions(), **wrong})
    with pytest.raises(config_lib.InputError, match="does not hold predictions: expected"):
        run.read_predictions("val")


def test_absent_predictions_say_what_there_is(tmp_path):
    run = folder.RunFolder(tmp_path)
    with pytest.raises(config_lib.InputError, match="there are: none"):
        run.read_predictions("test")
    run.write_predictions("val", **predictions())
    with pytest.raises(config_lib.InputError, match="no predictions of split 'test'; there are: val"):
        run.read_predictions("test")


def test_foreign_predictions_are_refused(tmp_path):
    run = folder.RunFolder(tmp_path)
    run.write_predictions("val", **predictions())
    file = run.predictions("val")
    np.savez(file, labels=np.zeros((3, 1), int))
    with pytest.raises(config_lib.InputError, match=r"is broken.*probabilities"):
        run.read_predictions("val")
    np.savez(file, **{**predictions(), "labels": np.array([[{}]], object)})
    with pytest.raises(config_lib.InputError, match=r"is broken.*pickled objects, which are never loaded"):
        run.read_predictions("val")
    file.write_bytes(b"PK")
    with pytest.raises(config_lib.InputError, match="is broken"):
        run.read_predictions("val")
    file.unlink()
    file.mkdir()
    with pytest.raises(config_lib.InputError, match="cannot be read"):
        run.read_predictions("val")


def test_no_flipped_bit_and_no_cut_reads_as_other_predictions(tmp_path):
    run, written = folder.RunFolder(tmp_path), predictions()
    run.write_predictions("val", **written)
    file = run.predictions("val")
    whole = file.read_bytes()
    flips = [whole[:i] + bytes([whole[i] ^ (1 << (i * 5 + 3) % 8)]) + whole[i + 1 :] for i in range(len(whole))]
    cuts = [whole[:length] for length in range(0, len(whole), 7)]
    refused = 0
    for data in flips + cuts:
        file.write_bytes(data)
        try:
            read = run.read_predictions("val")
        except config_lib.InputError:
            refused += 1
        else:  # a bit that means nothing, such as a time stamp
            for name, array in written.items():
                np.testing.assert_array_equal(getattr(read, name), array)
    assert refused > len(cuts) + len(flips) // 2


def test_a_damaged_header_is_not_believed(tmp_path):
    """The checksum is verified before memory is asked for, here 2 PB."""
    run = folder.RunFolder(tmp_path)
    run.write_predictions("val", **predictions())
    file = run.predictions("val")
    true, false = b"'shape': (3, 1), }", b"'shape': (300000000000000, 1), }"
    file.write_bytes(file.read_bytes().replace(true.ljust(len(false)), false))
    assert false in file.read_bytes()
    with pytest.raises(config_lib.InputError, match=r"the checksum of labels\.npy does not match"):
        run.read_predictions("val")


# --- result


def test_the_result_comes_back(tmp_path):
    run = folder.RunFolder(tmp_path)
    assert run.read_result() is None
    run.write_result({**RESULT, "seeds": (np.int64(0), np.int64(1)), "val": {**MEASURED, "auc": np.array([0.9, np.nan])}})
    assert run.read_result() == RESULT


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": "regression"}, r"\$\.task"),
        ({"test": {**MEASURED, "auc": 0.5}}, r"\$\.test\.auc"),
        ({"best_epoch": [0]}, r"\$\.best_epoch\[0\]"),
        ({"train_seconds": float("nan")}, r"\$\.train_seconds"),
        ({"seeds": []}, r"\$\.seeds"),
    ],
)
def test_a_result_that_does_not_match_is_neither_written_nor_read(tmp_path, change, says):
    run = folder.RunFolder(tmp_path)
    with pytest.raises(ValueError, match=says):
        run.write_result({**RESULT, **change})
    assert not run.result.exists()
    run.result.write_text(json.dumps({**RESULT, **change}).replace("NaN", "null"))
    with pytest.raises(config_lib.InputError, match=r"result\.json does not match the schema: " + says):
        run.read_result()


def test_a_missing_field_is_named(tmp_path):
    run = folder.RunFolder(tmp_path)
    run.result.write_text(json.dumps({name: value for name, value in RESULT.items() if name != "device"}))
    with pytest.raises(config_lib.InputError, match="'device' is a required property"):
        run.read_result()


def test_a_result_of_a_newer_vitmed(tmp_path):
    run = folder.RunFolder(tmp_path)
    run.result.write_text(json.dumps({"schema_version": folder.SCHEMA_VERSION + 1}))
    with pytest.raises(config_lib.InputError, match="reads up to 1; install a newer vitmed"):
        run.read_result()


@pytest.mark.parametrize("content", ["", "null", '{"schema_version": 1', "{}", json.dumps({**RESULT, "gmacs_forward": float("nan")})])
def test_a_broken_result_is_named(tmp_path, content):
    run = folder.RunFolder(tmp_path)
    run.result.write_text(content)
    with pytest.raises(config_lib.InputError, match=r"result\.json"):
        run.read_result()
