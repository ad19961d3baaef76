"""Names, sizes and descriptions of every set, and where files are looked for."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from vitmed import config
from vitmed.data import download, medmnist, sources

RGB = {"pathmnist", "dermamnist", "retinamnist", "bloodmnist"}
# From the tables of the MedMNIST v2 paper (Yang et al. 2023): set -> task, number of classes or labels.
TASKS = {
    "pathmnist": ("multi-class", 9),
    "chestmnist": ("multi-label", 14),
    "dermamnist": ("multi-class", 7),
    "octmnist": ("multi-class", 4),
    "pneumoniamnist": ("binary", 2),
    "retinamnist": ("ordinal", 5),
    "breastmnist": ("binary", 2),
    "bloodmnist": ("multi-class", 8),
    "tissuemnist": ("multi-class", 8),
    "organamnist": ("multi-class", 11),
    "organcmnist": ("multi-class", 11),
    "organsmnist": ("multi-class", 11),
    "organmnist3d": ("multi-class", 11),
    "nodulemnist3d": ("binary", 2),
    "adrenalmnist3d": ("binary", 2),
    "fracturemnist3d": ("multi-class", 3),
    "vesselmnist3d": ("binary", 2),
    "synapsemnist3d": ("binary", 2),
    "phantom2d": ("binary", 2),
    "phantom3d": ("binary", 2),
}
SIZES = {name: (28, 64) if name.endswith("3d") or name == "phantom2d" else (28, 64, 128, 224) for name in TASKS}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty folders in place of data.root, $VITMED_DATA and ~/.medmnist, and a download that only says where it would write."""
    paths = {name: tmp_path / name for name in ("root", "data", "home/.medmnist")}
    for path in paths.values():
        path.mkdir(parents=True)
    monkeypatch.setenv("VITMED_DATA", str(paths["data"]))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def fetch(url, path, *, md5):
        raise config.MachineError(f"would download {url} {md5} to {path}")

    monkeypatch.setattr(download, "fetch", fetch)
    return paths


def test_names():
    assert sorted(sources.names()) == sorted(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_describe(name):
    task, num_classes = TASKS[name]
    for size in SIZES[name]:
        description = sources.describe(name, size)
        assert description.name == name
        assert description.task == task
        assert description.num_classes == len(set(description.class_names)) == num_classes
        assert description.rank == (3 if name.endswith("3d") else 2)
        assert description.image_size == (size,) * description.rank
        assert description.num_channels == (3 if name in RGB else 1)
        assert list(description.num_examples) == ["train", "val", "test"]
        assert min(description.num_examples.values()) >= 78
        assert description.synthetic == name.startswith("phantom")
        assert description.licence == {"dermamnist": "CC BY-NC 4.0"}.get(name, "CC BY 4.0") or description.synthetic


def test_descriptions_are_not_shared_between_sizes():
    small, large = sources.describe("pathmnist", 28), sources.describe("pathmnist", 224)
    assert dataclasses.replace(small, image_size=(224, 224)) == large
    assert small.num_examples == {"train": 89996, "val": 10004, "test": 7180}
    assert small.class_names[0] == "adipose"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("brestmnist", "did you mean breastmnist"),
        ("BreastMNIST", "did you mean breastmnist"),
        ("phantom", "phantom2d"),
        ("imagenet-21k", "choose one of pathmnist, chestmnist"),
        ("", "choose one of pathmnist"),
        (None, "choose one of pathmnist"),
    ],
)
def test_unknown_names_are_answered_with_known_ones(name, says):
    for call in (lambda: sources.describe(name, 28), lambda: sources.load(name, size=28)):
        with pytest.raises(config.InputError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("breastmnist", 32, "28, 64, 128, 224"),
        ("organmnist3d", 128, "comes in 28, 64;"),
        ("phantom2d", 224, "comes in 28, 64;"),
        ("phantom3d", (28, 28, 64), r"data.size=\(28, 28, 64\)"),
    ],
)
def test_a_size_that_does_not_exist_is_answered_with_those_that_do(name, size, says):
    for call in (lambda: sources.describe(name, size), lambda: sources.load(name, size=size)):
        with pytest.raises(config.InputError, match=says):
            call()


def test_folders_are_searched_in_order(folders):
    def located(root=""):
        return medmnist.locate("breastmnist.npz", root=root).parent

    root = str(folders["root"])
    assert located(root) == folders["root"], "a download goes into data.root when that is set"
    assert located() == folders["data"], "else into $VITMED_DATA"
    (folders["home/.medmnist"] / "breastmnist.npz").touch()
    assert located(root) == located() == folders["home/.medmnist"]
    (folders["data"] / "breastmnist.npz").touch()
    assert located(root) == located() == folders["data"]
    (folders["root"] / "breastmnist.npz").touch()
    assert located(root) == folders["root"]
    assert located() == folders["data"]


def test_without_folders_a_download_goes_to_the_home_directory(folders, monkeypatch):
    monkeypatch.delenv("VITMED_DATA")
    with pytest.raises(config.MachineError, match=r"home/\.medmnist/chestmnist_224\.npz") as caught:
        sources.load("chestmnist", size=224)
    url, md5 = medmnist.entries()["chestmnist"].files[224]
    assert url in str(caught.value)
    assert url.endswith("chestmnist_224.npz?download=1")
    assert md5 == "45bd33e6f06c3e8cdb481c74a89152aa"
    assert md5 in str(caught.value)


def test_a_root_that_is_no_folder_is_refused(folders):
    for root in (folders["root"] / "absent", __file__, "~nobody_at_all/x"):
        with pytest.raises(config.InputError, match="not an existing folder"):
            sources.load("breastmnist", size=28, root=str(root))


def test_phantoms_need_no_folder(folders):
    assert sources.load("phantom2d", size=28, root=str(folders["root"] / "absent")).md5 is None


def test_sources_read_neither_torch_nor_medmnist_nor_jax(tmp_path):
    """In a process of its own: the table of the medmnist package is read as text, without its side effects."""
    program = (
        "import sys; from vitmed.data import sources; sources.describe('chestmnist', 64)\n"
        "assert not {'torch', 'medmnist', 'jax'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"HOME": str(tmp_path)})
    assert not list(tmp_path.iterdir()), "something was written to the home directory"


def test_a_medmnist_package_laid_out_otherwise_is_a_clear_error(tmp_path, monkeypatch):
    package = tmp_path / "medmnist"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    good = (
        "INFO = {'xmnist': {'task': 'multi-class', 'label': {'0': 'a', '1': 'b'}, 'n_channels': 1, 'license': 'x', "
        "'n_samples': {'train': 1, 'val': 1, 'test': 1}, 'url': 'https://x', 'MD5': 'y'}}"
    )
    bad = ["", "INFO = dict()", "INFO = {'a': {}}", "INFO = (", "INFO = {'a': 3}", "INFO = [1]", good.replace("multi-class", "regression")]
    for text in [None, *bad]:
        if text is not None:
            (package / "info.py").write_text(text)
        with pytest.raises(config.MachineError, match=r"info\.py is not laid out .* pip install"):
            medmnist.entries.__wrapped__()
    (package / "info.py").write_text(good)
    assert np.all(list(medmnist.entries.__wrapped__()) == ["xmnist"])
    monkeypatch.setattr(medmnist.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(config.MachineError, match="not installed; install it with"):
        medmnist.entries.__wrapped__()
