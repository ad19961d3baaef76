"""Heat drawn: every pixel has its patch's, a volume's lies where the volume lies, and pictures show it in its blocks."""

import builtins
import io
import math

import nibabel
import numpy as np
import pytest
from PIL import Image

from vitmed import cli, config, inference, main, predict
from vitmed.data import preparation, stored
from vitmed.study import heatmaps


def nearest_by_loop(heat, lattice, place):
    """The token whose kernel's centre is nearest to a place, in shares of the image; the later one where two are."""
    axes = zip(place, lattice.image_size, lattice.patch_size, lattice.kernel_size, heat.shape, strict=True)
    at = []
    for share, length, patch, kernel, count in axes:
        distances = [abs(share * length - (index * patch + kernel / 2)) for index in range(count)]
        at.append(count - 1 - int(np.argmin(distances[::-1])))
    return heat[tuple(at)]


@pytest.mark.parametrize(
    ("image_size", "patch_size", "kernel_size"),
    [((6, 8), (3, 4), (3, 4)), ((9, 8), (2, 4), (5, 4)), ((9, 8), (4, 5), (1, 3)), ((4, 6, 5), (2, 3, 2), (2, 3, 3))],
)
def test_a_pixel_has_the_heat_of_the_nearest_token(image_size, patch_size, kernel_size):
    lattice = heatmaps.Lattice(image_size, patch_size, kernel_size)
    heat = np.random.default_rng(0).random(lattice.grid)
    for size in (image_size, tuple(3 * length + 1 for length in image_size)):
        centres = heatmaps.centres(size)
        spread = lattice.spread(heat, centres)
        assert spread.shape == size
        for at in np.ndindex(*size):
            assert spread[at] == nearest_by_loop(heat, lattice, [axis[i] for axis, i in zip(centres, at, strict=True)])
    if kernel_size == patch_size:
        np.testing.assert_array_equal(lattice.spread(heat, heatmaps.centres(image_size)), np.kron(heat, np.ones(patch_size)))


@pytest.mark.parametrize(("size", "spacing"), [((8, 12, 6), (0.0,)), ((8, 12, 6), (2.0, 1.0, 3.0)), ((40, 8, 31), (1.0,))])
def test_places_in_a_file_are_where_preparation_puts_them(size, spacing, tmp_path):
    """A bright block of the stored volume is found in the prepared one, and the other way, resampled, cut off and filled up."""
    values = np.zeros((20, 16, 24, 1), np.float32)
    values[8:12, 6:8, 10:16] = 1
    image = stored.Image(values, spacing=(1.5, 1.0, 2.0))
    how = preparation.Preparation(3, 1, size, spacing, "minmax")
    made = preparation.finished(image, how, tmp_path)[..., 0].astype(float)
    resampled = preparation.target(image, how, tmp_path)
    assert made.shape == size
    middle = [(made.sum(axis=tuple({0, 1, 2} - {axis})) @ np.arange(size[axis])) / made.sum() for axis in range(3)]
    places = heatmaps.in_prepared([np.array([10 / 20]), np.array([7 / 16]), np.array([13 / 24])], resampled, size)
    for place, found, length in zip(places, middle, size, strict=True):
        assert place[0] * length - 0.5 == pytest.approx(found, abs=0.3)
    back = heatmaps.in_file(places, resampled, size)
    np.testing.assert_allclose(np.ravel(back), [10 / 20, 7 / 16, 13 / 24])


def test_what_was_cut_off_has_no_heat():
    lattice = heatmaps.Lattice((4,), (2,), (2,))
    places = heatmaps.in_prepared(heatmaps.centres((8,)), (8,), (4,))
    assert lattice.spread(np.array([1.0, 2.0]), places).tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    places = heatmaps.in_prepared(heatmaps.centres((2,)), (2,), (4,))
    assert lattice.spread(np.array([1.0, 2.0]), places).tolist() == [1, 2]


def test_a_picture_is_the_image_beside_itself_under_blocks_of_colour():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    heat = np.kron([[0.0, 1.0], [2.0, 4.0]], np.ones((4, 4)))
    drawn = np.asarray(Image.open(io.BytesIO(heatmaps.picture(image, heat))).convert("RGB")).astype(int)
    scale = heatmaps.LEAST_PIXELS // 8
    assert drawn.shape == (8 * scale, 16 * scale + heatmaps.GAP, 3)
    left, right = drawn[:, : 8 * scale], drawn[:, 8 * scale + heatmaps.GAP :]
    np.testing.assert_array_equal(left[::scale, ::scale], np.repeat(image, 3, axis=2))
    np.testing.assert_array_equal(right[: 4 * scale, : 4 * scale], left[: 4 * scale, : 4 * scale])  # no heat, no colour
    change = np.abs(right - left).sum(axis=2)[scale // 2 :: scale, scale // 2 :: scale]
    assert change[4:, 4:].min() > change[4:, :4].max() > change[:4, 4:].min() > 0


def test_a_montage_shows_slices_from_the_first_to_the_last_and_turns_what_lies_in_space():
    volume = np.zeros((30, 4, 5, 1), np.uint8)
    volume[:, 0, 0, 0] = np.arange(30) * 8
    scale = math.ceil(heatmaps.LEAST_PIXELS / 2 / 4)
    for radiological, corner in ((False, (0, 0)), (True, (3, 4))):
        drawn = np.asarray(Image.open(io.BytesIO(heatmaps.montage(volume, np.zeros((30, 4, 5)), radiological=radiological))).convert("L"))
        step = (4 * scale + heatmaps.GAP, 5 * scale + heatmaps.GAP)
        marks = [drawn[row * step[0] + corner[0] * scale, column * step[1] + corner[1] * scale] for row in range(3) for column in range(4)]
        assert marks == [8 * round(index * 29 / 11) for index in range(12)]


def test_without_nibabel_volumes_are_refused_with_what_to_install(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *more: real("no_such" if name == "nibabel" else name, *more))
    with pytest.raises(config.InputError, match=r"pip install 'vitmed\[medical\]'"):
        heatmaps.require_nibabel()


def test_heat_of_a_volume_is_written_where_the_volume_lies(tmp_path):
    """A run on volumes; a NIfTI file that is stored flipped, stretched and with its axes exchanged."""
    run = tmp_path / "run"
    small = ["--config.model.variant=vit_micro", "--config.train.epochs=1", "--config.train.batch_size=300", "--config.seeds=0"]
    argv = ["--config=configs/quickstart.py:dataset=phantom3d,patch=14", f"--workdir={run}", *small]
    assert cli.run_cli(main.main, argv) == 0
    rng = np.random.default_rng(0)
    affine = np.array([[0, 0, -2.0, 30], [1.5, 0, 0, -20], [0, 3.0, 0, 7], [0, 0, 0, 1]])
    stored = rng.integers(0, 255, (20, 10, 24), np.uint8)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("one.nii.gz", "deep/one.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(stored, affine), tmp_path / "in" / name)
    argv = [f"--workdir={run}", f"--input={tmp_path / 'in'}", f"--out={tmp_path / 'out.csv'}", "--explain=rollout"]
    assert cli.run_cli(predict.main, argv) == 0
    names = sorted(file.name for file in (tmp_path / "out_heatmaps").iterdir())
    assert names == ["000001_one.nii.gz", "000001_one.png", "000002_one.nii.gz", "000002_one.png"]
    written = nibabel.load(tmp_path / "out_heatmaps" / names[0])
    canonical = nibabel.as_closest_canonical(nibabel.load(tmp_path / "in" / "one.nii.gz"))
    assert written.shape == canonical.shape == (24, 20, 10)
    np.testing.assert_allclose(written.affine, canonical.affine)
    assert nibabel.aff2axcodes(written.affine) == ("R", "A", "S")
    heat = written.get_fdata()
    assert heat.mean() == pytest.approx(1, abs=1e-5)
    ensemble = inference.Ensemble([inference.open_run(run)], batch_size=1, method="rollout")
    prepared = preparation.prepare(tmp_path / "in" / "one.nii.gz", ensemble.hows[0])
    own = ensemble._explainers[0](prepared[None], np.zeros(1, int))[0]
    blocks = np.kron(own.transpose(2, 1, 0) / own.mean(), np.ones((12, 10, 5)))
    np.testing.assert_allclose(heat, blocks, rtol=1e-5)
