"""The train and predict steps: pure functions of one run, and the chunk that maps them over runs and steps.

Shapes: `R` runs (seeds), `K` steps of a chunk, `B` batch, `*S` spatial, `C` channels, `L` labels. Everything in the state has a leading `R`
outside of these functions and none inside: `over_runs` is the only place that adds it.
Randomness is a function of (seed, step) and of nothing else, so that a restored state goes on as if nothing had happened.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vitmed.models import adapters, pixels
from vitmed.training import augment, tasks

ALIVE = -1  # in `failed_at`: no step has failed
SMALL = 2**12  # numbers of an array that is summed with others: below sharding.SMALLEST_SHARDED, so that every device has all of it


@flax.struct.dataclass
class TrainState:
    """What training changes; `failed_at` is the step whose loss or gradient was not finite, or ALIVE."""

    step: jax.Array
    params: Any
    opt_state: Any
    failed_at: jax.Array

    @property
    def measured(self) -> Any:
        """The parameters that validation sees and that are kept as the best ones."""
        return self.params


@flax.struct.dataclass
class AveragedState(TrainState):
    """With an exponential moving average of the parameters; without one there is no such array, in memory or in a checkpoint."""

    average: Any

    @property
    def measured(self) -> Any:
        """The average."""
        return self.average


@flax.struct.dataclass
class Best:
    """The parameters with the lowest validation loss so far, that loss, and its epoch (from 1; 0 before the first)."""

    params: Any
    loss: jax.Array
    epoch: jax.Array


def create(params: Any, optimizer: optax.GradientTransformation, *, averaged: bool = False) -> tuple[TrainState, Best]:
    """State before the first step; an average begins as the parameters themselves."""
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(ALIVE))
    if averaged:
        state = AveragedState(**vars(state), average=jax.tree.map(jnp.copy, params))
    return state, Best(jax.tree.map(jnp.copy, params), jnp.float32(jnp.inf), jnp.int32(0))


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    seed: jax.Array,
    base: Any = None,
    *,
    apply: Callable[..., jax.Array],
    prepare: Callable[..., jax.Array],
    task: tasks.Task,
    optimizer: optax.GradientTransformation,
    augmentation: augment.Augmentation,
    micro_batch_size: int | None = None,
    lanes: int = 1,
    objective: tasks.Objective | None = None,
    mixup: float = 0.0,
    mask_weight: float = 0.0,
    ema_decay: float = 0.0,
) -> tuple[TrainState, jax.Array]:
    """One step of one run: batch {images uint8 [B, *S, C], labels [B, L], mask [B]} -> (state, loss).

    `apply` takes the parameters of `base`, which stay as they are, and of the state together; without a frozen base there are none.
    `micro_batch_size` images (a divisor of B; None: all) go through the model at a time, and their gradients are summed: less memory, and
    where caches are small less time, for the same step. They do so in `lanes` (a divisor of them) that have nothing but parameters in
    common, which cores of a CPU compute side by side. `objective` is what is minimised, None for the mean of the task's own loss; with
    `mixup` (`augment.mix`'s alpha) its targets must be numbers. With a `mask_weight` the batch has lesions [B, *S], which `apply` also
    finds, and so many times the mean of `pixels.loss` over the images that have some is added. The average of an AveragedState becomes
    `ema_decay` times itself and the rest of the new parameters.

    A loss or gradient that is not finite leaves the state as it was before, for good; the loss then reads NaN. So does a gradient whose
    squared norm overflows, as Adam's second moment would: an update from what is let through is finite, as long as epsilon is positive.
    """
    objective = objective or tasks.plain(task)
    step_key = jax.random.fold_in(jax.random.key(seed), state.step)
    augment_key, drop_key = jax.random.split(step_key)
    images = prepare(batch["images"], augment=lambda values: augment.apply(augment_key, values, augmentation))
    targets = objective.targets(batch["labels"])
    if mixup:
        # 2: beside the two keys above, which are those of 0 and 1.
        images, targets = augment.mix(jax.random.fold_in(step_key, 2), images, targets, batch["mask"], alpha=mixup)
    total = objective.total(targets, batch["mask"])
    prepared = {**batch, "images": images, "labels": targets}
    if mask_weight:
        prepared["lesions"] = augment.moved(augment_key, batch["lesions"], augmentation)
        drawn = (prepared["lesions"].reshape(len(targets), -1).any(axis=1) & batch["mask"]).sum()

    def loss_of(params: Any, part: dict[str, jax.Array], drop_key: jax.Array) -> jax.Array:
        how = {"train": True, "rngs": {"drop_path": drop_key}}
        whole = {"params": adapters.join(base, params)}
        if not mask_weight:
            logits = apply(whole, part["images"], **how)
            return tasks.masked_mean(objective.loss(logits, part["labels"]), part["mask"], total)
        logits, found = apply(whole, part["images"], masks=True, **how)
        of_pixels = tasks.masked_mean(pixels.loss(found, part["lesions"]), part["mask"], drawn)
        return tasks.masked_mean(objective.loss(logits, part["labels"]), part["mask"], total) + mask_weight * of_pixels

    loss, gradients = _accumulate(jax.value_and_grad(loss_of), state.params, prepared, drop_key, size=micro_batch_size, lanes=lanes)
    alive = state.failed_at == ALIVE
    good = alive & jnp.isfinite(loss) & jnp.isfinite(_sum_of_squares(gradients))

    def move(state: TrainState) -> TrainState:
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        moved = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        if isinstance(state, AveragedState):
            moved = moved.replace(average=optax.incremental_update(params, state.average, 1 - ema_decay))
        return moved

    def stay(state: TrainState) -> TrainState:
        return state.replace(failed_at=jnp.where(alive, state.step, state.failed_at))

    # A branch and no selection between two states: on a CPU, choosing element by element took longer than AdamW itself, and half of a step
    # of few tokens.
    return jax.lax.cond(good, move, stay, state), jnp.where(good, loss, jnp.nan)


def _accumulate(
    loss_and_gradient: Callable[..., tuple[jax.Array, Any]],
    params: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
    *,
    size: int | None,
    lanes: int,
) -> tuple[jax.Array, Any]:
    """The sums over micro-batches, and in each over lanes, of a function of (params, images, key), each with a key of its own."""
    batch_size = len(batch["mask"])
    parts = batch_size // (size or batch_size)

    def of_part(part: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Any]:
        if lanes == 1:
            return loss_and_gradient(params, part, key)
        own = [jax.tree.map(lambda array, index=index: array[index::lanes], part) for index in range(lanes)]
        once = jax.jit(loss_and_gradient)  # so that all lanes are traced and lowered as one
        first, *others = map(functools.partial(once, params), own, jax.random.split(key, lanes))
        return jax.tree.map(lambda *terms: sum(terms[1:], terms[0]), first, *others)

    if parts == 1:
        return of_part(batch, key)
    # Part i takes every parts-th example from i on: where devices share a batch, each then has its share of every part.
    split = jax.tree.map(lambda array: jnp.moveaxis(array.reshape(-1, parts, *array.shape[1:]), 1, 0), batch)

    def add(sums: tuple[jax.Array, Any], part: tuple[dict[str, jax.Array], jax.Array]) -> tuple[tuple[jax.Array, Any], None]:
        return jax.tree.map(jnp.add, sums, of_part(*part)), None

    nothing = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, nothing, (split, jax.random.split(key, parts)))[0]


def _sum_of_squares(arrays: Any) -> jax.Array:
    """Over a tree of arrays, the small ones as one: three quarters of a ViT's are, and each would be three kernels to compile and start."""
    leaves = jax.tree.leaves(arrays)
    small = [leaf.ravel() for leaf in leaves if leaf.size < SMALL]
    parts = [leaf for leaf in leaves if leaf.size >= SMALL] + ([jnp.concatenate(small)] if small else [])
    return sum(jnp.square(part.astype(jnp.float32)).sum() for part in parts)


def predict_step(
    params: Any,
    batch: dict[str, jax.Array],
    base: Any = None,
    *,
    apply: Callable[..., jax.Array],
    prepare: Callable[..., jax.Array],
    task: tasks.Task,
) -> tuple[jax.Array, jax.Array]:
    """One batch through one run's model: (probabilities [B, K], loss of each example [B]), both float32."""
    logits = apply({"params": adapters.join(base, params)}, prepare(batch["images"]))
    return task.probabilities(logits), task.loss(logits, batch["labels"])


def keep_best(best: Best, state: TrainState, loss: jax.Array, epoch: jax.Array, *, patience: int = 0) -> Best:
    """The better of one run's best and its present parameters, by validation loss; a failed run keeps what it has.

    So does one that had no better loss for `patience` epochs (0: of any number), so that how long other runs go on changes nothing for it.
    """
    better = (loss < best.loss) & (state.failed_at == ALIVE)
    if patience:
        better &= epoch - 1 - best.epoch < patience
    return jax.tree.map(lambda new, old: jnp.where(better, new, old), Best(state.measured, loss, epoch), best)


def over_runs(function: Callable[..., Any], *, mapped: bool, shared: tuple[int, ...] = ()) -> Callable[..., Any]:
    """Give a function of one run a leading axis R on every argument but the `shared` ones and on every result.

    `mapped` runs them one after another (`lax.map`), else as one batched program (`vmap`); they agree to float tolerance.
    """

    def call(*arguments: Any) -> Any:
        own = [argument for index, argument in enumerate(arguments) if index not in shared]

        def one(own_of_run: list[Any]) -> Any:
            rest = iter(own_of_run)
            return function(*(argument if index in shared else next(rest) for index, argument in enumerate(arguments)))

        return jax.lax.map(one, own) if mapped else jax.vmap(one)(own)

    return call


def chunk(
    state: TrainState,
    seed: jax.Array,
    batches: dict[str, jax.Array],
    num_steps: jax.Array,
    resident: dict[str, jax.Array],
    base: Any = None,
    *,
    train_step: Callable[..., tuple[TrainState, jax.Array]],
) -> tuple[TrainState, jax.Array]:
    """`num_steps` (at most K) steps of one run -> (state, losses [K], NaN where no step was made).

    `batches` holds mask [K, B] and either indices [K, B] into the `resident` split {images [N, *S, C], labels [N, L]}, or the images and
    labels themselves [K, B, ...]. The number of steps is an argument, not a shape: every chunk of a run is the same compiled program.
    """
    capacity = batches["mask"].shape[0]

    def body(index: jax.Array, carry: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
        state, losses = carry
        batch = jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, index, keepdims=False), batches)
        if resident:
            indices = batch.pop("indices")
            batch |= {name: jnp.take(array, indices, axis=0) for name, array in resident.items()}
        state, loss = train_step(state, batch, seed, base)
        return state, losses.at[index].set(loss)

    return jax.lax.fori_loop(0, num_steps, body, (state, jnp.full((capacity,), jnp.nan)))


def make_chunk(train_step: Callable[..., tuple[TrainState, jax.Array]], *, mapped: bool) -> Callable[..., tuple[TrainState, jax.Array]]:
    """The chunk over all runs: (state, seeds [R], batches [R, K, B, ...], num_steps, resident, base) -> (state, losses [R, K])."""
    return over_runs(functools.partial(chunk, train_step=train_step), mapped=mapped, shared=(3, 4, 5))
