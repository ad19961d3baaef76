"""A sweep handed out as tasks: how points are packed, what a manifest may say, what is submitted again, and tasks run for real."""

import json
import pathlib
import shutil
import sys

import made_runs
import pytest

from launch import manifest, slurm, task
from launch import sweep as launch_sweep
from vitmed import cli, config
from vitmed.runs import folder, guard

ROOT = pathlib.Path(__file__).parent.parent
QUICKSTART = f"{ROOT}/configs/quickstart.py"
SMALL = ["--config.model.variant=vit_micro", "--config.train.epochs=2", "--config.train.batch_size=250", "--config.seeds=0"]
IMAGES = ("phantom2d-patch4", "phantom2d-patch7", "phantom2d-patch14", "phantom2d-patch28")  # the costliest first


def call(*argv: object) -> int:
    return cli.run_cli(launch_sweep.main, [str(argument) for argument in argv])


def points(**gmacs):
    return [manifest.Point(name, f"dataset={name}", cost, cost / 50) for name, cost in gmacs.items()]


class Engine:
    """Stands for a launcher: keeps what it was given."""

    def __init__(self, monkeypatch, **queued):
        self.submitted, self.there, self.waiting = [], True, frozenset()
        monkeypatch.setitem(sys.modules, "launch.slurm", self)

    def add_flags(self, parser):
        parser.add_argument("--speed", default="1")

    def render(self, plan, options):
        config.require(options.speed.isdecimal(), "--speed", options.speed, "a number")
        return {"job.txt": f"{options.tasks} {options.manifest}\n"}

    def require(self, options):
        if not self.there:
            raise config.InputError("--to=slurm: there is no launcher here; install it")

    def queued(self, options):
        return self.waiting

    def submit(self, place, options):
        self.submitted.append(options.tasks)
        assert (place / "job.txt").read_text() == f"{options.tasks} {options.manifest}\n"
        return "submitted"


@pytest.fixture
def engine(monkeypatch):
    return Engine(monkeypatch)


@pytest.fixture
def submit(engine, tmp_path):
    """A function that submits the images of the quickstart, or what other flags say, to the stand-in."""

    def run(*argv):
        return call(f"--config={QUICKSTART}", f"--workdir={tmp_path / 'sweep'}", "--to=slurm", "--points=dataset=phantom2d", *SMALL, *argv)

    return run


def tasks_of(workdir):
    return json.loads((workdir / "manifest.json").read_text())["tasks"]


def finish(path, name):
    """Make a point that has been created look finished: its result alone is what counts."""
    made_runs.write(path.parent / "made" / name)
    path.mkdir(parents=True, exist_ok=True)
    shutil.copy(path.parent / "made" / name / "result.json", path / "result.json")
    shutil.rmtree(path.parent / "made")


def fail(path, said="the data are not there"):
    folder.RunFolder(path).write_failure({"ended": "exit status 2", "said": said})


def own(workdir, name):
    """The folder of a point as its run has made it."""
    run = folder.RunFolder(workdir / name)
    overrides = dict(item.removeprefix("--config.").split("=") for item in SMALL)
    run.create(config.load(f"{QUICKSTART}:dataset=phantom2d,patch={name.removeprefix('phantom2d-patch')}", overrides).to_dict())
    return run.path


# --- packing --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "tasks"),
    [
        (0, (("a",), ("b",), ("c",), ("d",), ("e",), ("f",))),
        (0.25, (("a",), ("b",), ("c",), ("d", "f"), ("e",))),  # at most 25 together: b and c cost more and are alone
        (0.5, (("a",), ("b", "f"), ("c", "d"), ("e",))),
        (1, (("a",), ("b", "c", "d", "f"), ("e",))),
        (2, (("a", "b", "c", "d", "f"), ("e",))),
    ],
)
def test_cheap_points_share_a_task_and_costly_ones_are_alone(share, tasks):
    costs = points(c=30, a=100, f=5, e=20, b=40, d=20)
    assert manifest.packed(costs, share) == tasks
    assert manifest.packed(costs[::-1], share) == tasks  # whatever order the config gives


def test_a_manifest_grows_at_its_end_and_a_point_retried_leaves_its_task():
    first = points(a=100, b=10, c=5)
    made = manifest.Manifest("x.py", {}, tuple(first), manifest.packed(first, 0.25), 0.25)
    assert made.tasks == (("a",), ("b", "c"))
    grown = manifest.grown(made, points(c=5, d=50, e=10))
    assert grown.tasks == (("a",), ("b", "c"), ("d",), ("e",))
    assert manifest.grown(grown, first) == grown
    alone = manifest.alone(grown, ["a", "c"])
    assert alone.tasks == (("a",), ("b",), ("d",), ("e",), ("c",))  # the numbers of those that wait in a queue stay
    assert manifest.alone(alone, ["a", "c"]) == alone


def test_the_estimate_counts_training_evaluations_and_seeds(tmp_path, submit):
    assert submit("--pack=0") == 0
    said = {point["name"]: point for point in json.loads((tmp_path / "sweep/manifest.json").read_text())["points"]}
    # vit_micro on phantom2d (600, 150 and 200 images): 2 epochs of 3 forward passes, 3 validations, 1 test, one seed.
    from vitmed import forecast

    overrides = dict(item.removeprefix("--config.").split("=") for item in SMALL)
    for patch in (28, 4):
        planned = forecast.outline(config.load(f"{QUICKSTART}:dataset=phantom2d,patch={patch}", overrides))
        number = planned.description.num_examples
        images = 3 * 2 * number["train"] + 3 * number["val"] + number["test"]
        assert said[f"phantom2d-patch{patch}"]["gmacs"] == pytest.approx(images * planned.gmacs_forward)
    assert tasks_of(tmp_path / "sweep") == [[name] for name in IMAGES]


# --- the file -------------------------------------------------------------------------------------------------------------------


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    some = points(a=3.25, b=1 / 3)
    made = manifest.Manifest(QUICKSTART, {"train.epochs": "2"}, tuple(some), (("a",), (), ("b",)), 0.5)
    manifest.write(made, tmp_path / "new")
    assert manifest.read(tmp_path / "new/manifest.json") == made


FAULTS = {
    "not JSON": (lambda m: "{", "is broken"),
    "no object": (lambda m: [1], "expected a JSON object"),
    "other version": (lambda m: m | {"version": 2}, "version is 2"),
    "no version": (lambda m: {k: v for k, v in m.items() if k != "version"}, "version is None"),
    "config missing": (lambda m: m | {"config": "/no/such.py"}, "--config=/no/such.py: no such file"),
    "config a number": (lambda m: m | {"config": 3}, "config is int"),
    "no tasks": (lambda m: {k: v for k, v in m.items() if k != "tasks"}, "has no 'tasks'"),
    "unknown key": (lambda m: m | {"task": []}, "has an unknown 'task'"),
    "overrides no text": (lambda m: m | {"overrides": {"train.epochs": 2}}, "train.epochs=2 is no text"),
    "pack negative": (lambda m: m | {"pack": -1}, "pack is -1"),
    "pack a truth": (lambda m: m | {"pack": True}, "pack is True"),
    "point no object": (lambda m: m | {"points": ["a"]}, "points[0] is no object"),
    "gmacs text": (lambda m: m | {"points": [m["points"][0] | {"gmacs": "9"}]}, "gmacs is '9'"),
    "name a path": (lambda m: m | {"points": [m["points"][0] | {"name": "../a"}]}, "'../a' is no name of a point's folder"),
    "name above": (lambda m: m | {"points": [m["points"][0] | {"name": ".."}]}, "'..' is no name of a point's folder"),
    "name of ours": (lambda m: m | {"points": [m["points"][0] | {"name": "launch"}]}, "'launch' is no name"),
    "name with a zero byte": (lambda m: m | {"points": [m["points"][0] | {"name": "a\0"}]}, "is no name"),
    "name half a character": (lambda m: m | {"points": [m["points"][0] | {"name": "\ud800"}]}, "is no name"),
    "gmacs too large": (lambda m: m | {"points": [m["points"][0] | {"gmacs": 10**400}]}, "gmacs is 1000"),
    "config endless": (lambda m: m | {"config": "c" * 5000}, "cccc"),
    "no points": (lambda m: m | {"points": [], "tasks": []}, "there are no points"),
    "unknown point": (lambda m: m | {"tasks": [["a", "c"], ["b"]]}, "tasks[0]: there is no point 'c'"),
    "a point in two tasks": (lambda m: m | {"tasks": [["a", "b"], ["b"]]}, "'b' is there 1 times and in tasks 2 times"),
    "a point in no task": (lambda m: m | {"tasks": [["a"]]}, "'b' is there 1 times and in tasks 0 times"),
    "a point twice": (lambda m: m | {"points": [*m["points"], m["points"][0]]}, "'a' is there 2 times"),
    "task no list": (lambda m: m | {"tasks": ["a", "b"]}, "tasks[0] is no list"),
    "task of numbers": (lambda m: m | {"tasks": [[0], [1]]}, "tasks[0] is no list"),
}


def test_two_at_once_forget_no_points(tmp_path, submit, capsys):
    (tmp_path / "sweep/launch").mkdir(parents=True)
    with guard.lock(tmp_path / "sweep/launch"):
        assert submit() == 1
    assert "is in use by process" in capsys.readouterr().err
    assert not (tmp_path / "sweep/manifest.json").exists()
    assert submit() == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_manifest_edited_into_nonsense_is_one_line_and_nothing_is_submitted(fault, tmp_path, capsys, engine):
    change, words = FAULTS[fault]
    made = manifest.Manifest(QUICKSTART, {}, tuple(points(a=2, b=1)), (("a",), ("b",)))
    changed = change(json.loads(manifest.text(made)))
    text = changed if isinstance(changed, str) else json.dumps(changed)
    (tmp_path / "manifest.json").write_text(text)
    for argv in (["--status"], [f"--config={QUICKSTART}", "--to=slurm"], [f"--config={QUICKSTART}", "--to=slurm", "--retry"]):
        if fault.startswith("config ") and argv == ["--status"] and isinstance(changed["config"], str):
            continue  # what is only looked at needs no config
        assert call(f"--workdir={tmp_path}", *argv) == 2
        errors = capsys.readouterr().err
        assert len(errors.splitlines()) == 1
        assert len(errors) < 1200
        assert f"{tmp_path}/manifest.json" in errors
        assert words in errors
    argv = [f"--manifest={tmp_path}/manifest.json", f"--workdir={tmp_path}", "--task=0"]
    assert cli.run_cli(task.main, argv) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert (tmp_path / "manifest.json").read_text() == text
    assert engine.submitted == []


def test_a_point_that_the_config_does_not_have_is_refused(tmp_path, capsys, submit, engine):
    assert submit() == 0
    path = tmp_path / "sweep/manifest.json"
    path.write_text(path.read_text().replace("phantom2d-patch7", "phantom2d-patch5"))
    assert submit() == 2
    assert "point phantom2d-patch5 is dataset=phantom2d,patch=7 there, not in sweep() here" in capsys.readouterr().err
    assert len(engine.submitted) == 1
    number = next(number for number, names in enumerate(tasks_of(path.parent)) if "phantom2d-patch5" in names)
    assert cli.run_cli(task.main, [f"--manifest={path}", f"--workdir={path.parent}", f"--task={number}"]) == 2
    assert "phantom2d-patch5: the sweep has no such point" in capsys.readouterr().err


# --- what is submitted ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_everything_and_writes_nothing(tmp_path, capsys, submit, engine):
    engine.there = False  # nor does it need the launcher
    assert submit("--dry-run") == 0
    out = capsys.readouterr().out
    assert "# task 0: phantom2d-patch4" in out
    assert "# ---- job.txt\n(0, 1" in out
    assert list(tmp_path.iterdir()) == []
    assert engine.submitted == []


def test_the_same_command_again_submits_what_is_left(tmp_path, capsys, submit, engine):
    workdir = tmp_path / "sweep"
    assert submit("--pack=0") == 0
    before = (workdir / "manifest.json").read_text()
    finish(own(workdir, IMAGES[0]), IMAGES[0])
    fail(own(workdir, IMAGES[1]))
    with guard.lock(own(workdir, IMAGES[2])):
        assert submit("--pack=0") == 0
        assert "1 of 4 points done, 1 running, 1 failed, 1 waiting; tasks to run: 1" in capsys.readouterr().err
    assert submit() == 0  # the one that ran was stopped
    engine.waiting = frozenset({3})
    assert submit() == 0
    assert "1 of 2 tasks are in the queue already" in capsys.readouterr().err
    engine.waiting = frozenset({2, 3})
    assert submit() == 0
    assert engine.submitted == [(0, 1, 2, 3), (3,), (2, 3), (2,)]
    assert (workdir / "manifest.json").read_text() == before
    for name in IMAGES[2:]:
        finish(own(workdir, name), name)
    capsys.readouterr()
    assert submit() == 1  # a point has failed
    errors = capsys.readouterr().err
    assert "nothing to submit: 3 of 4 points done, 1 failed; --retry" in errors
    assert f"{IMAGES[1]}: exit status 2: the data are not there" in errors
    assert len(engine.submitted) == 4


def test_a_retry_submits_the_failed_points_alone(tmp_path, capsys, submit, engine):
    workdir = tmp_path / "sweep"
    assert submit("--retry") == 0  # none has failed: nothing is written
    assert not workdir.exists()
    assert submit("--pack=2") == 0
    assert tasks_of(workdir) == [list(IMAGES)]
    for name in IMAGES[1:3]:
        fail(own(workdir, name))
    assert submit("--retry", "--points=patch=14") == 0
    assert tasks_of(workdir) == [[IMAGES[0], IMAGES[1], IMAGES[3]], [IMAGES[2]]]
    assert engine.submitted == [(0,), (1,)]
    assert not (workdir / IMAGES[2] / "failure.json").exists()
    assert (workdir / IMAGES[1] / "failure.json").exists()
    engine.there = False
    assert submit("--retry") == 2
    assert (workdir / IMAGES[1] / "failure.json").exists()  # it is not tried again


def test_more_points_are_added_and_another_sweep_is_refused(tmp_path, capsys, submit, engine):
    workdir = tmp_path / "sweep"
    assert submit("--points=dataset=phantom2d,patch=28|14") == 0
    assert tasks_of(workdir) == [[IMAGES[2]], [IMAGES[3]]]
    assert submit("--points=dataset=phantom2d,patch=7", "--config.train.remat=none") == 0  # which decides nothing about results
    assert tasks_of(workdir) == [[IMAGES[2]], [IMAGES[3]], [IMAGES[1]]]
    assert engine.submitted == [(0, 1), (2,)]
    before = (workdir / "manifest.json").read_text()
    capsys.readouterr()
    for argv, words in {
        ("--config.train.epochs=3",): "--config.train.epochs is 2 there, 3 here",
        ("--config.train.weight_decay=0",): "--config.train.weight_decay is not given there, 0 here",
        (f"--config={ROOT}/configs/tokens2d.py", "--points=dataset=breastmnist"): f"--config={QUICKSTART} there",
        ("--pack=0",): "its tasks were made with --pack=0.25, here is --pack=0",
    }.items():
        assert submit(*argv) == 2
        errors = capsys.readouterr().err
        assert len(errors.splitlines()) == 1
        assert words in errors
    assert (workdir / "manifest.json").read_text() == before
    assert len(engine.submitted) == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--to=pbs"], "--to=pbs: unknown; choose one of local, slurm"),
        (["--to="], "--to=: must be one of local, slurm"),
        (["--config="], "--config=: must be"),
        (["--points=patch=5"], "no point has patch=5"),
        (["--config.train.epochs=0"], "train.epochs=0"),
        (["--config.model.patch_size=7"], "model.patch_size: the sweep sets it"),
        (["--pack=-1"], "--pack=-1: must be a number, at least 0"),
        (["--pack=half"], "--pack=half"),
        (["--speed=fast"], "--speed=fast: must be a number"),
        (["--sped=1"], "--sped: no such flag; did you mean --speed"),
        (["--status"], "--config: --status reads the manifest"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_submitted(argv, words, tmp_path, capsys, submit, engine):
    assert submit(*argv) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert words in errors
    assert list(tmp_path.iterdir()) == []
    assert engine.submitted == []


def test_a_launcher_that_is_not_installed_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert call(f"--config={QUICKSTART}", f"--workdir={tmp_path / 'sweep'}", "--to=slurm", *SMALL) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert "there is no sbatch on this machine; run this on a login node of the cluster, or install SLURM's commands" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--time=soon", "--time=soon: must be minutes, HH:MM:SS"),
        ("--time=00:09:00", "--time=00:09:00: must be at least 10 minutes"),
        ("--mem=32 G", "--mem=32 G: must be a number of megabytes"),
        ("--limit=0", "--limit=0: must be a number of tasks"),
        ("--partition=a\n#SBATCH --uid=0", "must be a partition's name"),
        ("--setup=a\nb", "one line; join commands by &&"),
    ],
)
def test_flags_of_slurm_that_make_no_sense_are_named(flag, words, tmp_path, capsys):
    assert call(f"--config={QUICKSTART}", f"--workdir={tmp_path / 'sweep'}", "--to=slurm", "--dry-run", *SMALL, flag) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert words in errors


def test_array_indices_are_those_of_the_tasks_left():
    assert slurm.indices((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
    assert slurm.indices((4,)) == "4"


@pytest.mark.parametrize(
    ("time", "minutes"), [("90", 90), ("1:30", 1.5), ("2:00:00", 120), ("1-12", 2160), ("1-0:30", 1470), ("2-01:00:30", 2940.5), ("0", 0)]
)
def test_time_limits_are_read_as_sbatch_does(time, minutes):
    assert slurm.minutes(time) == minutes
