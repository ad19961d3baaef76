"""Reading one file: orientation, spacing, rescaling, windows, resampling; and what is said of files that cannot be read."""

import pathlib

import nibabel
import numpy as np
import own_files
import pydicom
import pytest
import tifffile
from skimage import transform

from vitmed import config
from vitmed.data import preparation, stored, volumes

AS_IS = preparation.Preparation(rank=3, num_channels=1, window="0:510")


def read(path, rank=3):
    return volumes.read(pathlib.Path(path), rank)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "LPI", "AIR", "SPL"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_comes_in_ras_whatever_its_orientation(tmp_path, orientation, suffix):
    values = own_files.landmarks()
    own_files.write_nifti(tmp_path / f"a{suffix}", values, orientation=orientation, spacing=(3.0, 2.0, 1.0))
    image = read(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(image.values[..., 0], values)
    assert image.values.dtype == np.int16
    assert image.spacing == (3.0, 2.0, 1.0)
    np.testing.assert_allclose(image.affine, np.diag([1.0, 2.0, 3.0, 1.0]), atol=1e-6)


def test_a_scaled_nifti_comes_in_its_own_units(tmp_path):
    file = nibabel.Nifti1Image(np.tile(np.array([0, 10], np.int16), (2, 2, 1)), np.eye(4))
    file.header.set_slope_inter(2.0, -1000.0)
    nibabel.save(file, tmp_path / "a.nii")
    assert sorted(read(tmp_path / "a.nii").values.ravel().tolist()) == [-1000.0] * 4 + [-980.0] * 4


@pytest.mark.parametrize("order", [None, [4, 2, 0, 3, 1]])
def test_a_dicom_series_is_sorted_by_place_and_comes_in_ras(tmp_path, order):
    values = own_files.landmarks() - 1000
    path = own_files.write_series(tmp_path / "ct", values, order=order, intercept=-1024)
    image = read(path)
    np.testing.assert_array_equal(image.values[..., 0], values)
    assert image.spacing == pytest.approx((2.0, 1.0, 0.5))
    np.testing.assert_allclose(image.affine, np.diag([0.5, 1.0, 2.0, 1.0]), atol=1e-6)


def test_the_same_volume_as_nifti_and_as_dicom_lies_at_the_same_place(tmp_path):
    values = own_files.landmarks()
    own_files.write_nifti(tmp_path / "a.nii", values, spacing=(2.0, 1.0, 0.5), orientation="LAS")
    series, file = read(own_files.write_series(tmp_path / "ct", values)), read(tmp_path / "a.nii")
    np.testing.assert_array_equal(series.values, file.values)
    np.testing.assert_allclose(series.affine, file.affine, atol=1e-6)


def test_dicom_frames_are_slices_in_their_order(tmp_path):
    values = own_files.landmarks().astype(np.uint16)
    own_files.write_dicom(tmp_path / "frames.dcm", values, SliceThickness=4.0)
    image = read(tmp_path / "frames.dcm")
    np.testing.assert_array_equal(image.values[..., 0], values)
    assert image.spacing == (4.0, 1.0, 1.0)


def test_placed_frames_are_turned_as_a_series_is(tmp_path):
    values = own_files.landmarks()
    lps = values[:, ::-1, ::-1].astype(np.uint16)
    own_files.write_dicom(tmp_path / "frames.dcm", lps, position=(-6, -5, 0), SpacingBetweenSlices=2.0)
    np.testing.assert_array_equal(read(tmp_path / "frames.dcm").values[..., 0], values)


def test_frames_of_an_enhanced_file_have_scales_of_their_own(tmp_path):
    def group(slope):
        transformation = pydicom.Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = slope, -1000
        of_frame = pydicom.Dataset()
        of_frame.PixelValueTransformationSequence = [transformation]
        return of_frame

    values = np.full((3, 4, 5), 10, np.uint16)
    own_files.write_dicom(tmp_path / "frames.dcm", values, PerFrameFunctionalGroupsSequence=[group(slope) for slope in (1, 2, 3)])
    assert read(tmp_path / "frames.dcm").values[:, 0, 0, 0].tolist() == [-990, -980, -970]


def test_monochrome1_is_turned_to_dark(tmp_path):
    pixels = np.array([[0, 4000], [100, 7]], np.uint16)  # by what 12 bits can store, whatever is in this image
    own_files.write_dicom(tmp_path / "xray", pixels, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)
    image = read(tmp_path / "xray", rank=2)
    assert image.values[..., 0].tolist() == [[4095, 95], [3995, 4088]]
    assert image.spacing == (1.0, 1.0)
    own_files.write_dicom(tmp_path / "other", pixels, spacing=(0.2, 0.3))
    assert read(tmp_path / "other", rank=2).spacing == (0.2, 0.3)


PLANES = {  # rows and columns of the slices, as directions in the patient (left, posterior, superior)
    "coronal": ([1, 0, 0], [0, 0, -1]),
    "sagittal": ([0, 1, 0], [0, 0, -1]),
    "oblique": ([0.8, 0.6, 0], [0, 0, -1]),
}


@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize("plane", PLANES)
def test_every_voxel_of_slices_in_any_plane_lies_where_the_standard_says(tmp_path, plane, enhanced):
    """PS3.3 C.7.6.2.1.1: a pixel lies at position + column step * row direction + row step * column direction."""
    row, column = (np.array(each, float) for each in PLANES[plane])
    normal, spacing, corner = np.cross(row, column), (0.7, 1.3), np.array([10.0, -20.0, 30.0])
    values = own_files.landmarks((5, 6, 7))
    places = [corner + 2.5 * index * normal for index in range(5)]
    order = [3, 0, 4, 1, 2]
    path = tmp_path / "ct"
    if enhanced:
        frames = []
        for index in order:
            of_frame, place, turn = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
            place.ImagePositionPatient, turn.ImageOrientationPatient = places[index].tolist(), [*row, *column]
            of_frame.PlanePositionSequence, of_frame.PlaneOrientationSequence = [place], [turn]
            frames.append(of_frame)
        own_files.write_dicom(path, values[order].astype(np.uint16), spacing=spacing, PerFrameFunctionalGroupsSequence=frames)
    else:
        path.mkdir()
        for name, index in enumerate(order):
            extra = {"ImagePositionPatient": places[index].tolist(), "ImageOrientationPatient": [*row, *column]}
            own_files.write_dicom(path / f"{name}.dcm", values[index], spacing=spacing, **extra)
    image = read(path)
    for d, h, w in np.ndindex(image.size):
        stored = int(image.values[d, h, w, 0])
        index, y, x = stored // 100, stored // 10 % 10, stored % 10
        expected = places[index] + x * spacing[1] * row + y * spacing[0] * column
        found = image.affine @ [w, h, d, 1]
        np.testing.assert_allclose(found[:3] * [-1, -1, 1], expected, atol=1e-4)
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    steps = nibabel.affines.voxel_sizes(image.affine)[::-1]
    np.testing.assert_allclose(image.spacing, steps)


def test_slices_without_places_are_sorted_by_number(tmp_path):
    values = own_files.landmarks()
    (tmp_path / "ct").mkdir()
    for index in range(5):
        own_files.write_dicom(tmp_path / "ct" / f"{(3 * index) % 5}.dcm", values[index], number=index + 1)
    image = read(tmp_path / "ct")
    np.testing.assert_array_equal(image.values[..., 0], values)
    assert image.spacing is None  # nothing says how far apart they are


def test_a_picture_stored_as_nifti(tmp_path):
    values = own_files.landmarks()[1]
    nibabel.save(nibabel.Nifti1Image(values.T, np.diag([0.5, 2.0, 1.0, 1.0])), tmp_path / "a.nii")
    image = read(tmp_path / "a.nii", rank=2)
    np.testing.assert_array_equal(image.values[..., 0], values)
    assert image.spacing == (2.0, 0.5)


def test_spacing_is_that_of_the_affine_in_millimetres(tmp_path):
    file = nibabel.Nifti1Image(own_files.landmarks(), np.diag([2000.0, 1000.0, 500.0, 1.0]))
    file.header.set_xyzt_units("micron")
    nibabel.save(file, tmp_path / "a.nii")
    assert read(tmp_path / "a.nii").spacing == (0.5, 1.0, 2.0)


def test_white_as_zero_and_palettes_of_tiff(tmp_path):
    values = np.array([[0, 10], [200, 255]], np.uint8)
    tifffile.imwrite(tmp_path / "w.tif", values, photometric="miniswhite")
    assert read(tmp_path / "w.tif", rank=2).values[..., 0].tolist() == [[255, 245], [55, 0]]
    colours = np.zeros((3, 256), np.uint16)
    colours[0] = np.arange(256) * 256
    tifffile.imwrite(tmp_path / "p.tif", values, photometric="palette", colormap=colours)
    np.testing.assert_array_equal(read(tmp_path / "p.tif", rank=2).values, np.stack([values, 0 * values, 0 * values], axis=-1))
    assert [volumes.num_channels(tmp_path / name) for name in ("w.tif", "p.tif")] == [1, 3]


def test_pictures(tmp_path):
    gray, colour = np.arange(12, dtype=np.uint8).reshape(3, 4), np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    deep = (gray.astype(np.uint16) + 1) * 1000
    for name, values in {"g.png": gray, "c.png": colour, "d.png": deep, "g.tif": gray, "d.tiff": deep, "c.tif": colour}.items():
        own_files.write_picture(tmp_path / name, values)
        np.testing.assert_array_equal(read(tmp_path / name, rank=2).values.squeeze(), values, err_msg=name)
    assert volumes.num_channels(tmp_path / "c.png") == 3
    assert volumes.num_channels(tmp_path / "d.png") == 1


def test_the_pages_of_a_tiff_are_slices(tmp_path):
    values = own_files.landmarks().astype(np.uint16)
    tifffile.imwrite(tmp_path / "stack.tif", values)
    np.testing.assert_array_equal(read(tmp_path / "stack.tif").values[..., 0], values)


def broken(tmp_path, kind):
    path = tmp_path / {"nifti": "a.nii.gz", "png": "a.png", "dicom": "a.dcm", "text": "a.nii", "tiff": "a.tif"}[kind]
    if kind == "nifti":
        own_files.write_nifti(path, own_files.landmarks((20, 20, 20)))
    elif kind in ("png", "tiff"):
        own_files.write_picture(path, np.random.default_rng(0).integers(0, 255, (50, 50), np.uint8))
    elif kind == "dicom":
        own_files.write_dicom(path, np.ones((20, 20), np.uint16))
    else:
        path.write_text("not an image")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if kind != "text" else data)
    return path


@pytest.mark.parametrize("kind", ["nifti", "png", "dicom", "text", "tiff"])
def test_a_broken_file_is_named(tmp_path, kind):
    path = broken(tmp_path, kind)
    with pytest.raises(stored.Unreadable) as raised:
        read(path, rank=2 if kind in ("png", "dicom", "tiff") else 3)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def four_d(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 3, 3, 4), np.int16), np.eye(4)), tmp_path / "a.nii")
    return tmp_path / "a.nii"


def gap(tmp_path):
    path = own_files.write_series(tmp_path / "ct", own_files.landmarks())
    (path / "002.dcm").unlink()
    return path


def two_series(tmp_path):
    path = own_files.write_series(tmp_path / "ct", own_files.landmarks())
    own_files.write_dicom(path / "other.dcm", np.zeros((6, 7), np.int16), series="9.9", position=(0, 0, 99))
    return path


def twice(tmp_path):
    path = own_files.write_series(tmp_path / "ct", own_files.landmarks())
    own_files.write_dicom(path / "phase2.dcm", np.zeros((6, 7), np.int16), position=(-3, -5, 2.0), spacing=(1.0, 0.5))
    return path


def unplaced(tmp_path):
    path = own_files.write_series(tmp_path / "ct", own_files.landmarks())
    header = pydicom.dcmread(path / "003.dcm")
    del header.ImagePositionPatient
    header.save_as(path / "003.dcm")
    return path


def shifted(tmp_path):
    path = own_files.write_series(tmp_path / "ct", own_files.landmarks())
    for index in range(5):
        header = pydicom.dcmread(path / f"{index:03d}.dcm")
        header.ImagePositionPatient = [-3, -5 + 3 * index, 2.0 * index]
        header.save_as(path / f"{index:03d}.dcm")
    return path


def lost(tmp_path):
    path = own_files.write_series(tmp_path / "ct", own_files.landmarks())
    for file in list(path.iterdir()):
        file.rename(file.with_suffix(""))
    (path / "004").write_bytes(b"")
    return path


def dangling(tmp_path):
    path = own_files.write_series(tmp_path / "ct", own_files.landmarks())
    (path / "004.dcm").unlink()
    (path / "004.dcm").symlink_to("nothing")
    return path


def one_slice(tmp_path):
    own_files.write_dicom(tmp_path / "a.dcm", np.zeros((6, 7), np.int16))
    return tmp_path / "a.dcm"


def flat(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((6, 7, 1), np.int16), np.eye(4)), tmp_path / "a.nii")
    return tmp_path / "a.nii"


def flat_from_the_side(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((1, 6, 7), np.int16), np.eye(4)), tmp_path / "a.nii")
    return tmp_path / "a.nii"


def several_shapes(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(np.zeros((4, 5), np.uint8))
        file.write(np.zeros((6, 5), np.uint8))
    return tmp_path / "a.tif"


def tilted(tmp_path):
    path = own_files.write_series(tmp_path / "ct", own_files.landmarks())
    header = pydicom.dcmread(path / "004.dcm")
    header.ImageOrientationPatient = [1, 0, 0, 0, 0, 1]
    header.save_as(path / "004.dcm")
    return path


def picture(tmp_path):
    own_files.write_picture(tmp_path / "a.png", np.zeros((3, 3), np.uint8))
    return tmp_path / "a.png"


def infinite(tmp_path):
    own_files.write_nifti(tmp_path / "a.nii", np.full((2, 2, 2), np.nan, np.float32))
    return tmp_path / "a.nii"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (four_d, "4D"),
        (gap, "slices are missing"),
        (two_series, "2 DICOM series"),
        (twice, "at one place"),
        (tilted, "different planes"),
        (unplaced, "1 of its 5 slices do not say where they lie"),
        (shifted, "shifted against each other"),
        (lost, "004 is no DICOM file"),
        (dangling, "cannot be read .No such file"),
        (one_slice, "a single slice"),
        (flat, "is a single slice, no volume; give all slices, or use configs/vit2d.py$"),
        (flat_from_the_side, "is a single slice, no volume; give all slices$"),  # no picture either: only a last axis of one is left out
        (several_shapes, "several shapes"),
        (picture, "configs/vit2d.py"),
        (infinite, "NaN"),
    ],
)
def test_what_is_no_volume_is_named_with_the_reason(tmp_path, make, says):
    path = make(tmp_path)
    with pytest.raises(stored.Unreadable, match=says) as raised:
        read(path)
    assert str(path) in str(raised.value)


def test_a_mask_must_lie_where_the_image_lies(tmp_path):
    own_files.write_nifti(tmp_path / "image.nii", own_files.landmarks(), orientation="LPS")
    image = read(tmp_path / "image.nii")
    drawn = (own_files.landmarks() % 10 < 3).astype(np.uint8)
    own_files.write_nifti(tmp_path / "mask.nii", drawn)  # turned otherwise in its file, and the same in space
    inside, any_drawn = preparation.mask(tmp_path / "mask.nii", image, AS_IS)
    np.testing.assert_array_equal(inside, drawn.astype(bool))
    assert any_drawn
    own_files.write_nifti(tmp_path / "far.nii", drawn, spacing=(1, 1, 3))
    tifffile.imwrite(tmp_path / "mask.tif", drawn)
    for name, says in (("far.nii", "does not lie where"), ("mask.tif", "only one says where")):
        with pytest.raises(stored.Unreadable, match=says):
            preparation.mask(tmp_path / name, image, AS_IS)


# --- preparation ----------------------------------------------------------------------------------------------------------------


def image(values, spacing=None):
    return stored.Image(np.asarray(values)[..., None], spacing=spacing)


def prepared(made, path=pathlib.Path("file"), **how):
    return preparation.finished(made, preparation.Preparation(**{"rank": made.values.ndim - 1, "num_channels": 1, **how}), path)


def test_8_bit_images_stay_as_they_are():
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(prepared(image(values))[..., 0], values)


@pytest.mark.parametrize(
    ("window", "low", "high"), [("lung", -1350, 150), ("brain", 0, 80), ("-100.5:50", -100.5, 50), ("minmax", -2000, 3000)]
)
def test_a_window_maps_its_bounds_to_0_and_255(window, low, high):
    values = np.array([[-2000.0, low, (low + high) / 2], [high, 3000.0, (3 * low + high) / 4]], np.float32)
    expected = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
    np.testing.assert_array_equal(prepared(image(values), window=window)[..., 0], expected)


def test_percentile_and_zscore():
    values = np.random.default_rng(0).normal(50, 7, (40, 50))
    low, high = np.percentile(values, [0.5, 99.5])
    for window, (a, b) in {"percentile": (low, high), "auto": (low, high), "zscore": (50 - 21, 50 + 21)}.items():
        expected = np.clip((values - a) / (b - a), 0, 1) * 255
        np.testing.assert_allclose(prepared(image(values), window=window)[..., 0], expected, atol=2.0 if window == "zscore" else 0.6)
    assert not prepared(image(np.full((4, 4), 7, np.int16))).any()  # one value everywhere


def test_shrinking_is_antialiased_and_keeps_the_mean():
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = prepared(image(checks), size=(8,))
    assert small.shape == (8, 8, 1)
    np.testing.assert_allclose(small, 127.5, atol=5)  # without antialiasing: 0 or 255


def test_resizing_is_scikit_images():
    values = np.random.default_rng(0).random((9, 20, 7, 1), np.float32)
    for size in ((9, 20, 7), (3, 7, 7), (12, 5, 21)):
        reference = transform.resize(values, (*size, 1), order=1, mode="edge", anti_aliasing=True)
        np.testing.assert_allclose(preparation.resized(values, size), reference, atol=1e-5)


def test_a_spacing_makes_voxels_of_that_size_and_then_the_shape():
    ball = np.zeros((20, 40, 40), np.uint8)
    ball[5:15, 10:30, 10:30] = 255  # 20 mm along each axis
    made = prepared(image(ball, spacing=(2.0, 1.0, 1.0)), size=(10, 12, 30), spacing=(2.0,))
    inside = made[..., 0] > 127
    assert made.shape == (10, 12, 30, 1)
    assert [int(inside.any(axis=axes).sum()) for axes in ((1, 2), (0, 2), (0, 1))] == [10, 10, 10]
    assert inside[:, 1:11, 10:20].all()  # in the middle, filled up with 0


def test_what_has_no_spacing_cannot_be_brought_to_one():
    with pytest.raises(stored.Unreadable, match=r"its spacing.*data\.spacing"):
        prepared(image(np.zeros((4, 4), np.uint8)), spacing=(1.0,))


def test_channels():
    gray, colours = np.full((2, 2, 1), 5, np.uint8), np.array([[[1, 2, 3]]], np.uint8)
    assert preparation.in_channels(gray, 3, pathlib.Path("a")).shape == (2, 2, 3)
    assert preparation.in_channels(np.repeat(gray, 3, -1), 1, pathlib.Path("a")).shape == (2, 2, 1)
    with pytest.raises(stored.Unreadable, match="a: a colour image"):
        preparation.in_channels(colours, 1, pathlib.Path("a"))


@pytest.mark.parametrize("window", ["lungs", "3:1", "1:nan", "", "1:2:3", "x:2", "1.2.3:4", ".:5"])
def test_windows_that_are_none(window):
    with pytest.raises(config.InputError, match=r"data\.window="):
        preparation.check_window(window)
