"""What a frozen backbone says of a data set, computed once: training then costs the head alone.

Where nothing below the head is trained and images are the same in every epoch, so are their features. They take the images' place in the
data set, and what is left of the network the network's in the recipe; what comes out is what the whole network would give, and the
parameters that are trained are the same ones.
"""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vitmed import planning
from vitmed.data import pipeline, sources
from vitmed.runs import machine, processes
from vitmed.training import outcome as outcomes
from vitmed.training import programs, sharding

MOST_BYTES = 4 * 2**30  # of all splits together, on the host


@dataclasses.dataclass(frozen=True)
class Cached:
    """A recipe and a data set that begin at the features, the seconds that each split's took, and those of the compilation."""

    recipe: programs.Recipe
    dataset: sources.Dataset
    seconds: dict[str, float]
    compile_seconds: float

    def counted(self, outcome: outcomes.Outcome) -> outcomes.Outcome:
        """An outcome with what the features took: a test image costs each run the whole network, though here it was computed once."""
        return dataclasses.replace(
            outcome,
            train_seconds=outcome.train_seconds + self.seconds["train"] + self.seconds["val"],
            test_seconds=outcome.test_seconds + len(self.recipe.seeds) * self.seconds["test"],
            compile_seconds=outcome.compile_seconds + self.compile_seconds,
        )


def fixed(planned: planning.Experiment) -> bool:
    """Whether features are the same in every epoch and enough: a head alone is trained, without masks, on images as they are."""
    config = planned.config
    still = not planned.augmentation.acts and not config.train.mixup and not config.train.mask_weight and not config.model.drop_path
    return planned.tuning.name == "head" and still and not planned.patch_sizes


def cached(planned: planning.Experiment, recipe: programs.Recipe, dataset: sources.Dataset, *, check: Callable[[], None]) -> Cached | None:
    """The data set as features [N, M, D], and the recipe for them; None where they change, are too many, or processes share a run.

    `check` is called before every batch; what it raises ends it.
    """
    if not fixed(planned) or processes.count() > 1:
        return None
    rows = _rows(recipe, dataset)
    total = sum(len(split.labels) for split in dataset.splits.values()) * math.prod(rows) * np.dtype(np.float32).itemsize
    if total > MOST_BYTES:
        print(f"vitmed: features of {total / 1e9:.1f} GB are not kept; every epoch computes them again", file=sys.stderr)
        return None
    program, compile_seconds = _compiled(recipe, dataset, planned.config.eval.batch_size)
    splits, seconds = {}, {}
    for name, split in dataset.splits.items():
        started = time.perf_counter()
        features = []
        for batch, real in pipeline.evaluation_batches(split.images, split.labels, batch_size=planned.config.eval.batch_size):
            check()
            features.append(np.asarray(program(batch["images"]))[:real])
        splits[name] = dataclasses.replace(split, images=np.concatenate(features) if features else np.zeros((0, *rows), np.float32))
        seconds[name] = time.perf_counter() - started
    begun = dataclasses.replace(
        recipe, apply=functools.partial(recipe.apply, stage="classify"), prepare=_as_they_are, micro_batch_size=None, lanes=1
    )
    return Cached(begun, dataclasses.replace(dataset, splits=splits), seconds, compile_seconds)


def _as_they_are(features: jax.Array, augment: Any = None) -> jax.Array:
    del augment  # which changes nothing
    return features


def _features(recipe: programs.Recipe, base: Any, images: jax.Array) -> jax.Array:
    return recipe.apply({"params": base}, recipe.prepare(images), stage="features").astype(np.float32)


def _rows(recipe: programs.Recipe, dataset: sources.Dataset) -> tuple[int, ...]:
    """[M, D] of one example."""
    one = jax.ShapeDtypeStruct((1, *dataset.splits["train"].images.shape[1:]), np.uint8)
    return jax.eval_shape(functools.partial(_features, recipe), recipe.base, one).shape[1:]


def _compiled(recipe: programs.Recipe, dataset: sources.Dataset, batch_size: int) -> tuple[Any, float]:
    """(the program from images uint8 [B, *S, C] to features, seconds)."""
    place = sharding.batch(recipe.mesh, axis=0)
    images = jax.ShapeDtypeStruct((batch_size, *dataset.splits["train"].images.shape[1:]), np.uint8, sharding=place)
    started = time.perf_counter()
    compiled = machine.compiled(jax.jit(functools.partial(_features, recipe)).lower(recipe.base, images))
    return lambda batch: compiled(recipe.base, jax.device_put(batch, place)), time.perf_counter() - started
