"""Supervision by masks (AnyMC3D, arXiv 2512.12887): patch tokens of all slices become a volume, and a light decoder finds lesions in it.

It teaches the encoder where to look while it trains, on the volumes that have a mask; prediction does without it.
Shapes: `B` batch, `S` slices, `h, w` the grid of patches, `E` width, `*S` D, H, W of a volume.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitmed.models import layers

WIDTH = 32  # of the decoder
SMOOTH = 1.0  # voxels, added above and below in Dice's ratio


class Decoder(nn.Module):
    """Norm, a linear layer to 32 channels, one 3x3x3 convolution, GELU, a linear layer to one logit, resized in the plane.

    Resizing is linear too, so that it may come last, where there is one channel and not 32.
    """

    @nn.compact
    def __call__(self, patches: jax.Array, plane: tuple[int, int]) -> jax.Array:
        """[B, S, h, w, E] -> mask logits [B, S, *plane] float32."""
        x = layers.LayerNorm(name="norm")(patches)
        x = nn.Dense(WIDTH, name="project")(x)
        x = layers.gelu(nn.Conv(WIDTH, (3, 3, 3), name="mix")(x))
        logits = nn.Dense(1, name="logit")(x)[..., 0]
        return jax.image.resize(logits, (*logits.shape[:2], *plane), "linear")


def loss(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """[B, *S] -> [B]: binary cross-entropy, the mean over voxels, plus one minus soft Dice; zero where a mask is empty: there is none."""
    axes = tuple(range(1, logits.ndim))
    truth = masks.astype(jnp.float32)
    entropy = _entropy(logits, truth).mean(axis=axes)
    found = jax.nn.sigmoid(logits)
    overlap, total = (found * truth).sum(axis=axes), found.sum(axis=axes) + truth.sum(axis=axes)
    dice = (2 * overlap + SMOOTH) / (total + SMOOTH)
    return jnp.where(masks.any(axis=axes), entropy + 1 - dice, 0.0)


def _entropy(logits: jax.Array, truth: jax.Array) -> jax.Array:
    return jax.nn.softplus(logits) - logits * truth


def num_params(width: int) -> int:
    """Parameters of a decoder for an encoder of this width."""
    return 2 * width + (width + 1) * WIDTH + (27 * WIDTH + 1) * WIDTH + WIDTH + 1
