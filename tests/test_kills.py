"""A run that is killed, at whatever moment and however often, and started again ends with the bytes of one that was not.

VITMED_KILLS is how many times runs of each rank are killed at random (in `make torture` 25), VITMED_SEED what the moments are drawn from.
"""

import os
import random

import pytest
from killing import Moment

KILLS = int(os.environ.get("VITMED_KILLS", "2"))
SEED = int(os.environ.get("VITMED_SEED", "0"))
KILLS_OF_A_RUN = 5  # at most, then it may finish
MOMENTS = (
    Moment("write", 5, "orbax-checkpoint-tmp"),  # inside the first checkpoint's write
    Moment("write", 0, "sha256.json"),  # between its commit and its seal
    Moment("place", 4),  # in a validation
    Moment("write", 1, "open metrics.jsonl"),
    Moment("write", 40, "orbax-checkpoint-tmp"),  # inside a later checkpoint's write
    Moment("write", 0, "os.rename metrics.jsonl"),  # when it is written but not in its place
    Moment("place", 9),  # in the final validation or the test
    Moment("write", 0, "test.npz"),
    Moment("write", 1, "weights"),
    Moment("write", 1, "result.json"),
)


def test_the_same_command_twice_gives_the_same_bytes(runs2d):
    """Compiled anew and out of the cache."""
    assert runs2d.killer.live(runs2d.path / "again")
    runs2d.require_whole(runs2d.path / "again")


def test_a_run_killed_at_every_kind_of_moment_ends_with_the_same_bytes(runs2d):
    workdir = runs2d.path / "named"
    for moment in MOMENTS:
        assert not runs2d.killer.live(workdir, moment), f"{moment} never came"
    assert not (workdir / "result.json").exists()
    assert runs2d.killer.live(workdir)
    runs2d.require_whole(workdir)


# In 2D a few more moments would add little to those above, and in 3D it is the same code; `make torture` has many.
@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 3] if "VITMED_KILLS" in os.environ else [3])
def test_runs_killed_at_random_end_with_the_same_bytes(rank, request, capsys):
    runs = request.getfixturevalue(f"runs{rank}d")
    rng = random.Random(SEED)
    kills = lives = finished = 0
    while kills < KILLS:
        workdir, of_this_run = runs.path / f"random{finished}", 0
        while of_this_run < min(KILLS_OF_A_RUN, KILLS - kills):
            lives += 1
            if runs.killer.live(workdir, Moment.drawn(rng, seconds=runs.seconds)):
                break
            of_this_run += 1
        kills += of_this_run
        assert runs.killer.live(workdir)
        runs.require_whole(workdir)
        finished += 1
    with capsys.disabled():
        print(f"\n{runs.killer.config.data.name}: VITMED_SEED={SEED}: {finished} runs survived {kills} kills, same bytes")
