"""What a run starts from: pretrained weights, parted into the base that stays frozen and the parameters that are trained."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from vitmed import config as config_lib
from vitmed import network as networks
from vitmed import planning
from vitmed.models import adapters, build, pretrained
from vitmed.models import weights as weights_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """The base ({} where all is trained), the trained parameters that the weights give (None: those of a checkpoint, or drawn).

    `report` says what became of the weights, None where they were not read; `sha256` is the digest of those of a frozen base.
    """

    base: Any = dataclasses.field(default_factory=dict)
    trained: Any = None
    report: pretrained.Report | None = None
    sha256: str | None = None


def of(planned: planning.Experiment, *, begun: bool) -> Start:
    """The start of a run, of one that has `begun` no more than its base; InputError where weights are missing, damaged or others."""
    if planned.tuning.frozen:
        start = _parted(planned)
        return Start(start.base, sha256=start.sha256) if begun else start
    if not planned.config.model.pretrained or begun:
        return Start()
    sizes = {"num_classes": 0 if planned.views else planned.description.num_classes}
    params, report = networks.starting_params(planned.network, planned.config, **dataclasses.asdict(planned.kept), **sizes)
    return Start(trained=_placed(planned, params), report=report)


def _placed(planned: planning.Experiment, params: Any) -> Any:
    """A ViT's parameters in the whole network: with views it is their encoder, and what else there is is not of the weights."""
    return {"encoder": params, **_heads(planned)} if planned.views else params


def _parted(planned: planning.Experiment) -> Start:
    """The weights in both parts, fresh classifiers zero; plugins that stand on the same base share its arrays."""
    config, network = planned.config, planned.network
    weights = network.weights or weights_lib.describe(config.model.pretrained, expected=build.variant(config.model.variant))
    model = config.model
    how = {name: model[name] for name in ("in_channels", "inflation", "depth_positions", "position_resize")}
    weights = dataclasses.replace(weights, architecture=network.architecture)
    state = weights.path.stat()
    params, report, sha256 = _loaded(weights, (state.st_mtime_ns, state.st_size), planned.kept, tuple(how.items()))
    if network.base not in (None, sha256):
        raise config_lib.InputError(
            f"model.pretrained={model.pretrained}: its tensors have SHA-256 {sha256[:16]}..., this run's plugin stands on a base of "
            f"{network.base[:16]}...; give the weights that it was trained on"
        )
    base, trained = adapters.split(_placed(planned, params) | _heads(planned), planned.tuning)
    return Start(base, trained, report, sha256)


@functools.lru_cache(maxsize=4)
def _loaded(
    weights: weights_lib.Weights, state: tuple[int, int], geometry: Any, how: tuple[tuple[str, Any], ...]
) -> tuple[Any, pretrained.Report, str]:
    """(parameters without classifier, what became of the weights, their digest), once for a file in one `state`."""
    del state
    params, report = pretrained.load(weights, **dataclasses.asdict(geometry), num_classes=0, **dict(how))
    sha256 = weights_lib.digest(weights)
    own = {name: params.pop(name) for name in ("patch_embed", "pos_embed")}  # by geometry; of the rest, what is equal is kept once
    return own | _trunk(sha256, jax.tree.structure(params)).setdefault("params", params), report, sha256


@functools.lru_cache(maxsize=2)
def _trunk(sha256: str, structure: Any) -> dict[str, Any]:
    """A place for the parameters of one base that are the same whatever the patches are."""
    del sha256, structure
    return {}


def _heads(planned: planning.Experiment) -> Any:
    """Classifiers of zeros."""
    width, num_classes = planned.network.architecture.width, planned.description.num_classes
    names = ("head", "head_dist") if planned.network.architecture.pooling == "distilled" else ("head",)
    sizes = {"kernel": (width, num_classes), "bias": (num_classes,)}
    return {name: {part: jnp.zeros(size, jnp.float32) for part, size in sizes.items()} for name in names}
