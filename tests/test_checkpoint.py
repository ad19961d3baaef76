"""Checkpoints: whatever happens to their files, what is restored is what was written, and nothing else is ever trusted or deleted."""

import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitmed import config
from vitmed.runs import checkpoint

SHAPES = {"a": jax.ShapeDtypeStruct((300,), jnp.float32), "n": jax.ShapeDtypeStruct((), jnp.int32)}


def save(path, *steps):
    """Write these steps, each with values of its own, in one process's life."""
    with checkpoint.Checkpoints(path) as checkpoints:
        checkpoints.latest()
        for step in steps:
            state = {"a": jnp.arange(300, dtype=jnp.float32) + step, "n": jnp.int32(step)}
            checkpoints.save(step, state=state, best=state, progress={"chunk": step})


def latest(path, *, read_only=False):
    with checkpoint.Checkpoints(path, read_only=read_only) as checkpoints:
        return checkpoints.latest()


def restored(path, step):
    """The step that the arrays of a checkpoint say they are of."""
    with checkpoint.Checkpoints(path, read_only=True) as checkpoints:
        items = checkpoints.restore(step, state=SHAPES, best=SHAPES, progress=None)
    for item in (items["state"], items["best"]):
        np.testing.assert_array_equal(item["a"], np.arange(300, dtype=np.float32) + int(item["n"]))
    assert items["progress"] == {"chunk": int(items["state"]["n"])}
    return int(items["state"]["n"])


def contents(path: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def files_of(step: pathlib.Path) -> list[pathlib.Path]:
    """The files of a step, the largest first, without the seal."""
    return sorted((file for file in step.rglob("*") if file.is_file() and file.name != checkpoint.SEAL), key=lambda f: -f.stat().st_size)


def flip(step):
    file = files_of(step)[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(step):
    file = files_of(step)[0]
    file.write_bytes(file.read_bytes()[:-1])


def empty(step):
    for file in files_of(step):
        file.write_bytes(b"")


def half_delete(step):
    for file in files_of(step)[::2]:
        file.unlink()


def lose_an_item(step):
    shutil.rmtree(step / "best")


def add(step):
    (step / "state" / "stray").write_bytes(b"")


def break_seal(step):
    (step / checkpoint.SEAL).write_text("{")


def empty_seal(step):
    (step / checkpoint.SEAL).write_text("{}")


def unseal(step):
    (step / checkpoint.SEAL).unlink()


DAMAGES = (flip, truncate, empty, half_delete, lose_an_item, add, break_seal, empty_seal, unseal)
damages = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Steps 1, 2 and 5 were written; the first was deleted for the third."""
    path = tmp_path_factory.mktemp("three") / "checkpoints"
    save(path, 1, 2, 5)
    return path


@pytest.fixture
def path(three, tmp_path):
    """A copy of them."""
    return shutil.copytree(three, tmp_path / "checkpoints")


def test_the_newest_two_are_kept_sealed_and_come_back(path):
    assert sorted(entry.name for entry in path.iterdir() if entry.is_dir()) == ["2", "5"]
    assert [checkpoint.defect(path / name) for name in ("2", "5")] == [None, None]
    assert latest(path) == 5
    assert [restored(path, step) for step in (2, 5)] == [2, 5]
    assert checkpoint.begun(path)


@damages
def test_a_damaged_step_is_passed_over_set_aside_and_never_deleted(path, damage, capsys):
    damage(path / "5")
    damaged, before = contents(path / "5"), contents(path)
    assert latest(path, read_only=True) == 2
    assert contents(path) == before, "a reader changed something"
    assert latest(path) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"vitmed: .*checkpoints: step 5: .+; going on from step 2, the newest intact one; what is broken is kept as broken-\*", line
    )
    assert restored(path, 2) == 2
    save(path, 3, 5, 6, 7)
    assert latest(path) == 7
    aside = list(path.glob(f"{checkpoint.ASIDE}5-*"))
    assert [contents(folder) for folder in aside] == [damaged]
    assert sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdigit()) == [6, 7]


@damages
def test_with_none_intact_nothing_is_touched_and_the_way_out_is_said(path, damage):
    flip(path / "2")
    damage(path / "5")
    before = contents(path)
    with pytest.raises(
        config.InputError, match=r"no intact checkpoint \(step 5: .*; step 2: .* is not what was written\); move the folder"
    ):
        latest(path)
    assert contents(path) == before


def test_what_was_never_sealed_starts_over_aloud_and_is_kept(path, capsys):
    shutil.rmtree(path / "2")
    unseal(path / "5")
    before = contents(path / "5")
    assert not checkpoint.begun(path)
    assert latest(path) is None
    assert "step 5: not sealed (the run ended while it was written); starting over; what is broken is kept" in capsys.readouterr().err
    assert [contents(folder) for folder in path.glob(f"{checkpoint.ASIDE}*")] == [before]


def test_what_is_saved_already_is_not_saved_again(path):
    before = contents(path)
    with checkpoint.Checkpoints(path) as checkpoints:
        checkpoints.save(checkpoints.latest(), state={"a": jnp.zeros(1)}, best={}, progress={})
        assert checkpoints._pending is None
    assert contents(path) == before


def test_what_another_process_left_unsealed_is_never_sealed(path):
    unseal(path / "5")
    with checkpoint.Checkpoints(path) as checkpoints:
        checkpoints.poll()
        checkpoints.finish()
    assert checkpoint.defect(path / "5") is not None


def test_a_step_is_sealed_without_being_asked_for(tmp_path):
    """In the background, as soon as it is written, so that a kill while the device computes does not cost it."""
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        state = {"a": jnp.zeros(300), "n": jnp.int32(1)}
        checkpoints.save(1, state=state, best=state, progress={})
        checkpoints._pending.exception(timeout=60)
        assert checkpoint.defect(tmp_path / "1") is None


def test_an_unfinished_write_of_a_killed_process_is_cleared_away(path):
    shutil.copytree(path / "5", path / "6.orbax-checkpoint-tmp")
    save(path, 6)
    assert latest(path) == 6
    assert sorted(entry.name for entry in path.iterdir() if entry.is_dir()) == ["5", "6"]


def test_a_write_that_fails_is_one_line_at_the_next_look(tmp_path, monkeypatch):
    def broken(step):
        raise OSError(28, "No space left on device")

    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "seal", broken)
    state = {"a": jnp.zeros(300), "n": jnp.int32(2)}
    for look in ("finish", "poll"):
        with checkpoint.Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest() == 1
            checkpoints.save(2, state=state, best=state, progress={})
            checkpoints._pending.exception(timeout=60)
            with pytest.raises(config.MachineError, match=r"could not be written \(.*No space left on device\); make room or"):
                getattr(checkpoints, look)()
    monkeypatch.undo()
    assert latest(tmp_path) == 1
