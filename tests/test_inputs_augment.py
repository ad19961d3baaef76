"""What the network sees: bytes to floats, and augmentation measured from outside against numpy, scipy and torchvision's algorithm.

Geometry is read off images that hold their own coordinates: bilinear interpolation is exact on them, so each output pixel says where it
was taken from.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from vitmed.models import inputs
from vitmed.training import augment

Augmentation = augment.Augmentation
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # a sixth of the time to compile
COORDINATE_SCALE = 1 / 128  # a power of two keeps the coordinates exact in [0, 1]


@functools.cache
def program(augmentation):
    return jax.jit(lambda key, images: augment.apply(key, images, augmentation), compiler_options=QUICK)


def augmented(images, *, seed=0, **augmentation):
    return np.asarray(program(Augmentation(**augmentation))(jax.random.key(seed), jnp.asarray(images, jnp.float32)))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def where_from(size, *, batch, seed=0, **augmentation):
    """For every output pixel the row and column it shows, in pixels, whether it is inside, and what of `noise`: [4, batch, H, W]."""
    rows, columns = np.meshgrid(*map(np.arange, size), indexing="ij")
    image = np.stack([rows * COORDINATE_SCALE, columns * COORDINATE_SCALE, np.ones(size), noise(*size)], axis=-1)
    seen = augmented(np.tile(image, (batch, 1, 1, 1)), seed=seed, **augmentation).astype(np.float64)
    return np.moveaxis(seen, -1, 0) / np.array([COORDINATE_SCALE, COORDINATE_SCALE, 1, 1]).reshape(4, 1, 1, 1)


def crops(size, *, batch, seed=0, **augmentation):
    """Top, left, height and width of each crop, from the corners of what is shown: [batch, 4]."""
    H, W = size
    rows, columns, inside, _ = where_from(size, batch=batch, seed=seed, **augmentation)
    assert np.all(inside > 0.5)
    # Far from the edge, where nothing is clamped, neighbours are h / H apart, and the pixel i shows top + (i + .5) h / H - .5.
    h, w = (rows[:, H // 2 + 1, 0] - rows[:, H // 2, 0]) * H, (columns[:, 0, W // 2 + 1] - columns[:, 0, W // 2]) * W
    top, left = rows[:, H // 2, 0] + 0.5 - (H // 2 + 0.5) * h / H, columns[:, 0, W // 2] + 0.5 - (W // 2 + 0.5) * w / W
    found = np.stack([top, left, h, w], axis=1)
    np.testing.assert_allclose(found, found.round(), atol=2e-3)  # whole pixels
    return found.round().astype(int)


def torchvision_crop(rng, size, scale, ratio):
    """RandomResizedCrop.get_params of torchvision in numpy; its central fallback is the whole image where the ratio allows."""
    H, W = size
    for _ in range(10):
        area = H * W * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= W and 0 < h <= H:
            return rng.integers(0, H - h + 1), rng.integers(0, W - w + 1), h, w
    assert ratio[0] <= W / H <= ratio[1]
    return 0, 0, H, W


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,)), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))])
@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_become_normalised_floats_and_gray_is_copied(channels, mean, std):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, channels), np.uint8)
    images[0, 0, :2] = [[0], [255]]
    expected = (np.broadcast_to(images / 255, (2, 4, 5, 3)) - mean) / std
    got = inputs.prepare(jnp.asarray(images), in_channels=3, mean=mean, std=std)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(56, 112), (14, 9), (28, 28)])
def test_images_are_resized_as_pillow_does_and_stay_within_bounds(size):
    images = np.random.default_rng(0).integers(0, 2, (2, 28, 28, 1), np.uint8) * np.uint8(255)  # overshoots nearly everywhere
    got = np.asarray(inputs.prepare(jnp.asarray(images), in_channels=3, mean=(0.0,), std=(1.0,), image_size=size))
    for image, seen in zip(images, got, strict=True):
        theirs = Image.fromarray(image[..., 0] / np.float32(255)).resize(size[::-1], Image.Resampling.BICUBIC)
        np.testing.assert_allclose(seen, np.repeat(np.clip(theirs, 0, 1)[..., None], 3, axis=-1), atol=1e-5)
    if size != (14, 9):  # where smaller, antialiasing leaves nothing to clip
        assert (got.min(), got.max()) == (0, 1)


def test_volumes_are_resized_along_every_axis():
    ramp = np.broadcast_to(np.arange(0, 240, 30, dtype=np.uint8)[:, None, None], (8, 4, 6))
    for axis in range(3):
        volume = np.moveaxis(ramp, 0, axis)[None, ..., None]
        size = tuple(2 * pixels for pixels in volume.shape[1:-1])
        seen = inputs.prepare(jnp.asarray(volume), in_channels=1, mean=(0.0,), std=(1 / 255,), image_size=size)
        line = np.moveaxis(np.asarray(seen)[0, ..., 0], axis, 0)
        np.testing.assert_allclose(line, np.broadcast_to(line[:, :1, :1], line.shape), atol=1e-3)
        np.testing.assert_allclose(line[4:-4, 0, 0], 15 * np.arange(4, 12) - 7.5, atol=1e-3)  # cubics keep a ramp


def test_augmentation_sees_images_as_they_are_stored():
    shapes = []

    def note(values):
        shapes.append(values.shape)
        return 1 - values

    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 4, 6, 1), np.uint8))
    how = {"in_channels": 3, "mean": (0.5,), "std": (0.5,), "image_size": (8, 12)}
    got = inputs.prepare(images, augment=note, **how)
    assert shapes == [(2, 4, 6, 1)]
    np.testing.assert_allclose(got, -inputs.prepare(images, **how), atol=1e-5)


def test_augmentation_sees_values_in_0_1_before_gray_is_copied():
    images, seen = np.array([0, 51, 255], np.uint8).reshape(1, 1, 3, 1), []
    prepared = inputs.prepare(
        jnp.asarray(images), in_channels=3, mean=(0.5,), std=(0.5,), augment=lambda values: seen.append(values) or 1 - values
    )
    np.testing.assert_allclose(seen[0], images / 255, atol=1e-7)
    np.testing.assert_allclose(prepared, np.tile([[[[1.0], [0.6], [-1.0]]]], 3), atol=1e-6)


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_do_not_fit_are_refused(channels):
    with pytest.raises(ValueError, match=f"{channels} channels.* 3"):
        inputs.prepare(np.zeros((1, 2, 2, channels), np.uint8), in_channels=3, mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize("shape", [(3, 6, 8, 1), (2, 3, 6, 6, 3)])
def test_all_off_changes_nothing(shape):
    np.testing.assert_array_equal(augmented(noise(*shape)), noise(*shape))


ALL_ON = {"crop_scale": (0.6, 1.0), "rotation_degrees": 15.0, "flip_w": 0.5, "quarter_turns": True, "brightness": 0.2, "contrast": 0.2}


PARTS = [ALL_ON, {"crop_scale": (0.6, 1.0)}, {"rotation_degrees": 15.0}, {"flip_w": 0.5}, {"quarter_turns": True}, {"brightness": 0.2}]


@pytest.mark.parametrize("options", PARTS, ids="-".join)
def test_each_example_has_its_own_draw_and_a_key_decides_it(options):
    images = np.tile(noise(1, 9, 9, 1), (12, 1, 1, 1))
    once, again, other = augmented(images, **options), augmented(images, **options), augmented(images, seed=1, **options)
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)
    assert len(np.unique(once.reshape(12, -1), axis=0)) >= (2 if options.keys() == {"flip_w"} else 4)


def dihedral(image):
    """The eight symmetries of the square: np.rot90 of the image (0 to 3) and of its mirror (4 to 7)."""
    return [np.rot90(mirrored, turns) for mirrored in (image, np.flipud(image)) for turns in range(4)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"flip_h": 0.5, "flip_w": 0.5, "quarter_turns": True}, [1 / 8] * 8),
        ({"flip_h": 1.0, "quarter_turns": True}, [0] * 4 + [1 / 4] * 4),
        ({"flip_h": 0.3, "quarter_turns": True}, [0.7 / 4] * 4 + [0.3 / 4] * 4),
        ({"flip_w": 0.3}, [0.7, 0, 0, 0, 0, 0, 0.3, 0]),  # left and right exchanged: upside down, turned by 180 degrees
        ({"flip_h": 0.5, "flip_w": 0.2}, [0.4, 0, 0.1, 0, 0.4, 0, 0.1, 0]),
    ],
)
def test_flips_and_quarter_turns_realise_the_symmetries_of_the_square_as_often_as_they_should(options, expected):
    images = noise(4000, 3, 3, 2)
    out = augmented(images, **options)
    symmetries = np.stack([np.stack(dihedral(image)) for image in images])
    matches = (symmetries == out[:, None]).all(axis=(2, 3, 4))
    assert np.all(matches.sum(axis=1) == 1)  # every output is exactly one of them: values move and do not change
    counts, expected = matches.sum(axis=0), np.asarray(expected) * len(images)
    assert not counts[expected == 0].any()
    assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_a_volume_has_one_draw_for_all_slices_which_is_the_images_draw():
    volumes, options = noise(5, 4, 9, 9, 1), ALL_ON | {"contrast": 0.0, "flip_h": 0.5}
    out = augmented(volumes, **options)
    for depth in range(4):
        np.testing.assert_allclose(out[:, depth], augmented(volumes[:, depth], **options), atol=1e-6)


def test_contrast_of_a_volume_is_about_the_mean_of_the_whole_volume():
    volumes = noise(3, 4, 6, 6, 1) * 0.2 + np.linspace(0.2, 0.6, 4, dtype=np.float32).reshape(4, 1, 1, 1)
    out = augmented(volumes, contrast=0.2)
    factor = (out - out.mean((1, 2, 3, 4), keepdims=True)) / (volumes - volumes.mean((1, 2, 3, 4), keepdims=True))
    np.testing.assert_allclose(factor, np.broadcast_to(np.median(factor, (1, 2, 3, 4), keepdims=True), factor.shape), rtol=1e-2)
    np.testing.assert_allclose(out.mean((1, 2, 3, 4)), volumes.mean((1, 2, 3, 4)), rtol=1e-5)


# (size, scale, ratio): the study's, one that mostly falls back to the whole image, and one that is not square.
CROPS = [
    ((28, 28), (0.8, 1.0), (3 / 4, 4 / 3)),
    ((20, 20), (0.97, 1.0), (0.4, 2.5)),
    ((24, 32), (0.3, 1.0), (0.6, 2.5)),
]


@pytest.mark.parametrize(("size", "scale", "ratio"), CROPS)
def test_crops_are_distributed_as_torchvisions(size, scale, ratio):
    ours = crops(size, batch=3000, crop_scale=scale, crop_ratio=ratio)
    rng = np.random.default_rng(0)
    theirs = np.array([torchvision_crop(rng, size, scale, ratio) for _ in range(12000)])
    top, left, h, w = ours.T
    assert np.all((top >= 0) & (left >= 0) & (h > 0) & (w > 0) & (top + h <= size[0]) & (left + w <= size[1]))
    fitted = (h < size[0]) | (w < size[1])
    area, half = h * w, (h + w) / 2 + 0.25  # each side is rounded by at most a half
    assert np.all(area[fitted] >= scale[0] * size[0] * size[1] - half[fitted])
    assert np.all(area[fitted] <= scale[1] * size[0] * size[1] + half[fitted])
    assert np.all(((w + 0.5) / (h - 0.5))[fitted] >= ratio[0])
    assert np.all(((w - 0.5) / (h + 0.5))[fitted] <= ratio[1])
    for of in (
        lambda c: c[:, 0],
        lambda c: c[:, 1],
        lambda c: c[:, 2],
        lambda c: c[:, 3],
        lambda c: c[:, 2] * c[:, 3],
        lambda c: c[:, 2] / c[:, 3],
    ):
        assert stats.ks_2samp(of(ours), of(theirs)).pvalue > 1e-3
    table = np.array([np.bincount(np.minimum(c[:, 0], 3) * 4 + np.minimum(c[:, 1], 3), minlength=16) for c in (ours, theirs)])
    assert stats.chi2_contingency(table[:, table.sum(0) > 20]).pvalue > 1e-3  # top and left together


def test_a_crop_of_everything_shows_the_image():
    images = noise(5, 12, 12, 3)
    np.testing.assert_allclose(augmented(images, crop_scale=(0.999999, 1.0)), images, atol=1e-5)


@pytest.mark.parametrize("size", [(28, 29), (12, 20)])
def test_rotation_alone_crops_nothing(size):
    rows, columns, inside, _ = where_from(size, batch=40, rotation_degrees=1e-4)
    assert np.all(inside[:, 1:-1, 1:-1] > 0.5)
    expected = np.broadcast_to(np.meshgrid(*map(np.arange, size), indexing="ij"), (40, 2, *size)).swapaxes(0, 1)
    np.testing.assert_allclose(np.stack([rows, columns])[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=5e-3)


def turned(size, angle):
    """Where each pixel of the output lies in the image before the rotation, in pixels from its upper left corner: in matrices."""
    centre = np.array(size) / 2
    pixels = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in size), indexing="ij"), axis=-1) - centre
    return pixels @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]).T + centre


@pytest.mark.parametrize(("size", "limit"), [pytest.param((16, 16), 180.0, marks=pytest.mark.slow), ((14, 22), 40.0)])
def test_rotation_shows_the_nearest_pixel_about_the_centre_as_pillow_does(size, limit):
    batch = 60
    rows, columns, inside, shown = where_from(size, batch=batch, rotation_degrees=limit)
    picture, angles = Image.fromarray(noise(*size)), []
    for index in range(batch):
        seen, there = inside[index] > 0.5, np.stack([rows[index], columns[index]], axis=-1)
        np.testing.assert_allclose(there[seen], np.round(there[seen]), atol=2e-3)
        # The angle that explains most pixels, from that of the best affine map on.
        offset = np.stack(np.meshgrid(*(np.arange(n) + 0.5 - n / 2 for n in size), indexing="ij"), axis=-1)
        (a, b), (c, d) = np.linalg.lstsq(offset[seen], there[seen] + 0.5 - np.array(size) / 2, rcond=None)[0].T
        near = math.atan2(b - c, a + d) + np.linspace(-0.08, 0.08, 1601)
        angle = max(near, key=lambda angle: np.sum(np.floor(turned(size, angle))[seen] == np.round(there)[seen]))
        true = turned(size, angle)
        clear = np.min(np.abs(true - np.round(true)), axis=-1) > 0.06  # not near the edge of a pixel: the angle is known to about .005
        np.testing.assert_array_equal(np.floor(true)[seen & clear], np.round(there)[seen & clear])
        np.testing.assert_array_equal(seen[clear], ((true >= 0) & (true < size)).all(-1)[clear])
        theirs = np.asarray(picture.rotate(math.degrees(angle), Image.Resampling.NEAREST))
        assert np.mean(np.abs(theirs - shown[index])[clear] < 2e-3) > 0.99
        angles.append(math.degrees(angle))
    assert stats.kstest(angles, stats.uniform(-limit, 2 * limit).cdf).pvalue > 1e-3


def test_a_crop_is_stretched_bilinearly_and_then_rotated():
    size, crop, rotation = (14, 22), {"crop_scale": (0.5, 0.9), "crop_ratio": (0.5, 2.0)}, {"rotation_degrees": 40.0}
    rows, columns, inside, _ = where_from(size, batch=60, **rotation)
    *_, cropped = where_from(size, batch=60, **crop)
    *_, both = where_from(size, batch=60, **crop, **rotation)
    for index in range(60):
        seen = inside[index] > 0.5
        nearest = tuple(np.round(np.stack([rows[index], columns[index]])).astype(int)[:, seen])
        np.testing.assert_allclose(both[index][seen], cropped[index][nearest], atol=1e-5)
        assert not np.any(both[index][~seen])


def test_brightness_is_one_uniform_factor_per_image_clipped_at_white():
    images = noise(2000, 4, 4, 3) * 0.5 + 0.01
    images[:, 0, 0] = 0.9
    out = augmented(images, brightness=0.4)
    factors = np.median(out / images, axis=(1, 2, 3))
    np.testing.assert_allclose(out, np.minimum(images * factors[:, None, None, None], 1), atol=1e-5)
    assert out.max() == 1
    assert stats.kstest(factors, stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_is_one_uniform_factor_about_the_mean_of_the_gray_image_clipped_at_both_ends(channels):
    images = noise(2000, 4, 4, channels) * 0.2 + np.array([0.3, 0.45, 0.6], np.float32)[:channels]
    images[:, 0, 0], images[:, 0, 1] = 0.0, 1.0
    gray = (images @ [0.2989, 0.587, 0.114] if channels == 3 else images).reshape(2000, -1).mean(axis=1)
    out = augmented(images, contrast=0.3)
    middle, shown = (x[:, 1:].reshape(2000, -1) for x in (images, out))  # away from the extremes nothing is clipped
    factors = (shown.max(1) - shown.min(1)) / (middle.max(1) - middle.min(1))
    factors, gray = (x[:, None, None, None] for x in (factors, gray))
    np.testing.assert_allclose(out, np.clip(gray + (images - gray) * factors, 0, 1), atol=1e-4)
    assert (out.min(), out.max()) == (0, 1)
    assert stats.kstest(factors.ravel(), stats.uniform(0.7, 0.6).cdf).pvalue > 1e-3


def test_brightness_and_contrast_come_in_either_order():
    # A white pixel in a dark image is clipped by the brightness at once or only after the contrast: where factors are known from
    # the dark pixels up to one, only one order explains the whole image.
    image = np.array([0.2, 0.3, 0.35, 0.4, 0.45, 1.0])
    out = augmented(np.tile(image.reshape(1, 2, 3, 1), (300, 1, 1, 1)), brightness=0.4, contrast=0.4).reshape(300, -1)
    slopes = (out[:, 4] - out[:, 1]) / (image[4] - image[1])
    brightness = np.linspace(0.6, 1.4, 1601)[None, :, None]
    contrast = slopes[:, None, None] / brightness

    def brighten(x):
        return np.clip(x * brightness, 0, 1)

    def stretch(x):
        mean = x.mean(-1, keepdims=True)
        return np.clip(mean + (x - mean) * contrast, 0, 1)

    x = np.broadcast_to(image, (300, 1601, 6))
    first, second = (np.abs(y - out[:, None]).max(-1).min(-1) for y in (stretch(brighten(x)), brighten(stretch(x))))
    assert np.all(np.minimum(first, second) < 1e-3)
    decided = np.maximum(first, second) > 5e-3
    assert decided.sum() > 50
    assert 0.3 < (first < second)[decided].mean() < 0.7
