"""The phantoms: MedMNIST's form, reproducible, and told apart by detail only."""

import hashlib

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from vitmed.data import phantoms, sources

CASES = [("phantom2d", 28), ("phantom2d", 64), ("phantom3d", 28)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def phantom(request):
    name, size = request.param
    return sources.load(name, size=size)


def _digests(images):
    return {hashlib.sha256(image.tobytes()).hexdigest() for image in images}


def _detail(image, mask):
    """Mean squared difference of neighbours that both lie in the lesion."""
    energy = 0.0
    for axis in range(image.ndim):
        both = np.delete(mask, 0, axis) & np.delete(mask, -1, axis)
        energy += np.square(np.diff(image, axis=axis)[both]).mean()
    return energy


def test_form(phantom):
    description = phantom.description
    assert description.synthetic
    assert phantom.md5 is None
    assert description.task == "binary"
    assert description.class_names == ("blob", "specks")
    for split, num_examples in {"train": 600, "val": 100, "test": 200}.items():
        arrays = phantom.splits[split]
        assert arrays.images.shape == (num_examples, *description.image_size, 1)
        assert arrays.images.dtype == np.uint8
        assert arrays.images.flags.c_contiguous
        assert arrays.labels.shape == (num_examples, 1)
        assert arrays.labels.dtype == np.int32
        assert arrays.masks.shape == (num_examples, *description.image_size)
        assert arrays.masks.dtype == np.bool_
        assert arrays.labels.sum() == num_examples // 2
        changes = np.abs(np.diff(arrays.labels[:, 0])).mean()
        assert 0.3 < changes < 0.7, "the classes are not in random order"


def test_same_call_gives_the_same_bytes_and_another_seed_others():
    first, again, other = (phantoms.load("phantom2d", size=28, seed=seed) for seed in (phantoms.SEED, phantoms.SEED, 1))
    for split in first.splits:
        for field in ("images", "labels", "masks"):
            assert getattr(first.splits[split], field).tobytes() == getattr(again.splits[split], field).tobytes()
        assert not _digests(first.splits[split].images) & _digests(other.splits[split].images)


def test_no_image_comes_twice(phantom):
    digests = [_digests(arrays.images) for arrays in phantom.splits.values()]
    assert len(set.union(*digests)) == 900


def test_mean_of_the_lesion_tells_nothing_and_its_detail_everything(phantom):
    arrays = phantom.splits["train"]
    images, masks, labels = arrays.images[..., 0].astype(np.float32), arrays.masks, arrays.labels[:, 0]
    pairs = list(zip(images, masks, strict=True))
    for measure in (lambda image, mask: image[mask].mean(), lambda image, mask: image[mask].sum(), lambda image, _: image.mean()):
        assert 0.4 < sklearn_metrics.roc_auc_score(labels, [measure(*pair) for pair in pairs]) < 0.6
    assert 0.4 < sklearn_metrics.roc_auc_score(labels, masks.reshape(len(labels), -1).sum(1)) < 0.6
    assert sklearn_metrics.roc_auc_score(labels, [_detail(*pair) for pair in pairs]) > 0.95


def test_nothing_is_clipped_and_every_lesion_is_whole(phantom):
    arrays = phantom.splits["train"]
    assert arrays.images.max() < 255
    background = arrays.images[:, 0].mean()  # the first row or slice, which no body reaches
    assert abs(background - phantoms.BACKGROUND) < 1
    size, rank = phantom.description.image_size[0], phantom.description.rank
    volumes = arrays.masks.reshape(600, -1).sum(1)
    low, high = (np.pi * r**2 if rank == 2 else 4 / 3 * np.pi * r**3 for r in np.multiply(phantoms.LESION_RADIUS[rank], size / 28))
    assert 0.85 * low < volumes.min()
    assert volumes.max() < 1.15 * high


@pytest.mark.parametrize("rank", [2, 3])
def test_lesions_lie_in_the_body(rank):
    rng = np.random.default_rng(0)
    furthest = []
    for _ in range(100):
        values, radius, to_pixels = phantoms._body(rng, (28,) * rank)
        window, profile = phantoms._place(rng, radius, to_pixels)
        assert values[window][profile > 0].min() > phantoms.BACKGROUND
        furthest.append(np.linalg.norm([(ends.start + ends.stop - 1) / 2 - 13.5 for ends in window]))
    assert np.std(furthest) > 0.5, "the place is not random"


@pytest.mark.parametrize("rank", [2, 3])
def test_both_lesions_add_the_same_total(rank):
    rng = np.random.default_rng(0)
    size = 28
    radius = np.zeros((size,) * rank)  # a body that fills everything
    _, profile = phantoms._place(rng, radius, lambda point: np.full(rank, size / 2 - 0.3) + point)
    blob, specks = (phantoms._lesion(rng, profile, label) for label in (0, 1))
    assert blob.sum() == pytest.approx(specks.sum())
    assert specks[profile == 0].sum() == 0
    assert blob.max() < phantoms.BLOB_AMPLITUDE[rank] * 1.001
    assert len(np.unique(specks)) == 2, "specks are equally bright"
    assert specks.max() == pytest.approx(phantoms.BLOB_AMPLITUDE[rank] * phantoms.SPECK_CONTRAST[rank], rel=0.25)


@pytest.mark.slow
def test_largest_size():
    images = sources.load("phantom3d", size=64).splits["test"].images
    assert images.shape == (200, 64, 64, 64, 1)
    assert images.max() < 255
