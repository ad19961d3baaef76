"""Finished runs put to use: restored from their checkpoints without their data, and their networks as programs of stored images.

Shapes: `R` members (the seeds of a run that have not failed), `B` batch, `*S` spatial, `C` channels, `K` classes, `*G` grid of patches.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vitmed import budget, experiment
from vitmed import config as config_lib
from vitmed import fields as fields_lib
from vitmed import start as starts
from vitmed.data import preparation, streaming
from vitmed.models import adapters, explain
from vitmed.runs import checkpoint, folder, machine
from vitmed.study import heatmaps, operating
from vitmed.training import augment, outcome, programs, step

Prediction = Callable[[np.ndarray], np.ndarray]
Heat = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Restored:
    """A run with the best parameters of each of its seeds, [R_all, ...] on the device, and which of these failed."""

    path: pathlib.Path
    planned: experiment.Experiment
    recipe: programs.Recipe
    params: Any
    progress: outcome.Progress

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those that have not failed."""
        return tuple(seed for seed, bad in zip(self.planned.seeds, self.progress.failed, strict=True) if not bad)

    @property
    def failed_seeds(self) -> tuple[int, ...]:
        """The others."""
        return tuple(seed for seed in self.planned.seeds if seed not in self.seeds)

    @functools.cached_property
    def members(self) -> Any:
        """The parameters [R, ...] of the seeds that have not failed."""
        alive = np.array([index for index, bad in enumerate(self.progress.failed) if not bad])
        return jax.tree.map(lambda leaf: leaf[alive], self.params)

    @functools.cached_property
    def calibration(self) -> dict[str, Any] | None:
        """Temperatures and operating points as `operating.of_run` gives them; None of a run that is not finished. InputError."""
        run_folder = folder.RunFolder(self.path)
        if run_folder.read_result() is None:
            return None
        return operating.of_run(run_folder, task=self.planned.description.task, seeds=self.planned.seeds)

    def calibrated(self, probabilities: np.ndarray) -> np.ndarray:
        """Those of the members float32 [R, N, K] -> of their ensemble, calibrated, float64 [N, K]."""
        everyone = np.full((len(self.planned.seeds), *probabilities.shape[1:]), np.nan)
        everyone[~np.array(self.progress.failed)] = probabilities
        return operating.apply(self.calibration, everyone).ensemble

    @property
    def shape(self) -> tuple[int, ...]:
        """[*S, C] of a stored image."""
        return (*self.planned.description.image_size, self.planned.description.num_channels)


def restored_config(run_folder: folder.RunFolder, data_root: str | None, base: str | None = None) -> ml_collections.ConfigDict:
    """The config of a run, looking for its data in `data_root` where given; on one device, wherever the run was trained.

    `base` is where the weights lie that its plugin stands on, if not where they were; InputError where it has no use for any.
    """
    stored = config_lib.as_tuples(fields_lib.completed(run_folder.read_config()))
    fields_lib.conform(stored, f"{run_folder.path}: config.json")
    config = ml_collections.ConfigDict(stored)
    config.mesh.update(data=1, fsdp=1, sequence=1)
    config.tracking.writers = ""  # whose packages need not be here
    if data_root is not None:
        config.data.root = data_root
    if base is not None:
        if config.train.tune == "all":
            raise config_lib.InputError(f"--base={base}: {run_folder.path} is no plugin, all its weights are its own; leave it out")
        config.model.pretrained = base
    return config


def plan(path: pathlib.Path, config: ml_collections.ConfigDict) -> experiment.Experiment:
    """What a run that has begun is, by its own record; InputError where it has not."""
    recorded = experiment.recorded_network(folder.RunFolder(path))
    if recorded is None:  # before pretrained weights are looked for that nothing would need
        raise config_lib.InputError(f"{path}: no checkpoint; train it first with vitmed.main")
    return experiment.plan(config, recorded)


def restore(path: pathlib.Path, planned: experiment.Experiment, *, steps_per_epoch: int) -> Restored:
    """A run with its best parameters and how far it has come; InputError where it has none yet."""
    base = starts.of(planned, begun=True).base
    recipe = experiment.recipe(planned, steps_per_epoch=steps_per_epoch, base=base)
    with checkpoint.Checkpoints(folder.RunFolder(path).checkpoints, read_only=True) as checkpoints:
        latest = checkpoints.latest()
        if latest is None:
            raise config_lib.InputError(f"{path}: no checkpoint; train it first with vitmed.main")
        _, best = recipe.abstract
        items = checkpoints.restore(latest, best=best, progress=None)
    progress = outcome.Progress(**items["progress"])
    if not progress.rows:
        raise config_lib.InputError(f"{path}: no epoch is complete, so there are no best parameters yet; train on with vitmed.main")
    return Restored(path, planned, recipe, items["best"].params, progress)


def open_run(path: pathlib.Path, base: str | None = None) -> Restored:
    """A run to be used, its data left alone; InputError where it has no member that has not failed. `base`: see `restored_config`."""
    planned = plan(path, restored_config(folder.RunFolder(path), None, base))
    schedule = experiment.step_plan(planned, planned.description.num_examples["train"])
    run = restore(path, planned, steps_per_epoch=schedule.steps_per_epoch)
    if not run.seeds:
        raise config_lib.InputError(f"{path}: all its seeds failed; choose another run")
    return run


def check_alike(runs: Sequence[Restored]) -> None:
    """InputError where runs do not make one ensemble: they may differ in all but what is asked of an image."""
    first = runs[0]
    for run in runs[1:]:
        for what, field in (("task", "task"), ("classes", "class_names"), ("rank", "rank")):
            mine, theirs = (getattr(each.planned.description, field) for each in (run, first))
            if mine != theirs:
                raise config_lib.InputError(f"{run.path}: its {what} is {mine}, that of {first.path} is {theirs}; an ensemble shares it")


def predictor(run: Restored, *, batch_size: int, tta: str = "none") -> Prediction:
    """Stored images uint8 [b, *S, C] (b <= B, any number of times the same program) -> probabilities float32 [R, b, K].

    With `tta`, one of `augment.VIEWS`, the mean of the probabilities over what the run's augmentation would show; InputError where that
    contains nothing of the kind.
    """
    views = augment.views(run.planned.augmentation, tta)
    recipe, inverted = run.recipe, run.planned.config.data.invert

    def predict(params: Any, base: Any, images: jax.Array) -> jax.Array:
        images = -images if inverted else images  # in uint8: (256 - x) mod 256
        params = adapters.join(base, params)

        def of_view(view: jax.Array) -> jax.Array:
            return recipe.task.probabilities(recipe.apply({"params": params}, recipe.prepare(view)))

        seen = jnp.stack([view(images) for view in views])
        return jax.lax.map(of_view, seen).mean(axis=0)

    program = _compiled(run, predict, np.empty((batch_size, *run.shape), np.uint8))
    return lambda images: np.asarray(program(_filled(images, batch_size)))[:, : len(images)]


def explainer(run: Restored, *, method: str, batch_size: int) -> Heat:
    """Stored images uint8 [b, *S, C] and classes int [b] -> heat [b, *G] for these by one of `explain.METHODS`: the mean over members."""
    model, recipe, inverted = experiment.build_model(run.planned), run.recipe, run.planned.config.data.invert

    def explained(params: Any, base: Any, images: jax.Array, classes: jax.Array) -> jax.Array:
        prepared = recipe.prepare(-images if inverted else images)
        params = adapters.join(base, params)
        if run.planned.views:
            return model.heat(params, prepared, classes, method=method)
        return explain.heat(model, run.planned.computed_with(params), prepared, classes, method=method)

    program = _compiled(run, explained, np.empty((batch_size, *run.shape), np.uint8), np.empty((batch_size,), np.int32))

    def heat(images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        found = program(_filled(images, batch_size), _filled(np.asarray(classes, np.int32), batch_size))
        return np.asarray(found).mean(axis=0)[: len(images)]

    return heat


def _compiled(run: Restored, function: Callable[..., jax.Array], *shared: np.ndarray) -> Callable[..., jax.Array]:
    """`function` of (parameters, base, ...) over the members, compiled for `shared` arrays of just these shapes: they are its arguments."""
    over = step.over_runs(function, mapped=run.recipe.mapped, shared=tuple(range(1, 2 + len(shared))))
    program = machine.compiled(jax.jit(over).lower(run.members, run.recipe.base, *shared))
    return functools.partial(program, run.members, run.recipe.base)


def _filled(array: np.ndarray, batch_size: int) -> np.ndarray:
    """[b, ...] -> [B, ...], its last entry repeated: one shape is one program."""
    return array[np.minimum(np.arange(batch_size), len(array) - 1)]


def lattice(run: Restored) -> heatmaps.Lattice:
    """Where a run's heat lies in an image: on its patches; of several views, or of one that is not axial, on the voxels."""
    sizes = dataclasses.asdict(run.planned.geometry)
    if run.planned.views not in ((), ("axial",)):
        sizes |= {"patch_size": (1, 1, 1), "kernel_size": (1, 1, 1)}
    return heatmaps.Lattice(**sizes)


class Ensemble:
    """Runs as one: every member of every run counts alike. `method`: one of `explain.METHODS` where heat is wanted, else empty.

    `batch_size` 0 is what suits the device. `calibrated_by` is the run whose calibration holds for the ensemble, or None. `hows` are the
    preparations that the runs need of a file and `shapes` [*S, C] what these make.
    """

    def __init__(self, runs: Sequence[Restored], *, batch_size: int = 0, tta: str = "none", method: str = ""):
        self.runs = runs
        found = {run.planned.preparation: run.shape for run in runs}
        self.hows: tuple[preparation.Preparation, ...] = tuple(found)
        self.shapes = tuple(found.values())
        self._which = [self.hows.index(run.planned.preparation) for run in runs]
        # What was fitted to one run's probabilities says nothing of several runs' mean, nor of a mean over views.
        self.calibrated_by = runs[0] if len(runs) == 1 and tta == "none" and runs[0].calibration else None
        device = machine.device()
        self.batch_size = batch_size or min(
            budget.prediction_batch_size(run.planned, device, members=len(run.seeds), method=method) for run in runs
        )
        self._predictors = [predictor(run, batch_size=self.batch_size, tta=tta) for run in runs]
        self._explainers = [explainer(run, method=method, batch_size=self.batch_size) for run in runs] if method else []
        self._lattices = [lattice(run) for run in runs]

    def probabilities(self, files: Sequence[streaming.Prepared]) -> np.ndarray:
        """float32 [members of all runs, files, K]."""
        return np.concatenate([predict(self._images(run, files)) for run, predict in enumerate(self._predictors)])

    def heat(self, files: Sequence[streaming.Prepared], classes: np.ndarray) -> list[list[np.ndarray]]:
        """For each file the heat [*G] of each run for the file's class."""
        of_runs = [explained(self._images(run, files), classes) for run, explained in enumerate(self._explainers)]
        return [list(of_file) for of_file in zip(*of_runs, strict=True)]

    def spread(self, heat: Sequence[np.ndarray], file: streaming.Prepared, places: Sequence[np.ndarray]) -> np.ndarray:
        """The mean over members of a file's heat, at places in shares of the file's image; spread evenly it would be 1."""
        members = [len(run.seeds) for run in self.runs]
        total = sum(
            count * of_run.size * lattice.spread(of_run, heatmaps.in_prepared(places, file.resampled[which], self.shapes[which][:-1]))
            for count, of_run, lattice, which in zip(members, heat, self._lattices, self._which, strict=True)
        )
        return (total / sum(members)).astype(np.float32)

    def _images(self, run: int, files: Sequence[streaming.Prepared]) -> np.ndarray:
        return np.stack([file.images[self._which[run]] for file in files])
