"""Which examples each step sees: every one once an epoch, a function of (seed, step), whatever the chunks and wherever one starts.

Legend: `R` runs, `K` steps of a chunk, `B` batch, `N` examples.
"""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from vitmed.data import pipeline
from vitmed.training import evaluation

SEEDS = (0, 1, 2**31 - 1)
# (N, B, K): B divides N or not, equals it, exceeds it (also more than twice); K divides an epoch's steps or not, or exceeds them.
SIZES = [(1, 1, 1), (1, 4, 2), (7, 3, 2), (12, 4, 3), (12, 4, 2), (10, 10, 1), (3, 8, 4), (23, 2, 5), (50, 7, 100), (546, 8, 24)]
sizes = pytest.mark.parametrize(("N", "B", "K"), SIZES)


def plan_of(N, B, K, *, epochs=3):
    return pipeline.Plan(num_examples=N, batch_size=B, epochs=epochs, steps_per_chunk=K)


def steps_of(plan, seeds=SEEDS, **more):
    """All steps of all chunks in order: a list of ({name: [R, B, ...]}) without the steps that are never made."""
    return [
        {name: array[:, index] for name, array in chunk.batches.items()}
        for chunk in pipeline.training_chunks(plan, seeds, **more)
        for index in range(chunk.num_steps)
    ]


def seen(step):
    """The examples of one step of each run, fillers left out."""
    return [indices[mask] for indices, mask in zip(step["indices"], step["mask"], strict=True)]


@sizes
def test_every_example_counts_once_in_each_epoch_of_ceil_n_over_b_steps(N, B, K):
    plan = plan_of(N, B, K)
    steps, per_epoch = steps_of(plan), math.ceil(N / B)
    assert plan.steps_per_epoch == per_epoch
    assert len(steps) == 3 * per_epoch
    for epoch in range(3):
        of_epoch = [seen(step) for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch]]
        assert [len(of_step[0]) for of_step in of_epoch[:-1]] == [B] * (per_epoch - 1)  # only the last is not full
        for run in range(len(SEEDS)):
            assert sorted(np.concatenate([of_step[run] for of_step in of_epoch])) == list(range(N))
    assert all(step["indices"].dtype == np.int32 and (step["indices"] >= 0).all() and (step["indices"] < N).all() for step in steps)


@sizes
def test_chunks_have_one_shape_stay_within_an_epoch_and_know_their_place(N, B, K):
    plan = plan_of(N, B, K)
    chunks = list(pipeline.training_chunks(plan, SEEDS))
    assert [chunk.number for chunk in chunks] == list(range(plan.num_chunks))
    done = 0
    for chunk in chunks:
        assert {name: array.shape for name, array in chunk.batches.items()} == dict.fromkeys(("mask", "indices"), (len(SEEDS), K, B))
        assert 1 <= chunk.num_steps <= K
        assert chunk.batches["mask"].dtype == bool
        assert not chunk.batches["mask"][:, chunk.num_steps :].any()
        assert plan.steps_before(chunk.number) == done
        epoch, first, stop = plan.position(chunk.number)
        assert (epoch, first) == divmod(done, plan.steps_per_epoch)
        assert stop - first == chunk.num_steps
        done += chunk.num_steps
        assert plan.ends_epoch(chunk.number) == (done % plan.steps_per_epoch == 0)
        assert stop <= plan.steps_per_epoch
    assert done == 3 * plan.steps_per_epoch == plan.steps_before(plan.num_chunks)


@sizes
def test_to_start_at_a_chunk_is_to_skip_those_before_it(N, B, K):
    plan = plan_of(N, B, K)
    whole = list(pipeline.training_chunks(plan, SEEDS))
    for start in {0, 1, plan.num_chunks // 2, plan.num_chunks - 1, plan.num_chunks}:
        rest = list(pipeline.training_chunks(plan, SEEDS, start=start))
        assert [chunk.number for chunk in rest] == [chunk.number for chunk in whole[start:]]
        for one, other in zip(rest, whole[start:], strict=True):
            assert one.num_steps == other.num_steps
            for name in ("indices", "mask"):
                np.testing.assert_array_equal(one.batches[name], other.batches[name])


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    N, B = 40, 6
    steps = steps_of(plan_of(N, B, 3))
    for K, seeds in ((1, SEEDS), (7, SEEDS), (3, SEEDS[:1])):  # neither on the chunks nor on the other runs
        for one, other in zip(steps_of(plan_of(N, B, K), seeds), steps, strict=True):
            for name in ("indices", "mask"):
                np.testing.assert_array_equal(one[name], other[name][: len(seeds)])
    one_epoch = steps_of(plan_of(N, B, 3, epochs=1))  # nor on how long the training is
    np.testing.assert_array_equal([step["indices"] for step in one_epoch], [step["indices"] for step in steps[: len(one_epoch)]])
    orders = [tuple(pipeline.epoch_order(seed, epoch=epoch, num_examples=N)) for seed in SEEDS for epoch in range(3)]
    assert len(set(orders)) == len(orders)
    assert tuple(range(N)) not in orders
    same_sequence = [tuple(pipeline.epoch_order(1, epoch=epoch, num_examples=N)) for epoch in range(3)]
    assert orders[3:6] == same_sequence


def test_orders_are_shuffled_evenly():
    N, draws = 6, 120
    orders = np.array([pipeline.epoch_order(seed, epoch=epoch, num_examples=N) for seed in range(12) for epoch in range(draws // 12)])
    where = np.array([np.bincount(orders[:, place], minlength=N) for place in range(N)])
    assert stats.chisquare(where.ravel(), ddof=2 * N - 2).pvalue > 1e-3  # every example as often at every place
    after = np.bincount(((orders[:, 1:] - orders[:, :-1]) % N).ravel(), minlength=N)[1:]
    assert stats.chisquare(after).pvalue > 1e-3  # and what follows on an example is any other


@pytest.mark.parametrize(("N", "B", "K"), [(7, 3, 2), (3, 8, 4), (12, 4, 3)])
def test_streamed_chunks_hold_the_examples_that_indices_name(N, B, K):
    rng, plan = np.random.default_rng(0), plan_of(N, B, K)
    split = {"images": rng.integers(0, 256, (N, 2, 3, 1)).astype(np.uint8), "labels": np.arange(N, dtype=np.uint8)[:, None]}
    for streamed, named in zip(
        pipeline.training_chunks(plan, SEEDS, start=1, streamed=split), pipeline.training_chunks(plan, SEEDS, start=1), strict=True
    ):
        assert streamed.batches.keys() == {"mask", "images", "labels"}
        assert (streamed.number, streamed.num_steps) == (named.number, named.num_steps)
        np.testing.assert_array_equal(streamed.batches["mask"], named.batches["mask"])
        for name, array in split.items():
            assert streamed.batches[name].dtype == np.uint8
            np.testing.assert_array_equal(streamed.batches[name], array[named.batches["indices"]])


def test_two_iterators_at_once_do_not_disturb_each_other():
    plan = plan_of(20, 3, 2)
    one, other = (pipeline.training_chunks(plan, seeds) for seeds in (SEEDS, SEEDS[::-1]))
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first.batches["indices"], second.batches["indices"][::-1])


ABANDON = """
import sys, threading
import numpy as np
from vitmed.data import pipeline
plan = pipeline.Plan(num_examples=1000, batch_size=4, epochs=1000, steps_per_chunk=10)
images = np.zeros((1000, 64, 64, 3), np.uint8)
for chunk in pipeline.training_chunks(plan, (0, 1), streamed={"images": images}):
    if chunk.number == 3:
        break
if sys.argv[1] == "dropped":
    import gc, time
    del chunk
    gc.collect()
    until = time.monotonic() + 20
    while threading.active_count() > 1 and time.monotonic() < until:
        time.sleep(0.05)
    print("threads", threading.active_count())
elif sys.argv[1] == "raised":
    raise SystemExit(75)
elif sys.argv[1] == "held":
    held = pipeline.training_chunks(plan, (0, 1), streamed={"images": images})
    next(held)
    print("threads 1")
"""


@pytest.mark.parametrize(("how", "status"), [("dropped", 0), ("held", 0), ("raised", 75)])
def test_an_iterator_left_midway_holds_nobody_up(how, status):
    done = subprocess.run([sys.executable, "-c", ABANDON, how], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr == ""
    assert done.stdout == ("" if how == "raised" else "threads 1\n")


EVALUATED = [(1, 1), (3, 8), (8, 8), (16, 8), (17, 8), (5, 1), (23, 7)]  # (N, B): fewer than a batch, one batch, whole batches, a rest


@pytest.mark.parametrize(("N", "B"), EVALUATED)
def test_evaluation_covers_every_example_once_in_order(N, B):
    images, labels = np.arange(N, dtype=np.uint8).reshape(N, 1, 1, 1), np.arange(2 * N).reshape(N, 2)
    batches = list(pipeline.evaluation_batches(images, labels, batch_size=B))
    assert len(batches) == math.ceil(N / B)
    assert {(batch["images"].shape, batch["labels"].shape) for batch, _ in batches} == {((B, 1, 1, 1), (B, 2))}
    assert [real for _, real in batches[:-1]] == [B] * (len(batches) - 1)
    for name, array in (("images", images), ("labels", labels)):
        np.testing.assert_array_equal(np.concatenate([batch[name][:real] for batch, real in batches]), array)


@pytest.mark.parametrize(("N", "B"), EVALUATED)
def test_predictions_are_those_of_the_real_examples_in_order(N, B):
    images, labels = np.arange(N, dtype=np.uint8).reshape(N, 1, 1, 1), np.zeros((N, 1), np.uint8)
    labels[:, 0] = np.arange(N) % 2
    calls = itertools.count()

    def program(params, batch):
        next(calls)
        values = params[:, None] * batch["images"].reshape(1, -1)
        return np.stack([values, -values], axis=-1).astype(np.float32), (values + batch["labels"][:, 0]).astype(np.float32)

    predicted = evaluation.predict(program, np.array([1.0, 100.0]), images, labels, batch_size=B)
    assert next(calls) == math.ceil(N / B)
    expected = np.outer([1.0, 100.0], np.arange(N))
    np.testing.assert_array_equal(predicted.probabilities, np.stack([expected, -expected], axis=-1))
    np.testing.assert_array_equal(predicted.losses, expected + labels[:, 0])
    np.testing.assert_allclose(evaluation.mean_losses(predicted), (expected + labels[:, 0]).mean(axis=1))
