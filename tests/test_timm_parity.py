"""What timm and PyTorch computed (../shared/fixtures), computed here: every form of model, resized, inflated, and trained.

Parity in float32 is a largest difference under 2e-4 of the largest magnitude, as the fixtures' README has it.
"""

import functools

import jax
import numpy as np
import pytest
import safetensors.numpy

from vitmed import models
from vitmed.models import build, resample
from vitmed.training import augment, optim, step, tasks

TOLERANCE = 2e-4


def assert_parity(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < TOLERANCE * np.abs(theirs).max()


def applied(module, params, images):
    return jax.jit(module.apply)({"params": params}, images)


@pytest.mark.parametrize(
    ("name", "image", "patch"),
    [
        *(("micro_vit", image, patch) for image, patch in ((224, 16), (28, 7), (28, 4), (64, 8))),
        *(("micro_dinov2_reg4", image, patch) for image, patch in ((518, 14), (28, 7))),
        *(("micro_avgpool", image, patch) for image, patch in ((224, 16), (28, 4))),
    ],
)
def test_forward_in_2d(shared_fixtures, name, image, patch):
    theirs = np.load(shared_fixtures / f"{name}_forward.npz")
    key = f"img{image}_patch{patch}"
    images = theirs[f"{key}/images_nhwc"]
    file = str(shared_fixtures / f"{name}.safetensors")
    module, params = models.from_pretrained(file, image_size=(image,) * 2, patch_size=(patch,) * 2, num_heads=3)
    assert_parity(applied(module, params, images), theirs[f"{key}/logits"])
    headless = module.clone(num_classes=None)
    assert_parity(applied(headless, {name: leaf for name, leaf in params.items() if name != "head"}, images), theirs[f"{key}/features"])


@pytest.mark.parametrize("patch", [14, 7])
def test_forward_in_3d(shared_fixtures, patch):
    theirs = np.load(shared_fixtures / "micro_vit3d_forward.npz")
    volumes = np.repeat(theirs[f"img28_patch{patch}/volumes_dhw"].astype(np.float32)[..., None], 3, axis=-1)
    file = str(shared_fixtures / "micro_vit.safetensors")
    for in_channels in (3, 1):  # the sum of the kernel over colours is the gray volume given to all three
        module, params = models.from_pretrained(file, image_size=(28,) * 3, patch_size=(patch,) * 3, num_heads=3, in_channels=in_channels)
        assert_parity(applied(module, params, volumes[..., :in_channels]), theirs[f"img28_patch{patch}/logits"])


def test_a_volume_of_depth_one_is_the_image(shared_fixtures):
    theirs = np.load(shared_fixtures / "micro_vit_forward.npz")
    file = str(shared_fixtures / "micro_vit.safetensors")
    module, params = models.from_pretrained(file, image_size=(1, 28, 28), patch_size=(1, 7, 7), num_heads=3)
    assert_parity(applied(module, params, theirs["img28_patch7/images_nhwc"][:, None]), theirs["img28_patch7/logits"])


def test_the_real_vit_tinys_features_and_logits(shared_fixtures, vit_tiny):
    theirs = np.load(shared_fixtures / "vit_tiny_breastmnist_features.npz")
    assert models.preprocessing(vit_tiny) == ((0.5,) * 3, (0.5,) * 3)
    images = np.repeat((theirs["images_uint8"].astype(np.float32)[..., None] / 255 - 0.5) / 0.5, 3, axis=-1)
    for patch in (14, 7, 4):
        module, params = models.from_pretrained(vit_tiny, image_size=(28, 28), patch_size=(patch, patch))
        features = module.clone(num_classes=None)
        params = {name: leaf for name, leaf in params.items() if name != "head"}
        assert_parity(applied(features, params, images), theirs[f"patch{patch}/cls_features"])
    module, params = models.from_pretrained(vit_tiny, image_size=(224, 224), patch_size=(16, 16))
    assert_parity(applied(module, params, theirs["native224/input_nhwc_first2"]), theirs["native224/logits_first2"])


def test_resized_kernels_and_positions(shared_fixtures, vit_tiny):
    theirs, weights = np.load(shared_fixtures / "resample.npz"), safetensors.numpy.load_file(vit_tiny)
    kernel = weights["patch_embed.proj.weight"][:16].transpose(2, 3, 1, 0).astype(np.float64)
    table = weights["pos_embed"][0, 1:].reshape(14, 14, -1).astype(np.float64)
    for patch in (8, 7):
        assert_parity(resample.resize_kernel(kernel, (patch, patch)).transpose(3, 2, 0, 1), theirs[f"patch{patch}"])
    for side in (7, 28):
        positions = theirs[f"pos{side}"][0, 1:]  # of 28 x 28 the fixture holds the first 199
        resized = resample.resize_positions(table, (side, side)).reshape(side * side, -1)
        assert_parity(resized[: len(positions)], positions)


def test_the_training_trajectory(shared_fixtures):
    """30 steps of AdamW with decay on everything and StepLR: losses to 1e-4 relative, then the logits of the first batch."""
    theirs = np.load(shared_fixtures / "recipe_trajectory_patch7.npz")
    per_epoch, patch = int(theirs["steps_per_epoch"]), int(theirs["patch"])
    module, params = models.from_pretrained(
        str(shared_fixtures / "micro_vit.safetensors"), image_size=(28, 28), patch_size=(patch,) * 2, num_classes=2, num_heads=3
    )
    schedule = optim.step_lr(
        float(theirs["lr"]), steps_per_epoch=per_epoch, lr_step_epochs=int(theirs["step_size_epochs"]), lr_gamma=float(theirs["gamma"])
    )
    optimizer = optim.adamw(schedule, weight_decay=float(theirs["weight_decay"]), beta1=0.9, beta2=0.999, epsilon=1e-8)
    nothing = augment.Augmentation(
        crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), rotation_degrees=0.0, flip_h=0.0, flip_w=0.0, quarter_turns=False,
        brightness=0.0, contrast=0.0,
    )  # fmt: skip
    train = functools.partial(
        step.train_step,
        apply=module.apply,
        prepare=lambda images, augment: images,
        task=tasks.TASKS["binary"],
        optimizer=optimizer,
        augmentation=nothing,
    )
    train = jax.jit(train)
    state, _ = step.create(params, optimizer)
    losses = []
    for index in range(30):
        labels = theirs["labels"][index][:, None].astype(np.int32)
        batch = {"images": theirs["images_nhwc"][index], "labels": labels, "mask": np.ones(len(labels), bool)}
        assert float(schedule(index)) == pytest.approx(float(theirs["lrs"][index]), rel=1e-6)
        state, loss = train(state, batch, 0)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, theirs["losses"], rtol=1e-4)
    assert_parity(applied(module, state.params, theirs["images_nhwc"][0]), theirs["final_logits_batch0"])


def test_the_tree_of_parameters_is_that_of_a_fresh_model(shared_fixtures):
    """Checkpoints are restored into the shapes of a fresh model, whatever the run started from."""
    for name in ("micro_vit", "micro_dinov2_reg4", "micro_avgpool"):
        module, params = models.from_pretrained(
            str(shared_fixtures / f"{name}.safetensors"), image_size=(28, 28), patch_size=(7, 7), num_heads=3, num_classes=2
        )
        init = functools.partial(build.initialise, module, image_size=(28, 28), in_channels=3)
        fresh = jax.eval_shape(init, jax.random.key(0))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), fresh) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
