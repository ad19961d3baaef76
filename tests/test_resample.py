"""Resizing of kernels and positions against Pillow, against what a resize is for, and 2D against 3D."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from vitmed import config
from vitmed.models import resample

SIZES = [(16, 7), (16, 28), (14, 5), (5, 14), (7, 1), (1, 7), (16, 16), (3, 40), (40, 3)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_the_resize_matrix_is_pillows_bicubic(old, new):
    image = normal(old, old).astype(np.float32)
    theirs = np.asarray(Image.fromarray(image).resize((new, new), Image.Resampling.BICUBIC))
    matrix = resample.resize_matrix(old, new)
    np.testing.assert_allclose(matrix @ image @ matrix.T, theirs, atol=2e-5)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((4, 6), (9, 8)), ((2, 3, 4), (4, 3, 9))])
def test_a_kernel_made_larger_answers_resized_patches_as_before(old, new):
    """FlexiViT's defining property, exact where nothing is lost: <new kernel, resized patch> = <kernel, patch>."""
    kernel, patches = normal(*old, 3, 5), normal(10, *old, 3, seed=1)
    resized = patches
    for axis, (a, b) in enumerate(zip(old, new, strict=True), start=1):
        resized = np.moveaxis(np.tensordot(resample.resize_matrix(a, b), resized, axes=(1, axis)), 0, axis)
    answer = np.einsum("npc,pcd->nd", patches.reshape(10, -1, 3), kernel.reshape(-1, 3, 5))
    new_kernel = resample.resize_kernel(kernel, new)
    assert new_kernel.shape == (*new, 3, 5)
    np.testing.assert_allclose(np.einsum("npc,pcd->nd", resized.reshape(10, -1, 3), new_kernel.reshape(-1, 3, 5)), answer, atol=1e-9)


def test_a_kernel_made_smaller_is_the_least_squares_answer():
    """Of all kernels of that size it answers best, over all patches, what the old one answered."""
    kernel, matrix = normal(8, 1, 1), resample.resize_matrix(8, 3)
    best = np.linalg.lstsq(matrix.T, kernel[:, 0, 0], rcond=None)[0]
    np.testing.assert_allclose(resample.resize_kernel(kernel, (3,))[:, 0, 0], best, atol=1e-12)


def linear(line, new):
    """PyTorch's interpolate(mode="linear", align_corners=False), from its definition: half-pixel centres, edges repeated."""
    old, values = len(line), []
    for pixel in range(new):
        place = max((pixel + 0.5) * old / new - 0.5, 0.0)
        low = int(place)
        high = min(low + 1, old - 1)
        values.append(line[low] + (place - low) * (line[high] - line[low]))
    return np.array(values)


@pytest.mark.parametrize(("old", "new"), [*SIZES, (14, 28), (14, 4), (1, 1)])
def test_the_linear_matrix_is_pytorchs(old, new):
    line = normal(old)
    np.testing.assert_allclose(resample.linear_matrix(old, new) @ line, linear(line, new), atol=1e-12)
    places = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    np.testing.assert_allclose(resample.linear_matrix(old, new) @ line, ndimage.map_coordinates(line, [places], order=1), atol=1e-12)


@pytest.mark.parametrize(("old", "grid"), [((6, 6), (4, 9)), ((6, 6), (3, 4, 9)), ((2, 6, 6), (3, 4, 9)), ((2, 6, 6), (4, 9))])
def test_cut_positions_are_interpolated_linearly_and_copied_along_depth(old, grid):
    table = normal(*old, 5)
    got = resample.positions(table, grid=grid, depth_positions="copy", position_resize="cut")
    if len(old) < len(grid):
        table = np.repeat(table[None], grid[0], axis=0)
    if len(old) > len(grid):
        table = table.mean(axis=0)
    places = [np.clip((np.arange(n) + 0.5) * o / n - 0.5, 0, o - 1) for o, n in zip(table.shape[:-1], grid, strict=True)]
    where = np.meshgrid(*places, indexing="ij")
    expected = np.stack([ndimage.map_coordinates(table[..., d], where, order=1) for d in range(5)], axis=-1)
    np.testing.assert_allclose(got, expected.reshape(-1, 5), atol=1e-6)
    assert got.dtype == np.float32
    antialiased = resample.positions(normal(*old, 5), grid=grid, depth_positions="copy")
    assert np.abs(got - antialiased).max() > 0.05


def test_the_grid_before_the_cut():
    assert resample.uncut_grid((28,) * 3, (4,) * 3) == (7, 7, 7)
    assert resample.uncut_grid((28,) * 3, (4,) * 3, (4, 16, 16)) == (7, 7, 7)
    assert resample.uncut_grid((28, 30), (5, 7), (8, 8)) == (5, 4)
    for patch, kernel in (((28, 28), (1, 1)), ((56, 56), (16, 16))):
        with pytest.raises(config.InputError, match=r"position_resize=cut: .* take bicubic"):
            resample.uncut_grid((30, 30), patch, kernel)


def test_the_same_size_changes_nothing():
    kernel, table = normal(4, 4, 3, 5), normal(3, 3, 5)
    assert resample.resize_kernel(kernel, (4, 4)) is kernel
    assert resample.resize_positions(table, (3, 3)) is table


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_an_averaged_kernel_answers_equal_slices_as_the_2d_kernel_answers_one(depth):
    kernel, patch = normal(4, 4, 3, 5), normal(4, 4, 3, seed=1)
    inflated = resample.inflate_kernel(kernel, depth, "average")
    volume = np.broadcast_to(patch, (depth, *patch.shape))
    np.testing.assert_allclose(np.einsum("zyxc,zyxcd->d", volume, inflated), np.einsum("yxc,yxcd->d", patch, kernel))
    np.testing.assert_allclose(resample.flatten_kernel(inflated), kernel)


@pytest.mark.parametrize(("depth", "middle"), [(1, 0), (2, 1), (7, 3)])
def test_a_centered_kernel_sees_the_middle_slice_alone(depth, middle):
    kernel = normal(4, 4, 3, 5)
    inflated = resample.inflate_kernel(kernel, depth, "center")
    np.testing.assert_array_equal(inflated[middle], kernel)
    assert not np.delete(inflated, middle, axis=0).any()


def test_positions_are_copied_to_every_depth_or_told_apart():
    table = normal(3, 4, 8)
    copied = resample.inflate_positions(table, 5, "copy")
    assert (copied == table).all()
    np.testing.assert_allclose(resample.flatten_positions(copied), table)
    added = resample.inflate_positions(table, 5, "sincos") - table
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], added.shape), atol=1e-12)  # a function of the depth alone
    assert len(np.unique(added[:, 0, 0].round(9), axis=0)) == 5
    spread = np.sqrt(np.mean((table - table.mean(axis=(0, 1))) ** 2))
    assert np.sqrt(np.mean(added**2)) == pytest.approx(spread)


def test_the_sincos_code_is_vaswanis():
    code = resample.depth_sincos(6, 8)
    np.testing.assert_allclose(code[3], np.concatenate([f(3 / 10_000 ** (np.arange(4) / 4)) for f in (np.sin, np.cos)]))
    assert resample.depth_sincos(2, 7).shape == (2, 7)


def test_channels():
    kernel, gray = normal(2, 2, 3, 5), normal(2, 2, 1, seed=1)
    one = resample.adapt_channels(kernel, 1)
    np.testing.assert_allclose(np.einsum("yxc,yxcd->d", gray, one), np.einsum("yxc,yxcd->d", gray.repeat(3, -1), kernel))
    back = resample.adapt_channels(one, 3)
    np.testing.assert_allclose(np.einsum("yxc,yxcd->d", gray.repeat(3, -1), back), np.einsum("yxc,yxcd->d", gray, one))
    with pytest.raises(config.InputError, match="in_channels=4: the weights are for 3"):
        resample.adapt_channels(kernel, 4)


@pytest.mark.parametrize(
    ("old", "patch", "order"),
    [((4, 4), (1, 7, 7), "2D to 3D"), ((4, 4), (7, 1, 1), "2D to 3D"), ((2, 4, 4), (3, 2, 6), "3D to 3D"), ((2, 4, 4), (6, 3), "3D to 2D")],
)
def test_any_kernel_and_table_become_flat_ones_of_any_rank(old, patch, order):
    kernel, table = normal(*old, 3, 5), normal(*old, 5)
    flat = resample.kernel(kernel, patch_size=patch, in_channels=3, inflation="average")
    assert flat.shape == (int(np.prod(patch)) * 3, 5)
    assert flat.dtype == np.float32
    positions = resample.positions(table, grid=patch, depth_positions="copy")
    assert positions.shape == (int(np.prod(patch)), 5)
    if order == "2D to 3D":
        plane = resample.kernel(kernel, patch_size=patch[1:], in_channels=3, inflation="average")
        np.testing.assert_allclose(flat.reshape(patch[0], -1, 5).sum(axis=0), plane, atol=1e-6)
        np.testing.assert_array_equal(
            positions.reshape(patch[0], -1, 5)[-1], resample.positions(table, grid=patch[1:], depth_positions="copy")
        )
    if order == "3D to 2D":
        np.testing.assert_allclose(flat, resample.kernel(kernel.sum(0), patch_size=patch, in_channels=3, inflation="average"), atol=1e-6)


def test_words_that_are_none():
    with pytest.raises(config.InputError, match="inflation=centre: unknown; did you mean center"):
        resample.inflate_kernel(normal(2, 2, 3, 5), 2, "centre")
    with pytest.raises(config.InputError, match="position_resize=cubic: unknown; did you mean bicubic"):
        resample.positions(normal(2, 2, 5), grid=(2, 2), depth_positions="copy", position_resize="cubic")
    with pytest.raises(config.InputError, match="depth_positions=sin: unknown; did you mean sincos"):
        resample.inflate_positions(normal(2, 2, 5), 2, "sin")
