"""Every MedMNIST set loads in its form; every damaged, wrong or hostile file is an InputError that names it."""

import hashlib
import io
import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

from vitmed import config
from vitmed.data import medmnist, sources

SPLITS = ("train", "val", "test")
COUNTS = dict(zip(SPLITS, (5, 3, 4), strict=True))


def arrays_of(name, size, seed=0):
    """Arrays in the official form of a set, with few examples."""
    description = sources.describe(name, size)
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, count in COUNTS.items():
        channels = (3,) if description.num_channels == 3 else ()
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, *description.image_size, *channels), np.uint8)
        top, width = (1, description.num_classes) if description.task == "multi-label" else (description.num_classes - 1, 1)
        arrays[f"{split}_labels"] = rng.integers(0, top, (count, width), np.uint8, endpoint=True)
    return arrays


@pytest.fixture
def refused(tmp_path):
    """Load breastmnist from these arrays or bytes, expecting an InputError in one line that names the file and says `cause`."""
    path = tmp_path / "breastmnist.npz"

    def check(content, cause, *, verify=False):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.savez(path, **content)
        with pytest.raises(config.InputError) as caught:
            sources.load("breastmnist", size=28, root=str(tmp_path), verify=verify)
        message = str(caught.value)
        assert str(path) in message
        assert cause in message
        assert "delete it" in message
        assert "\n" not in message

    return check


@pytest.mark.parametrize("name", list(medmnist.entries()))
def test_every_set_loads(name, tmp_path):
    for size in (28, 64) if not name.endswith("3d") else (28,):
        arrays = arrays_of(name, size)
        np.savez_compressed(tmp_path / (f"{name}.npz" if size == 28 else f"{name}_{size}.npz"), **arrays)
        loaded = sources.load(name, size=size, root=str(tmp_path), verify=False)
        assert loaded.description.num_examples == COUNTS
        assert sources.describe(name, size).num_examples != COUNTS
        assert tuple(loaded.splits) == SPLITS
        for split, found in loaded.splits.items():
            shape = (COUNTS[split], *loaded.description.image_size, loaded.description.num_channels)
            assert found.images.shape == shape
            assert found.images.dtype == np.uint8
            assert found.images.flags.c_contiguous
            np.testing.assert_array_equal(found.images, arrays[f"{split}_images"].reshape(shape))
            assert found.labels.dtype == np.int32
            np.testing.assert_array_equal(found.labels, arrays[f"{split}_labels"])
            assert found.masks is None


def test_largest_images_and_other_integers_load(tmp_path):
    arrays = arrays_of("dermamnist", 224)
    arrays["train_labels"] = arrays["train_labels"].astype(">i8")
    arrays["val_images"] = np.asfortranarray(arrays["val_images"])
    np.savez(tmp_path / "dermamnist_224.npz", more=np.zeros(3), **arrays)
    splits = sources.load("dermamnist", size=224, root=str(tmp_path), verify=False).splits
    np.testing.assert_array_equal(splits["train"].labels, arrays["train_labels"])
    assert splits["train"].labels.dtype == np.int32
    assert splits["val"].images.flags.c_contiguous
    np.testing.assert_array_equal(splits["val"].images, arrays["val_images"])


@pytest.mark.parametrize(
    ("name", "size"), [("breastmnist", 28), ("breastmnist", 64), ("retinamnist", 28), ("adrenalmnist3d", 28), ("fracturemnist3d", 28)]
)
def test_real_files(name, size, shared_data):
    path = shared_data / (f"{name}.npz" if size == 28 else f"{name}_{size}.npz")
    loaded = sources.load(name, size=size, root=str(shared_data))
    assert loaded.md5 == hashlib.md5(path.read_bytes()).hexdigest() == medmnist.entries()[name].files[size][1]
    assert loaded.description == sources.describe(name, size)
    with np.load(path) as original:
        for split, found in loaded.splits.items():
            assert len(found.images) == len(found.labels) == loaded.description.num_examples[split]
            expected = original[f"{split}_images"].reshape(found.images.shape)
            np.testing.assert_array_equal(found.images, expected)
            np.testing.assert_array_equal(found.labels, original[f"{split}_labels"])
    classes = np.unique(np.concatenate([found.labels for found in loaded.splits.values()]))
    np.testing.assert_array_equal(classes, np.arange(loaded.description.num_classes))


def test_wrong_md5_is_refused_unless_accepted(shared_data, tmp_path, refused):
    real = (shared_data / "breastmnist.npz").read_bytes()
    path = tmp_path / "breastmnist.npz"
    with zipfile.ZipFile(io.BytesIO(real)) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    for said in (md5, medmnist.entries()["breastmnist"].files[28][1], "data.verify=False accepts it"):
        refused(path.read_bytes(), said, verify=True)
    loaded = sources.load("breastmnist", size=28, root=str(tmp_path), verify=False)
    assert loaded.md5 == md5
    assert loaded.description.num_examples == {"train": 546, "val": 78, "test": 156}


def test_damaged_files(refused, tmp_path):
    good = tmp_path / "good.npz"
    np.savez(good, **arrays_of("breastmnist", 28))
    whole = good.read_bytes()
    for content in (b"", b"<html>not found</html>", whole[: len(whole) // 2], whole[:-1], whole[100:]):
        refused(content, "is not")
    at = whole.index(b"train_images") + 1000  # within the pixels: only the archive's CRC can tell
    refused(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], "Bad CRC-32")
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (5, 28, 28), }".ljust(127) + b"\n"
    assert header in whole
    for wrong, cause in (
        (header.replace(b"28, 28", b"28, 29"), "which is not the 4048 bytes"),
        (header.replace(b"NUMPY", b"NUMPI"), "magic string"),
        (header.replace(b"\x01\x00v", b"\x07\x00v"), "version"),
        (header.replace(b"False", b"open("), "EOF in"),
        (b"", "magic string"),
    ):
        with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "wrong.npz", "w") as new:  # its CRC is right
            for member in old.namelist():
                new.writestr(member, old.read(member).replace(header, wrong))
        refused((tmp_path / "wrong.npz").read_bytes(), cause)


def test_random_damage_never_raises_anything_else(tmp_path):
    path = tmp_path / "breastmnist.npz"
    rng = np.random.default_rng(0)
    wholes = []
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays_of("breastmnist", 28))
        wholes.append(path.read_bytes())
    for trial in range(600):
        content = bytearray(wholes[trial % 2])
        first = 0 if trial % 4 < 2 else len(content) - 600  # half of them hit the archive's directory
        for at in rng.integers(first, len(content), 3):
            content[at] = rng.integers(256)
        path.write_bytes(content)
        try:
            sources.load("breastmnist", size=28, root=str(tmp_path), verify=False)
        except config.InputError as error:
            assert str(path) in str(error)  # noqa: PT017  what comes is either whole or this error


@pytest.mark.parametrize("key", [f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels")])
def test_missing_arrays(key, refused):
    arrays = arrays_of("breastmnist", 28)
    del arrays[key]
    refused(arrays, f"lacks the array {key}")


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        ("train_images", np.zeros((5, 28, 28), np.float32), "train_images holds float32, not uint8"),
        ("train_images", np.zeros((5, 28, 28), np.int8), "holds int8, not uint8"),
        ("val_labels", np.zeros((3, 1), np.float64), "val_labels holds float64, not integers"),
        ("val_labels", np.zeros((3, 1), "m8[s]"), "not integers"),
        ("val_labels", np.zeros((3, 1), "U1"), "not integers"),
        ("val_labels", np.zeros((3, 1), [("a", "u1")]), "not integers"),
        ("test_images", np.zeros((4, 28, 28, 3), np.uint8), "test_images has shape [4, 28, 28, 3], not [N, 28, 28]"),
        ("test_images", np.zeros((4, 64, 64), np.uint8), "not [N, 28, 28]"),
        ("test_images", np.zeros((4, 28, 28, 28), np.uint8), "not [N, 28, 28]"),
        ("test_images", np.uint8(0), "has shape []"),
        ("train_labels", np.zeros(5, np.uint8), "train_labels has shape [5], not [N, 1]"),
        ("train_labels", np.zeros((5, 2), np.uint8), "not [N, 1]"),
        ("train_labels", np.full((5, 1), 2, np.uint8), "from 2 to 2, allowed are 0 to 1"),
        ("train_labels", np.full((5, 1), -1, np.int8), "from -1 to -1, allowed are 0 to 1"),
        ("train_labels", np.full((5, 1), 2**32, np.uint64), "allowed are 0 to 1"),
        ("val_images", np.zeros((0, 28, 28), np.uint8), "val_images is empty"),
        ("val_labels", np.zeros((0, 1), np.uint8), "val_labels is empty"),
        ("val_images", np.zeros((2, 28, 28), np.uint8), "val split has 2 images but 3 labels"),
    ],
)
def test_wrong_arrays(key, value, cause, refused):
    refused(arrays_of("breastmnist", 28) | {key: value}, cause)


@pytest.mark.parametrize(
    ("name", "key", "value", "cause"),
    [
        ("retinamnist", "train_images", np.zeros((5, 28, 28), np.uint8), "not [N, 28, 28, 3]"),
        ("retinamnist", "val_labels", np.full((3, 1), 5), "allowed are 0 to 4"),
        ("nodulemnist3d", "train_images", np.zeros((5, 28, 28), np.uint8), "not [N, 28, 28, 28]"),
        ("chestmnist", "train_labels", np.zeros((5, 1), np.uint8), "not [N, 14]"),
        ("chestmnist", "test_labels", np.full((4, 14), 2, np.uint8), "allowed are 0 to 1"),
    ],
)
def test_wrong_arrays_of_other_sets(name, key, value, cause, tmp_path):
    np.savez(tmp_path / f"{name}.npz", **arrays_of(name, 28) | {key: value})
    with pytest.raises(config.InputError) as caught:
        sources.load(name, size=28, root=str(tmp_path), verify=False)
    assert cause in str(caught.value)


def test_other_numbers_of_examples_are_refused_when_verifying(tmp_path, monkeypatch, refused):
    np.savez(tmp_path / "breastmnist.npz", **arrays_of("breastmnist", 28))
    content = (tmp_path / "breastmnist.npz").read_bytes()
    entry = medmnist.entries()["breastmnist"]
    monkeypatch.setitem(entry.files, 28, (entry.files[28][0], hashlib.md5(content).hexdigest()))
    refused(content, "official set {'train': 546", verify=True)


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


def test_pickles_are_never_loaded(tmp_path, refused):
    created = tmp_path / "created"
    payload = np.array([Payload(created)] * 5, object).reshape(5, 1)
    refused(arrays_of("breastmnist", 28) | {"train_labels": payload}, "train_labels holds pickled objects, which are never loaded")
    refused(pickle.dumps(Payload(created)), "is not")
    with zipfile.ZipFile(tmp_path / "breastmnist.npz", "w") as archive:
        archive.writestr("train_images.npy", pickle.dumps(Payload(created)))
    refused((tmp_path / "breastmnist.npz").read_bytes(), "magic string")
    assert not created.exists()
    pickle.loads(pickle.dumps(Payload(created)))
    assert created.exists(), "the payload is none: this test shows nothing"


def _bomb(path, *, declared, num_bytes):
    """A small archive whose train_images declares `declared` examples and unpacks to `num_bytes` zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("train_images.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (declared, 28, 28)})
            for _ in range(num_bytes >> 20):
                member.write(bytes(1 << 20))
        for key, value in arrays_of("breastmnist", 28).items():
            if key == "train_labels":
                value = np.zeros((declared, 1), np.uint8)
            if key != "train_images":
                with archive.open(f"{key}.npy", "w") as member:
                    np.lib.format.write_array(member, value)


def test_zip_bombs_are_refused_unread(tmp_path, refused):
    path = tmp_path / "bomb.npz"
    num_bytes = 98 << 20
    for declared, cause in ((num_bytes // 784, "more than 8 times the official 780"), (5, "which is not the")):
        _bomb(path, declared=declared, num_bytes=num_bytes)
        content = path.read_bytes()
        assert len(content) < num_bytes // 50
        tracemalloc.start()
        refused(content, cause)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
        tracemalloc.stop()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("train_images.npy", bytes(10 << 20))
    refused(path.read_bytes(), "compressed in a way that numpy does not write")


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "breastmnist.npz").mkdir()
    with pytest.raises(config.InputError, match=r"breastmnist\.npz: cannot be read .*data\.root"):
        sources.load("breastmnist", size=28, root=str(tmp_path))
