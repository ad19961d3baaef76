"""From stored bytes to what the network sees: one function for training, evaluation, prediction and export."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def prepare(
    images: jax.Array,
    *,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: tuple[int, ...] | None = None,
    augment: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """uint8 [B, *S, C] -> float32 [B, *S, in_channels], (x / 255 - mean) / std; gray is copied to every channel.

    `augment` acts on the values in [0, 1] before channels are copied, so gray images are augmented once. Images of another size than
    `image_size` are then resized to it, bicubically and antialiased. `mean` and `std` have one entry, or one per channel.
    """
    if images.shape[-1] not in (1, in_channels):
        raise ValueError(f"images have {images.shape[-1]} channels; this model takes {' or '.join(map(str, sorted({1, in_channels})))}")
    values = images.astype(jnp.float32) / 255.0
    if augment is not None:
        values = augment(values)
    if image_size is not None and values.shape[1:-1] != image_size:
        resized = jax.image.resize(values, (values.shape[0], *image_size, values.shape[-1]), "cubic")
        values = jnp.clip(resized, 0.0, 1.0)  # bicubic overshoots at edges
    values = jnp.broadcast_to(values, (*values.shape[:-1], in_channels))
    return (values - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
