"""The compiled programs of one training: make the state, make a chunk of steps, keep the best, predict a batch.

Each is jitted once over a mesh with explicit shardings, in three moves: abstract shapes, shardings from shapes, `jit` with them.
Shapes: `R` runs (seeds), `K` steps of a chunk, `B` batch, `*S` spatial, `C` channels, `L` labels, `Q` classes.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vitmed.models import adapters
from vitmed.runs import machine
from vitmed.training import augment, sharding, step, tasks

# Tokens that go through the model at a time on a CPU, so that caches hold a block's activations: of 400 to 1,600 the fastest for ViT-Ti.
CPU_TOKENS = 850
# Tokens of each of two lanes, and of both together from which on they are worth the time that they take to compile.
LANE_TOKENS, FEWEST_TOKENS = 700, 250


class MicroBatches(NamedTuple):
    """How many images of a step go through the model at a time, and in how many lanes."""

    micro_batch_size: int
    lanes: int


def micro_batches(
    platform: str, *, batch_size: int, num_tokens: int, split: int = 1, devices: int = 1, micro_batch_size: int = 0
) -> MicroBatches:
    """How a step is cut up: with a `micro_batch_size` of 0 on a CPU as suits its caches, elsewhere all images go at a time.

    A size that is chosen here divides the batch, and over the `split` that `devices` make of it. In two lanes go the images of a CPU that
    is one device, where two or more fit each and there are enough of them: two cores that share every operation wait for each other at its
    end, and small products gain little from the second one. It was measured on two cores.
    """
    if platform != "cpu":
        return MicroBatches(micro_batch_size or batch_size, 1)

    def largest(most: int, *, lanes: int) -> int:
        step = split * lanes
        sizes = (size for size in range(step, batch_size + 1, step) if batch_size % size == 0 and size // step <= most)
        return max(sizes, default=step)

    two = micro_batch_size or largest(LANE_TOKENS // num_tokens, lanes=2)
    if devices == 1 and two % 2 == 0 and batch_size % two == 0 and 2 * num_tokens <= LANE_TOKENS and two * num_tokens >= FEWEST_TOKENS:
        return MicroBatches(two, 2)
    # Two images where at least one fits: at 785 tokens one at a time took 7 % longer, with twice as many sums of gradients.
    most = max(CPU_TOKENS // num_tokens, 2 if num_tokens <= CPU_TOKENS else 1)
    return MicroBatches(micro_batch_size or largest(most, lanes=1), 1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained and how: pure functions and plain values, nothing of files or configs.

    `init(key)` gives one run's parameters; `apply` is the model's; `prepare` turns uint8 images into its input. `tuning` says which of
    the parameters are trained; the others are the `base`, which all runs share, already on the devices. `mapped` takes the runs one after
    another within the program instead of as one batched program. `micro_batch_size`, `lanes`, `objective`, `mixup`, `mask_weight` and
    `ema_decay` (0: there is no average) are `step.train_step`'s, `patience` is `step.keep_best`'s. A network of several patch sizes has
    `forms`, a recipe for each, of which the `own`-th is that of this one's patch size.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]
    prepare: Callable[..., jax.Array]
    task: tasks.Task
    optimizer: optax.GradientTransformation
    augmentation: augment.Augmentation
    seeds: tuple[int, ...]
    mesh: jax.sharding.Mesh
    mapped: bool
    micro_batch_size: int | None = None
    lanes: int = 1
    objective: tasks.Objective | None = None
    mixup: float = 0.0
    mask_weight: float = 0.0
    ema_decay: float = 0.0
    patience: int = 0
    tuning: adapters.Tuning = adapters.ALL
    base: Any = dataclasses.field(default_factory=dict)
    forms: tuple["Recipe", ...] = ()
    own: int = 0

    @property
    def each(self) -> tuple["Recipe", ...]:
        """The recipes of the network's patch sizes, which share the state: a chunk is made by one of them; of one alone, this."""
        return self.forms or (self,)

    def create(self, seeds: jax.Array, start: Any = None, *, complete: bool = False) -> tuple[step.TrainState, step.Best]:
        """The state [R, ...] of seeds [R] before the first step, as a function to trace; `start`: parameters, the same for all runs.

        What is trained and not in `start` is drawn, all of it where that is None and nothing where it is `complete`.
        """

        def one(seed: jax.Array, start: Any) -> tuple[step.TrainState, step.Best]:
            drawn = {} if complete else adapters.split(self.init(jax.random.key(seed)), self.tuning)[1]
            return step.create(adapters.join(drawn, start or {}), self.optimizer, averaged=self.ema_decay > 0)

        return step.over_runs(one, mapped=self.mapped, shared=(1,))(seeds, start)

    def seed_array(self) -> np.ndarray:
        """The seeds [R] as programs take them: an argument, so that other seeds are no other program."""
        return np.asarray(self.seeds, np.uint32)

    @functools.cached_property
    def abstract(self) -> tuple[step.TrainState, step.Best]:
        """Shapes, dtypes and shardings of (state, best): what a checkpoint is restored into."""
        shapes = jax.eval_shape(self.create, self.seed_array())
        shardings = sharding.state(self.mesh, shapes)
        return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings)


def create(recipe: Recipe, start: Any = None) -> tuple[step.TrainState, step.Best]:
    """The state before the first step, made where it will live: from `start`, or from fresh parameters by seed where it is None."""
    places = jax.tree.map(lambda leaf: leaf.sharding, recipe.abstract)
    complete = jax.tree.structure(start) == jax.tree.structure(recipe.abstract[0].params)
    jitted = jax.jit(functools.partial(recipe.create, complete=complete), out_shardings=places)
    seeds = recipe.seed_array()
    return machine.compiled(jitted.lower(seeds, start))(seeds, start)


def compile_chunk(
    recipe: Recipe, batches: dict[str, np.ndarray], resident: dict[str, Any], *, batch_size: int | None = None
) -> tuple[Callable[..., Any], float]:
    """Compile the training program for batches [R, K, B, ...] of these shapes: (program, seconds it took).

    The program takes (state, batches, num_steps, resident), gives (state, losses [R, K]) and consumes the state it is given; `memory` on it
    is XLA's own account of the bytes that it takes of a device. Where several processes share a batch, B are this one's examples and
    `batch_size` are all of them.
    """
    train_step = functools.partial(
        step.train_step,
        apply=recipe.apply,
        prepare=recipe.prepare,
        task=recipe.task,
        optimizer=recipe.optimizer,
        augmentation=recipe.augmentation,
        micro_batch_size=recipe.micro_batch_size,
        lanes=recipe.lanes,
        objective=recipe.objective,
        mixup=recipe.mixup,
        mask_weight=recipe.mask_weight,
        ema_decay=recipe.ema_decay,
    )
    make = step.make_chunk(train_step, mapped=recipe.mapped)
    state, _ = recipe.abstract
    everywhere = sharding.replicated(recipe.mesh)
    split = sharding.batch(recipe.mesh, axis=2)
    batch_size = batch_size or batches["mask"].shape[2]
    shapes = {name: jax.ShapeDtypeStruct((*array.shape[:2], batch_size, *array.shape[3:]), array.dtype) for name, array in batches.items()}

    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    arguments = (places, everywhere, split, everywhere, everywhere, _places(recipe.base))
    jitted = jax.jit(make, in_shardings=arguments, out_shardings=(places, everywhere), donate_argnums=0)
    seeds = sharding.put(recipe.seed_array(), everywhere)
    started = time.perf_counter()
    compiled = machine.compiled(jitted.lower(state, seeds, shapes, jax.ShapeDtypeStruct((), jnp.int32), _shapes(resident), recipe.base))
    seconds = time.perf_counter() - started

    def program(state: step.TrainState, batches: Any, num_steps: int, resident: Any) -> tuple[step.TrainState, jax.Array]:
        placed = sharding.put(batches, split, axis=2, batch_size=batch_size)
        return compiled(state, seeds, placed, sharding.put(np.int32(num_steps), everywhere), resident, recipe.base)

    program.memory = compiled.memory_analysis()
    return program, seconds


def compile_predict(recipe: Recipe, images: np.ndarray, labels: np.ndarray, *, batch_size: int) -> tuple[Callable[..., Any], float]:
    """Compile prediction by all runs for batches of examples like these: (program, seconds).

    The program takes (params [R, ...], batch {images [B, *S, C], labels [B, L]}) and gives (probabilities [R, B, Q], losses [R, B]).
    """
    predict = functools.partial(step.predict_step, apply=recipe.apply, prepare=recipe.prepare, task=recipe.task)
    _, best = recipe.abstract
    everywhere = sharding.replicated(recipe.mesh)
    split = sharding.batch(recipe.mesh, axis=0)
    places = jax.tree.map(lambda leaf: leaf.sharding, best.params)
    jitted = jax.jit(
        step.over_runs(predict, mapped=recipe.mapped, shared=(1, 2)),
        in_shardings=(places, split, _places(recipe.base)),
        out_shardings=(everywhere, everywhere),
    )
    started = time.perf_counter()
    arrays = {"images": images, "labels": labels}
    batch = {name: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype) for name, array in arrays.items()}
    compiled = machine.compiled(jitted.lower(best.params, batch, recipe.base))
    seconds = time.perf_counter() - started

    def program(params: Any, batch: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
        return compiled(params, sharding.put(batch, split, axis=0, batch_size=batch_size), recipe.base)

    return program, seconds


def whole(recipe: Recipe, arrays: Any) -> Any:
    """Arrays of the state on the host, wherever their parts lie; all processes of a run must ask.

    What other processes hold is gathered one array at a time: all of them may not fit a device.
    """
    gather = jax.jit(lambda array: array, out_shardings=sharding.replicated(recipe.mesh))
    return jax.tree.map(lambda array: np.asarray(array if array.is_fully_addressable else gather(array)), arrays)


def keep_best(recipe: Recipe) -> Callable[[step.Best, step.TrainState, np.ndarray, int], step.Best]:
    """The program (best, state, validation losses [R], epoch) -> best."""
    places = jax.tree.map(lambda leaf: leaf.sharding, recipe.abstract[1])
    runs = step.over_runs(functools.partial(step.keep_best, patience=recipe.patience), mapped=False, shared=(3,))
    jitted = jax.jit(runs, out_shardings=places, donate_argnums=0)
    return lambda best, state, losses, epoch: jitted(best, state, np.asarray(losses, np.float32), np.int32(epoch))


def _places(arrays: Any) -> Any:
    return jax.tree.map(lambda array: array.sharding, arrays)


def _shapes(arrays: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
