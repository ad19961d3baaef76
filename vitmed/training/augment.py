"""Augmentation inside the jitted step, a pure function of a key: each example has its own draw, 2D and 3D share the code.

Shapes: `B` batch, `H, W` the last two spatial axes, `C` channels. Values are in [0, 1]. A volume is augmented in its H-W plane, the same
draw for every slice. Crop and rotation are one resample; flips and quarter turns move values without changing them.
What the torchvision recipe of the study does one after another on bytes is composed here on floats; outside of the crop is black.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vitmed import config

# torchvision's RandomResizedCrop draws until a crop fits, ten times at most; then it takes the whole image (or, where the image's own ratio
# lies outside of the range, the central crop of the nearest ratio: not done here).
CROP_ATTEMPTS = 10
VIEWS = ("none", "flips", "all")  # of test-time augmentation: the image alone, with its flips, and with quarter turns as well
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision's rgb_to_grayscale


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Ranges and probabilities; the defaults change nothing.

    `crop_scale` is a range of area fractions and `crop_ratio` of aspect ratios (W / H); `rotation_degrees` the largest angle either way;
    `flip_h`, `flip_w` probabilities; `quarter_turns` draws 0, 90, 180 or 270 degrees; `brightness`, `contrast` the largest change of a
    factor around 1.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    rotation_degrees: float = 0.0
    flip_h: float = 0.0
    flip_w: float = 0.0
    quarter_turns: bool = False
    brightness: float = 0.0
    contrast: float = 0.0

    @property
    def acts(self) -> bool:
        """Whether anything does."""
        return bool(self.resamples or self.flip_h or self.flip_w or self.quarter_turns or self.brightness or self.contrast)

    @property
    def crops(self) -> bool:
        """Whether a crop is drawn; without one the whole image is kept, also where it is not quite square."""
        return self.crop_scale != (1.0, 1.0) or self.crop_ratio != (1.0, 1.0)

    @property
    def resamples(self) -> bool:
        """Whether crop or rotation act."""
        return self.crops or self.rotation_degrees > 0


def apply(key: jax.Array, images: jax.Array, augmentation: Augmentation) -> jax.Array:
    """Augment images [B, *S, C] in [0, 1], each with its own draw from `key`; what is off costs nothing."""
    keys = jax.random.split(key, (3, images.shape[0]))
    if augmentation.resamples:
        images = jax.vmap(lambda k, x: _crop_and_rotate(k, x, augmentation))(keys[0], images)
    if augmentation.flip_h or augmentation.flip_w or augmentation.quarter_turns:
        images = jax.vmap(lambda k, x: _flip_and_turn(k, x, augmentation))(keys[1], images)
    if augmentation.brightness or augmentation.contrast:
        images = jax.vmap(lambda k, x: _jitter(k, x, augmentation))(keys[2], images)
    return images


def moved(key: jax.Array, masks: jax.Array, augmentation: Augmentation) -> jax.Array:
    """Masks bool [B, *S] where `apply` with the same key moves what they mark; brightness and contrast do not concern them."""
    still = dataclasses.replace(augmentation, brightness=0.0, contrast=0.0)
    return apply(key, masks[..., None].astype(jnp.float32), still)[..., 0] > 0.5


def mix(key: jax.Array, images: jax.Array, targets: jax.Array, mask: jax.Array, *, alpha: float) -> tuple[jax.Array, jax.Array]:
    """mixup (arXiv 1710.09412): images [B, *S, C] and targets [B, K], each with its partner's share; lambda is of Beta(alpha, alpha).

    Partners are a random permutation of the real examples among themselves; what the mask [B] leaves out mixes with its like. Each pair
    draws a lambda of its own, as the paper's formula says (its authors' code draws one for a batch): of a small batch, one draw from
    a distribution that lies at both ends would leave nearly all images as they are, or mix all of them.
    """
    order_key, share_key = jax.random.split(key)
    places = jnp.argsort(~mask, stable=True)  # the real ones first; so they are in the random order too
    shuffled = jnp.argsort(jnp.where(mask, jax.random.uniform(order_key, mask.shape), 2.0))
    partners = jnp.zeros_like(places).at[places].set(shuffled)
    share = jax.random.beta(share_key, alpha, alpha, mask.shape)

    def mixed(values: jax.Array) -> jax.Array:
        own = share.reshape(-1, *(1,) * (values.ndim - 1)).astype(values.dtype)
        return own * values + (1 - own) * jnp.take(values, partners, axis=0)

    return mixed(images), mixed(targets)


def views(augmentation: Augmentation, kind: str) -> list[Callable[[jax.Array], jax.Array]]:
    """Test-time augmentation: functions of images [B, *S, C] that move values without changing them, the identity first.

    Only what training has shown under the same label: with `flips` those that the augmentation draws, alone and together, with `all` its
    quarter turns as well, every view once. InputError where it draws nothing of the kind.
    """
    config.one_of("--tta", kind, VIEWS)
    flips = [axis for axis, chance in ((-3, augmentation.flip_h), (-2, augmentation.flip_w)) if chance] if kind != "none" else []
    turns = range(4) if kind == "all" and augmentation.quarter_turns else range(1)
    if kind != "none" and not flips and len(turns) == 1:
        drawn = "flips or quarter turns" if kind == "all" else "flips"
        raise config.InputError(f"--tta={kind}: the run was trained without {drawn}, so that they may change what it sees; take none")
    flipped = [axes for axes in ((), (-3,), (-2,), (-3, -2)) if set(axes) <= set(flips)]
    if len(turns) == 4 and flips:  # one flip and the turns make the other flip, and both
        flipped = [(), (flips[0],)]

    def view(images: jax.Array, axes: tuple[int, ...], turn: int) -> jax.Array:
        images = jnp.flip(images, axes) if axes else images
        return jnp.rot90(images, turn, axes=(-3, -2)) if turn else images

    return [functools.partial(view, axes=axes, turn=turn) for axes in flipped for turn in turns]


def _draw_crop(key: jax.Array, height: int, width: int, augmentation: Augmentation) -> tuple[jax.Array, ...]:
    """The crop's top, left, height and width in pixels, drawn as torchvision's RandomResizedCrop draws them."""
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    low, high = augmentation.crop_scale
    area = height * width * jax.random.uniform(area_key, (CROP_ATTEMPTS,), minval=low, maxval=high)
    low, high = jnp.log(jnp.asarray(augmentation.crop_ratio))
    ratio = jnp.exp(jax.random.uniform(ratio_key, (CROP_ATTEMPTS,), minval=low, maxval=high))
    w, h = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = jnp.argmax(fits)
    h = jnp.where(fits.any(), h[first], height)
    w = jnp.where(fits.any(), w[first], width)
    top = jnp.floor(jax.random.uniform(top_key) * (height - h + 1))
    left = jnp.floor(jax.random.uniform(left_key) * (width - w + 1))
    return top, left, h, w


def _crop_and_rotate(key: jax.Array, image: jax.Array, augmentation: Augmentation) -> jax.Array:
    """Crop, stretch to the full size bilinearly, rotate about the centre by the nearest pixel, in one resample of [..., H, W, C].

    torchvision's RandomRotation takes the nearest pixel unless told otherwise, and so does the study: interpolated once more, training
    images would be smoother than those that the network is tested on.
    """
    height, width = image.shape[-3:-1]
    crop_key, angle_key = jax.random.split(key)
    top, left, h, w = _draw_crop(crop_key, height, width, augmentation) if augmentation.crops else (0, 0, height, width)
    limit = jnp.deg2rad(augmentation.rotation_degrees)
    angle = jax.random.uniform(angle_key, minval=-limit, maxval=limit)
    # Where each output pixel's centre lies in the stretched crop, before the rotation, in pixels from its upper left corner.
    y, x = jnp.meshgrid(jnp.arange(height) + 0.5 - height / 2, jnp.arange(width) + 0.5 - width / 2, indexing="ij")
    v = jnp.cos(angle) * y + jnp.sin(angle) * x + height / 2
    u = -jnp.sin(angle) * y + jnp.cos(angle) * x + width / 2
    inside = (v >= 0) & (v < height) & (u >= 0) & (u < width)
    if augmentation.rotation_degrees > 0:
        v, u = jnp.floor(v) + 0.5, jnp.floor(u) + 0.5  # the centre of the pixel of the stretched crop in which it lies
    rows = jnp.clip(top + v * h / height - 0.5, top, top + h - 1)
    columns = jnp.clip(left + u * w / width - 0.5, left, left + w - 1)
    return jnp.where(inside[..., None], _bilinear(image, rows, columns), 0.0)


def _bilinear(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Values of [..., H, W, C] at real coordinates [H', W'] inside of it -> [..., H', W', C]."""
    height, width = image.shape[-3:-1]
    top, left = jnp.floor(rows).astype(jnp.int32), jnp.floor(columns).astype(jnp.int32)
    bottom, right = jnp.minimum(top + 1, height - 1), jnp.minimum(left + 1, width - 1)
    down, across = (rows - top)[..., None], (columns - left)[..., None]
    upper = image[..., top, left, :] * (1 - across) + image[..., top, right, :] * across
    lower = image[..., bottom, left, :] * (1 - across) + image[..., bottom, right, :] * across
    return upper * (1 - down) + lower * down


def _flip_and_turn(key: jax.Array, image: jax.Array, augmentation: Augmentation) -> jax.Array:
    """Flips of H and W, then a quarter turn: together one optional transpose and one optional flip per axis."""
    h_key, w_key, turn_key = jax.random.split(key, 3)
    flip_h = jax.random.bernoulli(h_key, augmentation.flip_h)
    flip_w = jax.random.bernoulli(w_key, augmentation.flip_w)
    if augmentation.quarter_turns:
        turns = jax.random.randint(turn_key, (), 0, 4)
        transpose = turns % 2 == 1
        # A turn by 90 degrees is a transpose followed by a flip of H, by 180 two flips, by 270 a transpose and a flip of W;
        # a flip before the transpose is the other axis's flip after it.
        flip_h, flip_w = jnp.where(transpose, flip_w, flip_h), jnp.where(transpose, flip_h, flip_w)
        flip_h, flip_w = flip_h ^ ((turns == 1) | (turns == 2)), flip_w ^ (turns >= 2)
        image = jnp.where(transpose, image.swapaxes(-3, -2), image)
    image = jnp.where(flip_h, jnp.flip(image, -3), image)
    return jnp.where(flip_w, jnp.flip(image, -2), image)


def _jitter(key: jax.Array, image: jax.Array, augmentation: Augmentation) -> jax.Array:
    """Brightness and contrast in random order, each clipped to [0, 1], as torchvision's ColorJitter."""
    order_key, brightness_key, contrast_key = jax.random.split(key, 3)
    brightness = jax.random.uniform(brightness_key, minval=max(0.0, 1 - augmentation.brightness), maxval=1 + augmentation.brightness)
    contrast = jax.random.uniform(contrast_key, minval=max(0.0, 1 - augmentation.contrast), maxval=1 + augmentation.contrast)

    def brighten(x: jax.Array) -> jax.Array:
        return jnp.clip(x * brightness, 0.0, 1.0)

    def stretch(x: jax.Array) -> jax.Array:
        gray = x @ jnp.asarray(GRAY_WEIGHTS) if x.shape[-1] == 3 else x
        return jnp.clip(gray.mean() * (1 - contrast) + x * contrast, 0.0, 1.0)

    return jnp.where(jax.random.bernoulli(order_key), stretch(brighten(image)), brighten(stretch(image)))
