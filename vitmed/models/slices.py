"""Volumes through a 2D encoder, slice by slice (AnyMC3D, arXiv 2512.12887): several views, each slice weighed by a learned query.

The encoder is a 2D ViT whose parameters all views share; each view may have LoRA of its own on it. Nothing knows where in its stack a
slice lies, so that a stack in any order gives the same.
Shapes: `B` batch, `D, H, W` of a volume, `C` channels, `V` views, `S` slices of one, `h, w` the grid of a slice's `N` patches, `E` width.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vitmed import config, cost
from vitmed.models import adapters, build, explain, pixels, vit

VIEWS = ("axial", "coronal", "sagittal")  # stacks of H x W slices along D, of D x W along H, of D x H along W


def parse(text: str) -> tuple[str, ...]:
    """Views as they are written, with commas; none of an empty text. InputError for a view that there is not, or that comes twice."""
    views = tuple(part.strip() for part in text.split(",")) if text else ()
    for view in views:
        if view not in VIEWS:
            raise config.InputError(f"model.views={text}: {view!r} is no view of a volume; there are {', '.join(VIEWS)}")
    config.require(len(set(views)) == len(views), "model.views", text, "views that each come once")
    return views


def num_slices(views: Sequence[str], image_size: tuple[int, int, int]) -> tuple[int, ...]:
    """How many slices each view has; InputError where one has a single slice, which is no volume."""
    counts = tuple(image_size[VIEWS.index(view)] for view in views)
    for view, count in zip(views, counts, strict=True):
        if count < 2:
            raise config.InputError(
                f"model.views: volumes of {'x'.join(map(str, image_size))} have {count} slice in the {view} view; "
                "leave the view out, or take a 2D config for images"
            )
    return counts


def stacked(volumes: jax.Array, view: str) -> jax.Array:
    """[B, D, H, W, C] -> [B, S, H, W, C]: a view's slices, of another size than H x W resized to it (linearly, antialiased).

    So one encoder with one table of positions serves all views.
    """
    slices = jnp.moveaxis(volumes, 1 + VIEWS.index(view), 1)
    size = (*slices.shape[:2], *volumes.shape[2:])
    return slices if slices.shape == size else jax.image.resize(slices, size, "linear")


def attend(query: jax.Array, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(pooled [B, E], weights [B, S]) of features [B, S, E]: softmax over the slices of query . feature / sqrt(E)."""
    weights = jax.nn.softmax(features @ query * features.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bs,bse->be", weights, features), weights


@dataclasses.dataclass(frozen=True)
class SliceViT:
    """A classifier of volumes: `model.apply({"params": params}, volumes)` -> logits [B, num_classes] in float32, as `vit.ViT` has it.

    Volumes are of `image_size` D, H, W, and `encoder` is a 2D ViT without a classifier. Parameters: the encoder's, for each view a query
    and where there is `lora` its own, with several views a query that fuses them, and the classifier; with `decodes` also the decoder
    of masks, which prediction does not use.
    """

    encoder: vit.ViT
    image_size: tuple[int, int, int]
    views: tuple[str, ...]
    num_classes: int
    lora: adapters.Lora | None = None
    decodes: bool = False

    def initialise(self, key: jax.Array, *, in_channels: int) -> Any:
        """Fresh parameters for volumes of so many channels: queries normal with sd .02, a classifier of zeros."""
        encoder_key, *keys = jax.random.split(key, 3 + len(self.views))
        encoder = build.initialise(self.encoder, encoder_key, image_size=self.image_size[1:], in_channels=in_channels)
        width = self.encoder.width
        head = {"kernel": jnp.zeros((width, self.num_classes)), "bias": jnp.zeros(self.num_classes)}
        params = {"encoder": encoder, "views": {}, "head": head}
        for view, view_key in zip(self.views, keys, strict=False):
            query_key, lora_key = jax.random.split(view_key)
            params["views"][view] = {"query": 0.02 * jax.random.normal(query_key, (width,))}
            if self.lora is not None:
                params["views"][view]["lora"] = adapters.fresh_lora(lora_key, encoder, self.lora)
        if len(self.views) > 1:
            params["fusion"] = {"query": 0.02 * jax.random.normal(keys[-2], (width,))}
        if self.decodes:
            params["decoder"] = pixels.Decoder().init(keys[-1], jnp.zeros((1, 2, 2, 2, width)), (2, 2))["params"]
        return params

    def apply(
        self, variables: Any, volumes: jax.Array, *, train: bool = False, rngs: Any = None, stage: str = "all", masks: bool = False
    ) -> Any:
        """[B, D, H, W, C] -> [B, num_classes]; with `masks` (logits, mask logits [B, D, H, W]), these from the first view's slices.

        Of the stages of `vit.ViT` there are `features`, which ends with the slices of all views one after another, [B, sum of S, E], and
        `classify`.
        """
        params = variables["params"]
        if stage == "classify":
            return self._classify(params, self._parted(volumes))
        found, decoded = [], None
        for index, view in enumerate(self.views):
            slices = stacked(volumes, view)
            keys = {name: jax.random.fold_in(key, index) for name, key in (rngs or {}).items()}
            if masks and index == 0:
                tokens = self._encode(params, view, slices, train=train, rngs=keys, stage="tokens")
                found.append(self._pooled(params, view, tokens))
                decoded = self._decode(params, tokens)
            else:
                found.append(self._encode(params, view, slices, train=train, rngs=keys))
        if stage == "features":
            return jnp.concatenate(found, axis=1)
        logits = self._classify(params, found)
        return (logits, decoded) if masks else logits

    def weights(self, params: Any, volumes: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """(for each view the weights of its slices [B, S], the weights of the views [B, V])."""
        found = [self._encode(params, view, stacked(volumes, view)) for view in self.views]
        _, of_slices, of_views = self._fused(params, found)
        return dict(zip(self.views, of_slices, strict=True)), of_views

    def heat(self, params: Any, volumes: jax.Array, classes: jax.Array | None = None, *, method: str) -> jax.Array:
        """[B, D, H, W, C] -> heat float32, which sums to one over a volume, by one of `explain.METHODS`.

        `attention` and `rollout`: what they find within each slice, times the slice's weight and its view's, for all classes alike;
        `gradient`: of `classes` [B], what the class's logit depends on among all slices' tokens. One axial view is [B, D, h, w];
        else views are laid on the voxels [B, D, H, W], a patch's heat spread evenly over them, and added.
        """
        found = self._gradients(params, volumes, classes) if method == "gradient" else self._looked_at(params, volumes, method)
        if self.views == ("axial",):
            heat = found["axial"]
        else:
            heat = sum(_on_voxels(of_view, view, volumes.shape[1:-1]) for view, of_view in found.items())
        total = heat.sum(axis=(1, 2, 3), keepdims=True)
        return (heat / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)).astype(jnp.float32)

    # --- parts ------------------------------------------------------------------------------------------------------------------

    def effective(self, params: Any, view: str) -> Any:
        """The encoder's parameters as a view sees them."""
        if self.lora is None:
            return params["encoder"]
        return adapters.merged(params["encoder"], params["views"][view]["lora"], self.lora)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a slice along each axis."""
        return cost.grid(self.image_size[1:], self.encoder.patch_size, self.encoder.kernel_size)

    def _encode(self, params: Any, view: str, slices: jax.Array, **how: Any) -> jax.Array:
        """[B, S, H, W, C] -> the slices' features [B, S, E], or what another stage of the encoder gives of each."""
        flat = slices.reshape(-1, *slices.shape[2:])
        found = self.encoder.apply({"params": self.effective(params, view)}, flat, **how)
        return found.reshape(-1, slices.shape[1], *found.shape[1:])

    def _pooled(self, params: Any, view: str, tokens: jax.Array) -> jax.Array:
        """What the encoder makes of all tokens [B, S, prefix + N, E]: features [B, S, E]."""
        flat = tokens.reshape(-1, *tokens.shape[2:])
        patches = flat[:, self.encoder.num_prefix_tokens :]
        seen = patches.mean(axis=1, dtype=jnp.float32, keepdims=True) if self.encoder.pooling == "mean" else flat[:, :1].astype(jnp.float32)
        found = self.encoder.apply({"params": self.effective(params, view)}, seen, stage="classify")
        return found.reshape(*tokens.shape[:2], -1)

    def _decode(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Tokens [B, S, prefix + N, E] of the first view -> mask logits [B, D, H, W]."""
        patches = tokens[:, :, self.encoder.num_prefix_tokens :].reshape(*tokens.shape[:2], *self.grid, -1)
        decoded = pixels.Decoder().apply({"params": params["decoder"]}, patches, self.image_size[1:])
        ordered = jnp.moveaxis(decoded, 1, 1 + VIEWS.index(self.views[0]))
        size = (len(ordered), *self.image_size)
        return ordered if ordered.shape == size else jax.image.resize(ordered, size, "linear")

    def _parted(self, features: jax.Array) -> list[jax.Array]:
        """All views' slices, one after another, [B, sum of S, E] -> of each view [B, S, E]."""
        counts = num_slices(self.views, self.image_size)
        return jnp.split(features, list(itertools.accumulate(counts[:-1])), axis=1)

    def _fused(self, params: Any, found: Sequence[jax.Array]) -> tuple[jax.Array, list[jax.Array], jax.Array]:
        """(pooled [B, E], the slices' weights of each view, the views' weights [B, V]) of each view's features [B, S, E]."""
        pooled, weights = zip(
            *(attend(params["views"][view]["query"], of_view) for view, of_view in zip(self.views, found, strict=True)), strict=True
        )
        if len(self.views) == 1:
            return pooled[0], list(weights), jnp.ones((len(pooled[0]), 1))
        fused, of_views = attend(params["fusion"]["query"], jnp.stack(pooled, axis=1))
        return fused, list(weights), of_views

    def _classify(self, params: Any, found: Sequence[jax.Array]) -> jax.Array:
        pooled, _, _ = self._fused(params, found)
        return pooled @ params["head"]["kernel"] + params["head"]["bias"]

    # --- heat -------------------------------------------------------------------------------------------------------------------

    def _looked_at(self, params: Any, volumes: jax.Array, method: str) -> dict[str, jax.Array]:
        """For each view [B, S, h, w]: shares within a slice times the weights of the slice and of the view."""
        of_slices, of_views = self.weights(params, volumes)
        found = {}
        for index, view in enumerate(self.views):
            slices = stacked(volumes, view)
            shares = explain.heat(self.encoder, self.effective(params, view), slices.reshape(-1, *slices.shape[2:]), method=method)
            weights = of_slices[view] * of_views[:, index : index + 1]
            found[view] = weights[..., None, None] * shares.reshape(*slices.shape[:2], *shares.shape[1:])
        return found

    def _gradients(self, params: Any, volumes: jax.Array, classes: jax.Array | None) -> dict[str, jax.Array]:
        """For each view [B, S, h, w]: |t . dz/dt| of the patches' tokens, as `explain.gradient` has it."""
        stacks = {view: stacked(volumes, view) for view in self.views}
        grid = self.grid
        prefix = self.encoder.num_prefix_tokens
        tokens = prefix + grid[0] * grid[1]

        def chosen(scales: dict[str, jax.Array]) -> jax.Array:
            found = []
            for view, slices in stacks.items():
                flat = slices.reshape(-1, *slices.shape[2:])
                watched = explain.watch(
                    self.encoder, self.effective(params, view), flat, first=self.encoder.depth, scale=scales[view].reshape(-1, tokens)
                )
                found.append(watched.logits.reshape(*slices.shape[:2], -1))
            logits = self._classify(params, found)
            wanted = logits.argmax(axis=-1) if classes is None else classes
            return jnp.take_along_axis(logits, wanted[:, None], axis=-1).sum()

        ones = {view: jnp.ones((*slices.shape[:2], tokens)) for view, slices in stacks.items()}
        by_scale = jax.grad(chosen)(ones)
        return {view: jnp.abs(found[:, :, prefix:]).reshape(*found.shape[:2], *grid) for view, found in by_scale.items()}


def _on_voxels(heat: jax.Array, view: str, size: tuple[int, int, int]) -> jax.Array:
    """A view's heat [B, S, h, w] -> [B, D, H, W] with the same sum."""
    ordered = jnp.moveaxis(heat, 1, 1 + VIEWS.index(view))
    spread = jax.image.resize(ordered, (len(heat), *size), "nearest")
    return spread * (ordered[0].size / spread[0].size)
