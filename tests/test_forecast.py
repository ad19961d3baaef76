"""What runs are said to cost, against devices of made-up sizes and against a program that is compiled here."""

import ctypes
import math
import os
import pathlib

import jax
import numpy as np
import pytest

from vitmed import budget, config, cost, experiment, forecast
from vitmed.runs import machine
from vitmed.training import programs

ROOT = pathlib.Path(__file__).parent.parent
CPU = machine.Device("cpu", "cpu (made up)", 1, 16 * 10**9)
GPU = machine.Device("gpu", "NVIDIA of a test", 1, 16 * 10**9)


def planned(argument: str, *, file: str = "vit2d", **overrides: str) -> experiment.Experiment:
    given = {name.replace("__", "."): value for name, value in overrides.items()}
    return forecast.outline(config.load(f"{ROOT}/configs/{file}.py:{argument}", given))


def test_the_estimate_is_near_what_the_compiler_takes(monkeypatch):
    """Of the step: on a CPU the process, the checkpoint's copies and the data come on top, which the compiler does not know."""
    compiled = []

    def remembered(self, *arguments, real=jax.stages.Lowered.compile, **named):
        compiled.append(real(self, *arguments, **named))
        return compiled[-1]

    plan = planned(
        "dataset=phantom3d,patch=7,variant=vit_micro",
        file="vit3d",
        train__batch_size="32",
        train__micro_batch_size="8",
        eval__batch_size="1",
    )
    batches = {"mask": np.ones((3, 1, 32), bool), "indices": np.zeros((3, 1, 32), np.int32)}
    resident = {"images": jax.ShapeDtypeStruct((600, 28, 28, 28, 1), np.uint8), "labels": jax.ShapeDtypeStruct((600, 1), np.int32)}
    monkeypatch.setattr(jax.stages.Lowered, "compile", remembered)
    recipe = experiment.recipe(plan, steps_per_epoch=1)
    programs.compile_chunk(recipe, batches, resident)
    analysis = compiled[0].memory_analysis()
    params = 4 * cost.num_params(**plan.shape)
    taken = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + 3 * params  # and the best parameters
    least, likely = budget.memory(plan, CPU)
    besides = budget.PROCESS_BYTES + budget.CHECKPOINT_COPIES * budget.COPIES_OF_PARAMETERS * 3 * params + 900 * 28**3
    assert likely - besides == pytest.approx(taken, rel=0.15)
    assert least < 0.8 * taken


def test_what_compiling_took_is_given_back():
    """Freed memory between pieces that are held, as a compilation leaves it, is the system's once a program is compiled."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("only glibc keeps freed memory, and gives it back when told")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    size, pieces = 2**16, []
    for _ in range(1600):  # 100 MB, below the size that malloc maps apart
        pieces.append(libc.malloc(size))
        ctypes.memset(pieces[-1], 1, size)
    for piece in pieces[:-1]:
        libc.free(piece)
    lowered = jax.jit(lambda x: 2 * x).lower(np.float32(1))
    before = resident_bytes()
    program = machine.compiled(lowered)
    assert resident_bytes() < before - 50 * 2**20
    assert program(np.float32(3)) == 6
    libc.free(pieces[-1])


def resident_bytes() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_more_seeds_devices_and_data_change_memory_as_they_must():
    one, three = (planned("patch=4", seeds=seeds) for seeds in ("0", "0,1,2"))
    assert budget.memory(three, GPU).likely > 2.9 * budget.memory(one, GPU).likely  # computed at once
    assert budget.memory(three, CPU).least < 2.9 * budget.memory(one, CPU).least  # one after another
    assert budget.memory(one, GPU._replace(count=8)).least < budget.memory(one, GPU).least  # the batch is split
    sharded = planned("patch=4", seeds="0", mesh__fsdp="4")
    assert budget.memory(sharded, GPU._replace(count=4)).least < 0.5 * budget.memory(one, GPU).least
    path, streamed = (planned("dataset=pathmnist,patch=4", data__placement=where) for where in ("device", "host"))
    assert budget.memory(path, GPU).least - budget.memory(streamed, GPU).least == 89_996 * 28 * 28 * 3


def test_attention_that_keeps_no_weights_is_counted_without_them():
    plain, blockwise = (planned("patch=1", model__attention=form) for form in ("plain", "blockwise"))
    weights = 8 * 12 * 3 * 785**2 * 4  # batch, blocks, heads, tokens, bytes
    assert budget.memory(plain, GPU).least - budget.memory(blockwise, GPU).least == 3 * weights
    assert budget.memory(planned("patch=1"), CPU) == budget.memory(blockwise, CPU)


def test_as_little_is_computed_again_as_fits():
    def chosen(gigabytes, patch="1", device=GPU, **overrides):
        memory = gigabytes and gigabytes * 10**9
        return budget.remat(planned(f"patch={patch}", file="vit3d", seeds="0", **overrides), device._replace(memory_bytes=memory))

    plain = {"model__attention": "plain", "eval__batch_size": "1"}
    by_size = {size: chosen(size, patch="2", **plain) for size in (60, 12, 4, 1, None)}  # 15.1, 5.3 and 1.7 GB; nothing fits 1
    assert by_size == {60: "none", 12: "attention", 4: "blocks", 1: "blocks", None: "none"}
    assert [chosen(size) for size in (80, 40)] == ["none", "blocks"]  # nothing to gain from attention's weights, which blockwise keeps not
    assert chosen(40, model__dtype="bfloat16") == "none"
    assert chosen(16, device=CPU, train__batch_size="1", eval__batch_size="1") == "none"
    assert chosen(80, train__remat="blocks") == "blocks"
    assert chosen(1, train__remat="none") == "none"
    assert [chosen(1, train__remat="attention", model__attention=form) for form in ("plain", "blockwise")] == ["attention", "none"]
    volume = planned("patch=1", file="vit3d", seeds="0")  # batch 8, float32
    small, large = (budget.memory(volume, GPU._replace(memory_bytes=size)).likely for size in (40 * 10**9, 80 * 10**9))
    assert small < 40 * 10**9 < large


def test_as_many_images_at_a_time_as_suit_the_device():
    def at_a_time(device, count=1, **overrides):
        return budget.micro_batch_size(planned(**overrides), device._replace(count=count))

    assert [at_a_time(CPU, argument=f"patch={patch}") for patch in (28, 4, 2, 1)] == [8, 8, 4, 2]  # 2, 50, 197 and 785 tokens
    assert at_a_time(CPU, argument="patch=2", train__batch_size="6") == 6  # two lanes of three
    assert at_a_time(CPU, argument="patch=1", count=8) == 8  # one on each
    assert at_a_time(CPU, argument="patch=1", file="vit3d") == 1
    assert at_a_time(GPU, argument="patch=1") == 8
    assert at_a_time(GPU, argument="patch=1", train__micro_batch_size="2") == 2
    few, all_of_them = (budget.memory(planned("patch=2", train__micro_batch_size=size, eval__batch_size="1"), CPU) for size in "28")
    assert few.least < all_of_them.least


def test_a_cpu_takes_two_lanes_where_a_step_has_many_tokens_and_each_lane_has_images():
    def lanes(device, count=1, **overrides):
        return budget.micro_batches(planned(**overrides), device._replace(count=count)).lanes

    by_patch = {patch: lanes(CPU, argument=f"patch={patch}", train__batch_size="16") for patch in (28, 14, 7, 2, 1)}
    assert by_patch == {28: 1, 14: 1, 7: 2, 2: 2, 1: 1}  # too few tokens at 28 and 14, too many of one image at 1
    assert [lanes(CPU, argument="patch=2", train__micro_batch_size=size) for size in "128"] == [1, 2, 2]
    assert lanes(CPU, argument="patch=2", train__batch_size="5") == 1
    assert lanes(CPU, argument="patch=2", mesh__sequence="2", count=2) == 1
    assert lanes(CPU, argument="patch=2", count=8) == lanes(GPU, argument="patch=2") == 1
    assert budget.micro_batches(planned("patch=4", train__batch_size="32"), CPU) == (16, 2)  # eight in each
    assert budget.micro_batches(planned("patch=4", train__batch_size="34"), CPU) == (17, 1)  # 34 divides into lanes of one alone


@pytest.mark.parametrize("form", ["plain", "blockwise"])
@pytest.mark.parametrize("method", ["", "attention", "rollout", "gradient"])
def test_as_many_images_are_predicted_at_a_time_as_half_of_a_device_holds(method, form):
    """ViT-Ti at patch 4 of images of one channel: 50 tokens, 3 heads, 12 blocks; three members at once."""
    N, D, M, scores = 50, 192, 768, 4 * 3 * 50**2
    plan = planned("patch=4", model__attention=form)
    each = 14 * N * D * 4 + 2 * scores
    if method in ("attention", "rollout"):
        each += 2 * scores * (12 if method == "rollout" else 1)
    elif method == "gradient":
        inside = 28 * 28 * 3 + 12 * (8 * N * D + 2 * N * M) + 2 * N * D
        each += math.ceil(1.4 * 4 * (inside + (0 if form == "plain" else 12 * 4 * N * D)) + (1.2 * 12 * scores if form == "plain" else 0))
    state = 3 * 4 * cost.num_params(**plan.shape)

    def at_a_time(images, less=0):
        enough = 2 * (state + images * (3 * each + 28 * 28)) - less
        return budget.prediction_batch_size(plan, GPU._replace(memory_bytes=enough), members=3, method=method)

    assert [at_a_time(1), at_a_time(8), at_a_time(8, less=16), at_a_time(1000)] == [1, 8, 4, 256]
    with pytest.raises(config.InputError, match="a single image is likely to take"):
        at_a_time(1, less=16)


def test_the_model_is_built_with_what_the_budget_says(monkeypatch):
    monkeypatch.setattr(machine, "device", lambda: CPU._replace(memory_bytes=1))
    recipe = experiment.recipe(planned("dataset=phantom2d,patch=14,variant=vit_micro"), steps_per_epoch=1)
    assert recipe.apply.__self__.remat == "blocks"
    assert experiment.recipe(planned("patch=2,pretrained="), steps_per_epoch=1).micro_batch_size == 4
    assert experiment.recipe(planned("patch=2,pretrained="), steps_per_epoch=1).lanes == 2


def test_what_cannot_fit_is_refused_with_its_numbers_and_the_remedy():
    volume = planned("patch=1", file="vit3d", model__attention="plain", train__remat="none")
    with pytest.raises(config.InputError) as raised:
        forecast.require_fit(volume, CPU)
    words = ["fracturemnist3d patch 1: ", "73.2 GB", "cpu (made up) has 16.0 GB", "not even train.micro_batch_size=1 fits", "larger patch"]
    assert all(word in str(raised.value) for word in words), raised.value
    image = planned("patch=1", train__batch_size="512", train__micro_batch_size="512", train__remat="none")
    with pytest.raises(config.InputError, match=r"lower train.micro_batch_size \(it is 512\)"):
        forecast.require_fit(image, CPU)
    forecast.require_fit(volume, CPU._replace(memory_bytes=None))  # a device that does not tell


def test_what_may_not_fit_is_said_and_not_refused(capsys):
    between = planned("patch=1", seeds="0", train__remat="none")
    least, likely = budget.memory(between, CPU)
    forecast.require_fit(between, CPU._replace(memory_bytes=(least + likely) // 2))
    line = capsys.readouterr().err
    assert line.startswith("vitmed: breastmnist patch 1 may not fit: it is likely to take ")
    forecast.require_fit(between, CPU._replace(memory_bytes=likely))
    assert capsys.readouterr().err == ""


def test_an_outline_needs_no_weights(monkeypatch):
    monkeypatch.setenv("VITMED_WEIGHTS", "/no/such/folder")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outlined = planned("patch=7,pretrained=no/such.weights")
    assert outlined.network.architecture.width == 192
    assert outlined.gmacs_forward == planned("patch=7,pretrained=").gmacs_forward


def test_the_time_left_follows_the_arithmetic_of_what_is_left():
    results = [{"train_seconds": 10.0, "compile_seconds": 4.0}, {"train_seconds": 30.0, "compile_seconds": 2.0}]
    assert forecast.seconds_left([], [1.0]) is None
    assert forecast.seconds_left(list(zip((1.0, 3.0), results, strict=True)), [2.0, 5.0]) == pytest.approx(10 * 7 + 2 * 3)
    seconds = [forecast.seconds(planned(f"patch={patch}")) for patch in (28, 7, 4, 2, 1)]
    assert seconds == sorted(seconds)
    assert forecast.seconds(planned("patch=4", train__epochs="200")) == pytest.approx(2 * seconds[2], rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (45, "45 s"), (60, "1 min"), (4800, "1 h 20 min"), (3605, "1 h"), (100000, "1 d 3 h"), (3599.7, "1 h")],
)
def test_durations_as_people_say_them(seconds, text):
    assert forecast.duration_text(seconds) == text


def test_memory_is_the_machines_or_what_its_control_groups_leave(tmp_path):
    whole = machine.host_memory_bytes(tmp_path, tmp_path / "absent")
    assert whole > 10**8
    membership = tmp_path / "cgroup"
    for line, file, text, expected in (
        ("0::/job/step\n", "job/memory.max", "5000000\n", 5000000),
        ("0::/job/step\n", "job/step/memory.max", "max\n", 5000000),  # the tighter of its parents' counts
        ("0::/\n", "memory.max", "4000000\n", 4000000),
        ("9:memory:/batch\n", "memory/batch/memory.limit_in_bytes", "3000000\n", 3000000),
        ("9:memory:/batch\n", "memory/memory.limit_in_bytes", f"{2**63}\n", 3000000),  # no limit
    ):
        membership.write_text(line)
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
        assert machine.host_memory_bytes(tmp_path, membership) == expected, file


def test_a_process_of_its_own_tells_the_device(monkeypatch):
    assert machine.device_apart() == machine.device()
    monkeypatch.setattr(machine, "ASK", "raise SystemExit(1)")
    assert machine.device_apart() is None
