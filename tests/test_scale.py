"""The plan past this machine: its arithmetic by hand, the one GPU whose times are known, and what bad input is told."""

import pathlib
import re

import pytest

from benchmarks import prediction, scale
from vitmed import budget, cli, cost
from vitmed.runs import machine

ROOT = pathlib.Path(__file__).parent.parent
LONG = f"{ROOT}/configs/vit3d.py:size=64,patch=1"  # 262,145 tokens
BRIEF = {"model.dtype": "bfloat16", "seeds": "0", "eval.batch_size": "8"}
ONE = scale.Mesh(1, 1, 1)


def planned(spec, *, device="h100", mesh=ONE, **overrides):
    given = {name.replace("__", "."): value for name, value in overrides.items()}
    return scale.plan(spec, given, scale.DEVICES[device], mesh)


def estimate(spec, *, device="h100", mesh=ONE, **overrides):
    return scale.estimate(planned(spec, device=device, mesh=mesh, **overrides), scale.DEVICES[device], mesh)


def said(capsys, *argv):
    """(exit status, stdout, stderr) of the command."""
    status = cli.run_cli(scale.main, [str(argument) for argument in argv])
    return (status, *capsys.readouterr())


def test_262145_tokens_over_eight_devices_by_hand():
    made = scale.estimate(scale.plan(LONG, BRIEF, scale.DEVICES["h100"], scale.Mesh(1, 1, 8)), scale.DEVICES["h100"], scale.Mesh(1, 1, 8))
    assert (made.attention, made.remat) == ("cudnn", "none")
    # Forward 4 N^2 D FLOP in each of 11 blocks and 4 N D in the last; with the backward pass 3.5 times; 8 images on 8 devices.
    n, d = 262_145, 192
    assert made.work.attention == pytest.approx(3.5 * (11 * 4 * n**2 * d + 4 * n * d), rel=1e-9)
    # Keys and values of 8 images in 2 bytes, of which 7 / 8 come from others, gathered and their gradients scattered in 12 blocks.
    assert made.work.communication.tokens == pytest.approx(12 * 2 * 7 / 8 * 2 * 8 * 262_152 * d * 2)
    # At half of 989.4 TFLOP/s, and at a quarter with everything else besides.
    best, worst = made.seconds
    flop = made.work.attention + made.work.linear
    assert best == pytest.approx(flop / 494.7e12)
    moved = sum(made.work.communication) / 225e9
    assert worst == pytest.approx(flop / 247.35e12 + made.work.traffic / 3.35e12 + moved + 1800 * 5e-6)
    assert made.memory.likely < 80e9


def test_hours_count_every_step_and_all_devices():
    """BreastMNIST: 546, 78 and 156 images, batch 8, 100 epochs: 6,900 steps, and 8,034 predictions that are a third of a step each."""
    made = estimate(f"{ROOT}/configs/vit2d.py:patch=28", mesh=scale.Mesh(4, 1, 1))
    assert made.steps == pytest.approx(6900 + (78 * 101 + 156) / 8 / 3)
    assert made.hours == pytest.approx([4 * made.steps * seconds / 3600 for seconds in made.seconds])


def test_the_one_gpu_whose_times_are_known():
    """ViT-Ti on BreastMNIST, 120 epochs on a Tesla T4 by PyTorch (the study's authors): patch 1 took 1,411 s, patch 2 299 s."""
    for patch, seconds in ((1, 1411), (2, 299)):
        made = estimate(f"{ROOT}/configs/vit2d.py:patch={patch}", device="t4", seeds="0", train__epochs="120")
        best, worst = (3600 * hours for hours in made.hours)
        assert best < seconds < worst, patch


def test_more_devices_do_less_each():
    given = {"model__dtype": "bfloat16", "seeds": "0", "eval__batch_size": "8", "train__remat": "blocks"}
    whole = estimate(LONG, **given)
    for mesh in (scale.Mesh(8, 1, 1), scale.Mesh(1, 8, 1), scale.Mesh(1, 1, 8), scale.Mesh(2, 2, 2)):
        part = estimate(LONG, mesh=mesh, **given)
        assert part.memory.likely < whole.memory.likely / 3, mesh
        assert part.work.attention == pytest.approx(whole.work.attention / 8), mesh
        assert part.seconds[0] == pytest.approx(whole.seconds[0] / 8), mesh
        assert part.hours[1] > whole.hours[1], mesh  # communication costs device hours


@pytest.mark.parametrize("spec", ["configs/vit2d.py:patch=2", "configs/vit3d.py:patch=2"])
def test_the_memory_is_that_by_which_runs_are_refused(spec):
    one = planned(f"{ROOT}/{spec}")
    there = machine.Device("gpu", "any", 1, 80 * 10**9)
    assert scale.estimate(one, scale.DEVICES["h100"], ONE).memory == budget.memory(one, there)


def test_beyond_a_node_the_network_counts():
    one = planned(LONG, mesh=scale.Mesh(1, 1, 8))
    done, device = scale.work(one, scale.DEVICES["h100"], scale.Mesh(1, 1, 8)), scale.DEVICES["h100"]
    within, beyond = (scale.step_seconds(done, device, "bfloat16", count)[1] for count in (8, 16))
    assert beyond - within == pytest.approx(sum(done.communication) * (1 / 25e9 - 1 / 225e9))


def test_the_whole_study_in_one_table(capsys):
    runs = 0
    for config, sets in (("vit2d", 12), ("vit3d", 6)):
        argv = [f"--config={ROOT}/configs/{config}.py", "--sweep", "--datasets=all", "--variants=vit_ti,vit_s,vit_b", "--device=a100"]
        status, out, _ = said(capsys, *argv)
        rows = [re.split(r" *\| *", line)[1:-1] for line in out.splitlines()[2:]]
        assert (status, len(rows)) == (0, 3 * 6 + 1)
        assert [int(row[3]) for row in rows] == [sets] * 18 + [18 * sets]
        hours = [[float(part.replace(",", "")) for part in row[5].split(" to ")] for row in rows]
        for case in (0, 1):
            assert sum(pair[case] for pair in hours[:-1]) == pytest.approx(hours[-1][case], rel=0.02)  # printed to three digits
        runs += int(rows[-1][3])
    assert runs == 18 * 6 * 3


def test_a_sweep_of_its_own_points(capsys):
    status, out, _ = said(capsys, f"--config={ROOT}/configs/tokens2d.py", "--sweep", "--config.seeds=0")
    assert status == 0
    assert "| vit_ti | 16 | 197 | 1 |" in out
    assert out.splitlines()[-1].startswith("| all | | | 4 |")


def test_one_run_says_its_arithmetic(capsys):
    status, out, _ = said(capsys, f"--config={LONG}", "--device=v5e", "--mesh=1,1,16", "--config.seeds=0")
    assert status == 0
    assert "16 x TPU v5e (mesh 1,1,16)" in out
    assert "262,145 tokens" in out
    assert re.search(r"seconds +\S+ to \S+ a step, 2,680 steps", out)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--device=h1000"], "--device=h1000: unknown; did you mean h100"),
        (["--mesh=8"], "--mesh=8: must be three positive numbers: data,fsdp,sequence"),
        (["--mesh=1,1,0"], "--mesh=1,1,0: must be three positive numbers"),
        (["--mesh=a,b,c"], "not a list of numbers"),
        (["--mesh=3,1,1"], "train.batch_size=8: must be a multiple of data x fsdp = 3"),
        (["--mesh=1,1,18"], "--mesh sequence=18: must be at most 17, the tokens"),
        (["--device=cpu", "--mesh=2,1,1"], "must be 1,1,1 on --device=cpu"),
        (["--device=cpu", "--config.model.dtype=bfloat16"], "model.dtype=bfloat16: unknown; did you mean float32?"),
        (["--config.mesh.data=2"], "--config.mesh.data=...: must be given as --mesh"),
        (["--datasets=all"], "must be given together with --sweep"),
        (["--config.train.epochs=0"], "train.epochs=0: must be from 1"),
        (["--devices=h100"], "--devices: no such flag; did you mean --device"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, says):
    status, out, err = said(capsys, f"--config={ROOT}/configs/vit2d.py:patch=7", *argv)
    assert (status, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_a_sweep_takes_no_arguments_and_known_names(capsys):
    config = f"{ROOT}/configs/vit2d.py"
    for argv, says in (
        ([f"--config={config}:patch=7", "--sweep"], "without arguments: with --sweep the points give them"),
        ([f"--config={config}", "--sweep", "--datasets=breast"], "breast"),
        ([f"--config={config}", "--sweep", "--variants=vit_xl"], "model.variant=vit_xl: unknown"),
    ):
        status, _, err = said(capsys, *argv)
        assert (status, err.count("\n")) == (2, 1)
        assert says in err


def test_rates_are_found_again_from_the_steps_they_explain():
    made = scale.DEVICES["cpu"]._replace(memory_rate=5e9, flops={"float32": (150e9, 90e9)})
    works = [scale.work(prediction.planned(point), made, ONE) for point in prediction.POINTS if point.fitted]
    found = prediction.fitted(works, [scale.step_seconds(work, made, "float32", 1)[0] for work in works])
    assert found.memory_rate == pytest.approx(5e9, rel=1e-6)
    assert found.flops["float32"] == pytest.approx((150e9, 90e9), rel=1e-6)


def test_what_is_predicted_is_not_what_was_fitted():
    keys = [(point.spec, point.batch_size, point.resize) for point in prediction.POINTS]
    assert len(set(keys)) == len(keys)
    fitted = {point.spec for point in prediction.POINTS if point.fitted}
    tested = [point for point in prediction.POINTS if point.milliseconds and not point.fitted]
    assert (len(fitted), len(tested)) == (4, 16)
    assert sum(point.spec in fitted for point in tested) == 3  # those of another batch


def test_the_cpus_rates_are_those_that_its_recorded_steps_give(capsys):
    """Should docs/performance.md be measured anew: write its times into prediction.POINTS and the rates that it prints into DEVICES."""
    assert cli.run_cli(prediction.main, []) == 0
    rates, _, _, _, *rows = capsys.readouterr().out.splitlines()
    printed = [float(number) for number in re.findall(r"([\d.e+]+) (?:bytes|FLOP)/s", rates)]
    cpu = scale.DEVICES["cpu"]
    assert printed == pytest.approx([cpu.memory_rate, *cpu.flops["float32"]], rel=0.01)
    ratios = [float(row.split("|")[6]) for row in rows if ", fitted" not in row]
    assert len(ratios) == 16
    assert min(ratios) > 0.85
    assert max(ratios) < 1.4
    assert sorted(ratios)[len(ratios) // 2] == pytest.approx(1, abs=0.05)


def test_finished_runs_beside_their_prediction(capsys, tmp_path):
    assert cli.run_cli(prediction.main, [f"--runs={ROOT}/docs/results/study/vit2d/breastmnist-patch28"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert row[1].strip() == "breastmnist, patch 28"
    assert 0.1 < float(row[4]) < 1.5
    assert float(row[7]) == pytest.approx(1, abs=0.4)
    assert cli.run_cli(prediction.main, [f"--runs={tmp_path}"]) == 2
    assert "must be a folder with finished runs below it" in capsys.readouterr().err


@pytest.mark.slow
def test_the_memory_of_a_compiled_step():
    spec, given = f"{ROOT}/configs/vit2d.py:patch=4,variant=vit_micro", {"seeds": "0", "model.pretrained": ""}
    one = scale.plan(spec, given, scale.DEVICES["cpu"], ONE)
    measured = prediction.measured_memory(one)
    assert measured > 16 * cost.num_params(**one.shape)
    assert 0.95 * measured < prediction.memory(one) < 2 * measured
