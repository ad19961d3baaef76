"""Which examples each step sees: a pure function of (seed, step), computed by grain ahead of the device.

Shapes: `R` runs (seeds), `K` steps of a chunk, `B` batch, `N` examples, `*S` spatial, `C` channels, `L` labels.
An epoch is ceil(N / B) steps over a permutation of its own; the last batch is filled up with examples that the mask leaves out, so
every example counts exactly once. The balanced sampler gives an epoch as many examples, of all classes alike. Chunks never cross an
epoch and follow from the plan alone, never from timing: to resume is to start at a chunk's number.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np

# Chunks prepared ahead while the device computes; one more than what is in use, and one more to absorb a slow gather.
PREFETCHED_CHUNKS = 2
SAMPLERS = ("shuffled", "balanced")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of a training: `steps_per_chunk` is the most that one call of the device makes, `sampler` one of SAMPLERS."""

    num_examples: int
    batch_size: int
    epochs: int
    steps_per_chunk: int
    sampler: str = "shuffled"

    @property
    def steps_per_epoch(self) -> int:
        """ceil(N / B): PyTorch's count with its last, smaller batch."""
        return math.ceil(self.num_examples / self.batch_size)

    @property
    def chunks_per_epoch(self) -> int:
        """Calls of the device per epoch."""
        return math.ceil(self.steps_per_epoch / self.steps_per_chunk)

    @property
    def num_chunks(self) -> int:
        """Calls of the device in the whole training."""
        return self.epochs * self.chunks_per_epoch

    def position(self, chunk: int) -> tuple[int, int, int]:
        """Of chunk number `chunk`: its epoch (from 0), its first step in that epoch and the step after its last."""
        epoch, index = divmod(chunk, self.chunks_per_epoch)
        first = index * self.steps_per_chunk
        return epoch, first, min(first + self.steps_per_chunk, self.steps_per_epoch)

    def steps_before(self, chunk: int) -> int:
        """Steps of the whole training that come before chunk number `chunk`."""
        epoch, first, _ = self.position(chunk)
        return epoch * self.steps_per_epoch + first

    def ends_epoch(self, chunk: int) -> bool:
        """Whether the epoch is complete after this chunk."""
        return (chunk + 1) % self.chunks_per_epoch == 0

    def chunks_of_epoch(self, epoch: int) -> list[tuple[int, int, int]]:
        """(number, first step, step after the last) of the chunks of an epoch (from 0)."""
        first = epoch * self.chunks_per_epoch
        return [(chunk, *self.position(chunk)[1:]) for chunk in range(first, first + self.chunks_per_epoch)]

    def form(self, chunk: int, number: int) -> int:
        """Which of so many patch sizes chunk number `chunk` is made at: in a round of as many chunks each once, their order is drawn."""
        turn, place = divmod(chunk, number)
        return int(np.random.default_rng((number, turn)).permutation(number)[place])


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One call's data: `batches` has mask [R, K, B] and indices [R, K, B], or images and labels [R, K, B, ...].

    Where several processes share a batch, B are this one's examples; `num_examples` counts those of all that are not masked.
    """

    number: int
    num_steps: int
    num_examples: int
    batches: dict[str, np.ndarray]


@functools.lru_cache(maxsize=64)
def epoch_order(seed: int, *, epoch: int, num_examples: int) -> np.ndarray:
    """The permutation [N] in which a seed sees the examples in an epoch (from 0), another one in every epoch."""
    shuffled = grain.MapDataset.range(num_examples).seed(seed).shuffle().repeat(None, reseed_each_epoch=True)
    order = shuffled.batch(num_examples)[epoch]
    order.flags.writeable = False  # shared by all chunks of the epoch
    return order


def balanced_order(seed: int, *, epoch: int, classes: np.ndarray) -> np.ndarray:
    """N examples [N] for an epoch (from 0) of a seed, of each class among `classes` [N] as many, up to one; which have one more is drawn.

    Of a class every example comes as often as any other, up to once, and the order is random. A function of the arguments alone.
    """
    generator = np.random.default_rng((seed, epoch))
    members = [np.flatnonzero(classes == one) for one in np.unique(classes)]
    share, more = divmod(len(classes), len(members))
    counts = share + (generator.permutation(len(members)) < more)
    drawn = [
        np.concatenate([generator.permutation(of_class) for _ in range(-(-count // len(of_class)))] or [of_class])[:count]
        for count, of_class in zip(counts, members, strict=True)
    ]
    return generator.permutation(np.concatenate(drawn))


def step_indices(order: np.ndarray, *, first: int, stop: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices [stop - first, B] of an epoch's steps and their mask: beyond the epoch's end fillers from its beginning, masked."""
    positions = np.arange(first * batch_size, stop * batch_size).reshape(-1, batch_size)
    return order[positions % len(order)].astype(np.int32), positions < len(order)


def training_chunks(
    plan: Plan,
    seeds: Sequence[int],
    *,
    start: int = 0,
    streamed: Mapping[str, np.ndarray] | None = None,
    own: np.ndarray | slice = slice(None),
    classes: np.ndarray | None = None,
) -> Iterator[Chunk]:
    """The chunks from number `start` on, prepared ahead in a thread; with `streamed` {images, labels} they carry the examples.

    `own` are the examples of each batch that this process feeds. The balanced sampler goes by `classes` [N].
    """

    @functools.lru_cache(maxsize=len(seeds))
    def order(seed: int, epoch: int) -> np.ndarray:
        if plan.sampler == "balanced":
            return balanced_order(seed, epoch=epoch, classes=classes)
        return epoch_order(seed, epoch=epoch, num_examples=plan.num_examples)

    def load(number: int) -> Chunk:
        epoch, first, stop = plan.position(int(number))
        drawn = [step_indices(order(seed, epoch), first=first, stop=stop, batch_size=plan.batch_size) for seed in seeds]
        # Every chunk has the same shape, so that one compiled program serves all; steps after the last are never made.
        missing = ((0, 0), (0, plan.steps_per_chunk - (stop - first)), (0, 0))
        indices = np.pad(np.stack([indices for indices, _ in drawn]), missing)[..., own]
        mask = np.pad(np.stack([mask for _, mask in drawn]), missing)
        batches = {"mask": mask[..., own]}
        if streamed is None:
            batches["indices"] = indices
        else:
            batches |= {name: array[indices] for name, array in streamed.items()}
        return Chunk(int(number), stop - first, int(mask.sum()), batches)

    chunks = grain.MapDataset.range(start, plan.num_chunks).map(load)
    return iter(chunks.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED_CHUNKS)))


def evaluation_batches(
    images: np.ndarray, labels: np.ndarray, *, batch_size: int, own: np.ndarray | slice = slice(None)
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """All N examples in order, as ({images [B, *S, C], labels [B, L]}, how many of them are real); the last batch is filled up.

    `own` are the examples of each batch that this process feeds; how many are real is said of the whole batch.
    """
    for first in range(0, len(images), batch_size):
        real = min(batch_size, len(images) - first)
        filled = np.minimum(np.arange(first, first + batch_size), len(images) - 1)[own]
        yield {"images": images[filled], "labels": labels[filled]}, real
