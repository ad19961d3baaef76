"""From a config to a description of its run: checked, before any data are read, devices are touched or anything is written."""

import dataclasses
import functools
import math
from typing import Any

import jax
import ml_collections

from vitmed import checks, cost
from vitmed import config as config_lib
from vitmed import fields as fields_lib
from vitmed import network as networks
from vitmed.data import preparation, sources
from vitmed.models import adapters, attention, flexible, pixels, slices, vit
from vitmed.training import augment, sharding

PLACEMENTS = ("auto", "device", "host")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config and what follows from it without reading data. Sizes are tuples, one entry per axis."""

    config: ml_collections.ConfigDict
    description: sources.Description
    network: networks.Network
    geometry: checks.Geometry
    seeds: tuple[int, ...]
    augmentation: augment.Augmentation
    tracked: checks.Tracked
    tuning: adapters.Tuning
    views: tuple[str, ...] = ()
    patch_sizes: tuple[tuple[int, ...], ...] = ()  # of a network that has several, as a config writes them

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices; InputError where they do not suffice or a batch does not divide over them. The first use takes hold of them."""
        config, sequence = self.config, self.config.mesh.sequence
        config_lib.require(sequence <= self.num_tokens, "mesh.sequence", sequence, f"at most {self.num_tokens}, the tokens of an image")
        axes = {"fsdp": config.mesh.fsdp, "sequence": sequence}
        batch_sizes = (config.train.batch_size, config.eval.batch_size)
        data = sharding.data_parts(jax.device_count(), data=config.mesh.data, **axes, batch_sizes=batch_sizes)
        mesh = sharding.make_mesh(data=data, **axes)
        sharding.check_batch(mesh, "train.batch_size", config.train.batch_size)
        sharding.check_batch(mesh, "train.micro_batch_size", config.train.micro_batch_size)
        sharding.check_batch(mesh, "eval.batch_size", config.eval.batch_size)
        return mesh

    @functools.cached_property
    def forms(self) -> tuple["Experiment", ...]:
        """The run at each patch size that its network has, in the config's order; where it has but one, itself."""
        return tuple(self._at(patch_size) for patch_size in self.patch_sizes) or (self,)

    def _at(self, patch_size: tuple[int, ...]) -> "Experiment":
        config = self.config.copy_and_resolve_references()
        config.model.patch_size = patch_size
        return dataclasses.replace(self, config=config, geometry=checks.geometry(config, self.description))

    @property
    def own(self) -> int:
        """Which of the forms is that of the config's patch size."""
        return [form.patch_size for form in self.forms].index(self.patch_size)

    @functools.cached_property
    def resized(self) -> dict[str, flexible.Sizes]:
        """From which sizes to which parameters are resized on their way to the network, as `flexible` takes them; empty where none are."""
        if not self.patch_sizes:
            return {}
        kept = flexible.kept([cost.grid(self.image_size, form.patch_size) for form in self.forms])
        return {"kept": kept, "to": flexible.Sizes(self.patch_size, cost.grid(self.image_size, self.patch_size))}

    @property
    def kept(self) -> checks.Geometry:
        """An image and a patch for which a network would have parameters of just the sizes that this one's are kept at."""
        if not self.patch_sizes:
            return self.encoded
        kernel, grid = dataclasses.astuple(self.resized["kept"])
        return checks.Geometry(tuple(map(math.prod, zip(kernel, grid, strict=True))), kernel, kernel)

    def computed_with(self, params: Any) -> Any:
        """What a ViT of the run's patch size computes with, of one seed's parameters, those of its base among them."""
        params = adapters.effective(params, self.tuning.lora)
        return flexible.resized(params, **self.resized) if self.resized else params

    @property
    def image_size(self) -> tuple[int, ...]:
        """H, W or D, H, W of what the network sees."""
        return self.geometry.image_size

    @property
    def patch_size(self) -> tuple[int, ...]:
        """The pixels of a patch."""
        return self.geometry.patch_size

    @property
    def encoded(self) -> checks.Geometry:
        """What goes through the transformer at once: the whole image, or with views a slice of it."""
        if not self.views:
            return self.geometry
        return checks.Geometry(*(sizes[1:] for sizes in dataclasses.astuple(self.geometry)))

    @property
    def num_slices(self) -> int:
        """How often it does for one image: the slices of all views, else once."""
        return sum(slices.num_slices(self.views, self.image_size)) if self.views else 1

    @property
    def shape(self) -> dict[str, Any]:
        """The transformer's sizes as `cost` takes them."""
        architecture = self.network.architecture
        return {
            **dataclasses.asdict(self.encoded),
            "in_channels": self.config.model.in_channels,
            "width": architecture.width,
            "depth": architecture.depth,
            "mlp_width": architecture.mlp_width,
            "num_prefix_tokens": architecture.num_prefix_tokens,
            "swiglu": architecture.swiglu,
            "num_classes": self.description.num_classes,
        }

    @property
    def num_tokens(self) -> int:
        """Patches, CLS and registers, of all that goes through the transformer at once."""
        return cost.num_patches(**dataclasses.asdict(self.encoded)) + self.network.architecture.num_prefix_tokens

    @property
    def gives_weights(self) -> bool:
        """Whether what is trained is a whole ViT, which other runs and programs can start from."""
        return not self.tuning.frozen and not self.views

    def attention_form(self, platform: str) -> str:
        """How attention is computed on a platform (cpu, gpu, tpu): one of `attention.FORMS`, never auto. InputError where it cannot be."""
        model, architecture = self.config.model, self.network.architecture
        head_width = architecture.width // architecture.num_heads
        sizes = {"num_tokens": self.num_tokens, "head_width": head_width}
        return attention.resolve(model.attention, platform=platform, dtype=model.dtype, **sizes)

    @property
    def gmacs_forward(self) -> float:
        """1e9 multiply-accumulates of one image's forward pass."""
        return self.num_slices * cost.gmacs_forward(**self.shape, pooling=self.network.architecture.pooling)

    @property
    def step_seconds(self) -> float:
        """Roughly what a training step of all runs takes, by arithmetic; of several patch sizes the mean."""
        gmacs_forward = sum(form.gmacs_forward for form in self.forms) / len(self.forms)
        sizes = {"num_params": self.num_trained_params, "batch_size": self.config.train.batch_size}
        passes = adapters.passes(self.tuning, self.network.architecture.depth)
        return cost.step_seconds(gmacs_forward=gmacs_forward, num_runs=len(self.seeds), passes=passes, **sizes)

    @property
    def num_trained_params(self) -> int:
        """The parameters of one seed that are trained, by arithmetic: those that an optimiser state is kept of."""
        if not self.tuning.frozen:
            return cost.num_params(**self.shape | dataclasses.asdict(self.kept)) + self._num_pooling_params
        one = self.network.architecture
        head = (one.width + 1) * self.description.num_classes * (2 if one.pooling == "distilled" else 1)
        pool = 4 * (one.width + 1) * one.width + one.width if one.pooling == "attention" else 0
        sizes = {name: getattr(one, name) for name in ("width", "depth", "mlp_width", "swiglu")}
        embedded = math.prod(self.kept.kernel_size) * self.config.model.in_channels
        added = adapters.num_trained(self.tuning, **sizes, embedded=embedded)
        copies = max(1, len(self.views)) if self.tuning.lora else 1  # each view has its own
        return head + pool + copies * added + self._num_pooling_params

    @property
    def _num_pooling_params(self) -> int:
        """Queries of views, the one that fuses several, and the decoder of masks."""
        if not self.views:
            return 0
        width = self.network.architecture.width
        return width * (len(self.views) + (len(self.views) > 1)) + (pixels.num_params(width) if self.config.train.mask_weight else 0)

    @property
    def label(self) -> str:
        """What a person calls this run."""
        patches = f"patches {self.config.model.patch_sizes}" if self.patch_sizes else f"patch {config_lib.patch_text(self.patch_size)}"
        return f"{self.description.name} {patches}"

    def load(self, *, as_stored: bool = False) -> sources.Dataset:
        """The data, found or downloaded; `as_stored` before `data.invert`."""
        data = self.config.data
        how = {"verify": data.verify, "invert": data.invert and not as_stored, "own": checks.own_data(self.config)}
        return sources.load(data.name, size=data.size, root=data.root, **how)

    @property
    def preparation(self) -> preparation.Preparation:
        """How a file becomes an image such as the run is trained on."""
        data = self.config.data
        return preparation.Preparation(data.rank, self.description.num_channels, data.size, data.spacing, data.window)


def plan(config: ml_collections.ConfigDict, recorded: networks.Network | None = None, *, look: bool = True) -> Experiment:
    """Check a config and describe its run; InputError for whatever does not fit, before data are read or devices are touched.

    A run that has begun brings the network that it has `recorded`; otherwise pretrained weights are found and their shapes read. Without
    a `look` they are not: the variant's own architecture stands for theirs.
    """
    fields_lib.conform(config.to_dict(), "the config")
    own = checks.own_data(config)
    description = recorded and recorded.description
    if description is None:
        description = sources.describe(config.data.name, config.data.size, root=config.data.root, own=own)
    if config.data.rank != description.rank:
        other = {2: "configs/vit2d.py", 3: "configs/vit3d.py"}[description.rank]
        raise config_lib.InputError(
            f"data.name={description.name} is {description.rank}D, this config is for {config.data.rank}D data; use {other}"
        )
    config_lib.one_of("data.placement", config.data.placement, PLACEMENTS)
    config_lib.one_of("model.attention", config.model.attention, attention.FORMS)
    config_lib.one_of("train.remat", config.train.remat, ("auto", *vit.REMATS))
    geometry = checks.geometry(config, description)
    checks.training(config)
    checks.objective(config, description)
    checked = {
        "seeds": checks.seeds(config),
        "augmentation": checks.augmentation(config, description.image_size),
        "tracked": checks.tracked(config),
    }
    network = recorded or networks.of_config(config, description, look=look)  # last: it looks for files
    tuning = checks.tuning(config, depth=network.architecture.depth)
    views = checks.views(config, description, geometry)
    if views and network.architecture.pooling not in ("cls", "mean"):
        raise config_lib.InputError(
            f"model.views={config.model.views}: the weights pool by {network.architecture.pooling}; set model.pooling"
        )
    checked["patch_sizes"] = checks.patch_sizes(config, geometry, num_examples=description.num_examples["train"])
    return Experiment(config=config, description=description, geometry=geometry, network=network, tuning=tuning, views=views, **checked)
