"""The command line's words become a checked config, and every mistake one line that helps."""

import pathlib

import pytest

from vitmed import cli, config, experiment, inference
from vitmed import fields as fields_lib
from vitmed.runs import folder

ROOT = pathlib.Path(__file__).parent.parent
VIT2D, VIT3D = f"{ROOT}/configs/vit2d.py", f"{ROOT}/configs/vit3d.py"


@pytest.mark.parametrize(
    ("text", "like", "value"),
    [
        ("7", (1,), (7,)),
        ("2x7x7", (1,), (2, 7, 7)),
        ("(2, 7, 7)", (1,), (2, 7, 7)),
        ("0,1,2", (5,), (0, 1, 2)),
        ("0.8,1", (0.1, 0.2), (0.8, 1.0)),
        ("3", 1, 3),
        ("1e3", 1, 1000),
        ("1e-5", 0.1, 1e-5),
        ("3", 0.1, 3.0),
        ("True", False, True),
        ("false", True, False),
        ("auto", "auto", "auto"),
        ("host", "auto", "host"),
        ("0.5", "auto", (0.5,)),
        ("0.4,0.5,0.6", "auto", (0.4, 0.5, 0.6)),
        ("../data", "", "../data"),
    ],
)
def test_values_take_the_type_of_the_field(text, like, value):
    parsed = config.parse("field", text, like)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "like"),
    [
        ("seven", (1,)),
        ("1.5", (1,)),
        ("", (1,)),
        ("1.5", 3),
        ("nan", 3),
        ("inf", 3),
        ("9" * 400, 0),
        ("{[]:1}", (1.0,)),
        ("yes", True),
        ("x", 0.5),
    ],
)
def test_values_that_do_not_fit_are_refused_with_an_example(text, like):
    with pytest.raises(config.InputError, match=r"field=.*: not .*; write field="):
        config.parse("field", text, like)


def test_the_first_colon_alone_splits_file_from_argument(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("import ml_collections\ndef get_config(arg=''):\n    return ml_collections.ConfigDict({'given': arg})\n")
    assert config.load(f"{file}:dataset=folder:/a/b,patch=7").given == "dataset=folder:/a/b,patch=7"


def test_the_study_recipes_are_the_papers():
    flat, volume = config.load(f"{VIT2D}:dataset=breastmnist,patch=7"), config.load(f"{VIT3D}:patch=2x7x7")
    assert (flat.train.learning_rate, flat.train.epochs, flat.train.batch_size) == (1e-4, 100, 8)
    assert (volume.train.learning_rate, volume.train.epochs, volume.train.batch_size) == (1e-5, 20, 8)
    for recipe in (flat, volume):
        assert (recipe.train.weight_decay, recipe.train.beta1, recipe.train.beta2, recipe.train.epsilon) == (0.05, 0.9, 0.999, 1e-8)
        assert (recipe.train.lr_step_epochs, recipe.train.lr_gamma) == (30, 0.5)
        assert (recipe.model.variant, recipe.seeds, recipe.data.size) == ("vit_ti", (0, 1, 2), (28,))
    assert flat.augment.to_dict() == {
        "crop_scale": (0.8, 1.0), "crop_ratio": (3 / 4, 4 / 3), "rotation_degrees": 15.0, "flip_h": 0.0, "flip_w": 0.5,
        "quarter_turns": False, "brightness": 0.2, "contrast": 0.2,
    }  # fmt: skip
    assert volume.augment.to_dict() == {
        "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "rotation_degrees": 0.0, "flip_h": 0.5, "flip_w": 0.5,
        "quarter_turns": True, "brightness": 0.0, "contrast": 0.0,
    }  # fmt: skip
    assert volume.model.patch_size == (2, 7, 7)


def test_overrides_reach_their_field_and_leave_the_rest():
    plain, changed = config.load(VIT2D), config.load(VIT2D, {"train.epochs": "20", "model.mean": "0.5", "seeds": "7"})
    assert (changed.train.epochs, changed.model.mean, changed.seeds) == (20, (0.5,), (7,))
    for recipe in (plain, changed):
        del recipe["seeds"], recipe.train["epochs"], recipe.model["mean"]
    assert plain.to_dict() == changed.to_dict()


@pytest.mark.parametrize(
    ("spec", "overrides", "words"),
    [
        (f"{VIT2D}:datset=breastmnist", {}, ["'datset' is unknown", "did you mean dataset"]),
        (f"{VIT2D}:patch", {}, ["'patch' has no value", "patch=7"]),
        (f"{VIT2D}:patch=seven", {}, ["patch=seven", "write config argument patch=7"]),
        (VIT2D, {"train.epoch": "1"}, ["--config.train.epoch: no such field", "train.epochs"]),
        (VIT2D, {"train.epochs": "many"}, ["--config.train.epochs=many", "a whole number"]),
        ("configs/nothing.py", {}, ["configs/nothing.py", "no such file"]),
    ],
)
def test_wrong_arguments_are_named_with_what_is_right(spec, overrides, words):
    with pytest.raises(config.InputError) as error:
        config.load(spec, overrides)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def get_config(arg=''):\n    return undefined_name\n", ["line 2", "NameError"]),
        ("def get_config(arg='')\n", ["line 1", "SyntaxError"]),
        ("import no_such_module\n", ["line 1", "no_such_module"]),
        ("x = 1\n", ["no get_config"]),
    ],
)
def test_a_broken_config_file_is_named_with_its_line(tmp_path, source, words):
    file = tmp_path / "broken.py"
    file.write_text(source)
    with pytest.raises(config.InputError) as error:
        config.load(str(file))
    assert all(word in str(error.value) for word in [str(file), *words]), error.value


def test_configs_of_the_package_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load("configs/vit3d.py").data.rank == 3
    with pytest.raises(config.InputError, match="no such file"):
        config.load("elsewhere/vit3d.py")


@pytest.mark.parametrize(
    ("argument", "overrides", "words"),
    [
        ("dataset=brestmnist", {}, ["brestmnist", "breastmnist"]),
        ("dataset=organmnist3d", {}, ["3D", "vit3d.py"]),
        ("patch=5", {}, ["5 does not divide", "1, 2, 4, 7, 14, 28"]),
        ("patch=7x7x7", {}, ["model.patch_size", "2 axes"]),
        ("patch=0", {}, ["model.patch_size", "positive"]),
        ("size=50", {}, ["data.size", "28, 64, 128, 224"]),
        ("variant=vit_xxl", {}, ["vit_xxl", "vit_ti"]),
        ("pretrained=some/where/weights", {}, ["some/where/weights", "no such file", "timm/"]),
        ("", {"seeds": "1,1"}, ["seeds=1,1", "different"]),
        ("", {"seeds": "-1"}, ["seeds=-1"]),
        ("", {"train.epochs": "0"}, ["train.epochs=0", "from 1"]),
        ("", {"train.batch_size": "-4"}, ["train.batch_size=-4"]),
        ("", {"train.micro_batch_size": "3"}, ["train.micro_batch_size=3", "0, or a divisor of train.batch_size=8"]),
        ("", {"train.micro_batch_size": "-1"}, ["train.micro_batch_size=-1"]),
        ("", {"train.learning_rate": "nan"}, ["train.learning_rate=nan", "finite"]),
        ("", {"train.learning_rate": "1e16"}, ["train.learning_rate=1e+16", "1e+15"]),
        ("", {"train.epsilon": "0.0"}, ["train.epsilon=0", "1e-20"]),
        ("", {"train.weight_decay": "-1"}, ["train.weight_decay=-1"]),
        ("", {"train.beta1": "1"}, ["train.beta1=1"]),
        ("", {"model.dtype": "float16"}, ["float16", "bfloat16"]),
        ("", {"model.pooling": "max"}, ["max", "mean"]),
        ("", {"model.in_channels": "2"}, ["model.in_channels=2", "1 or 3"]),
        ("", {"model.std": "0"}, ["model.std=0", "positive"]),
        ("", {"model.mean": "0.1,0.2"}, ["model.mean=0.1,0.2", "3 for 3 channels"]),
        ("", {"model.mean": "blue"}, ["model.mean=blue", "auto"]),
        ("", {"model.drop_path": "1"}, ["model.drop_path=1"]),
        ("", {"train.remat": "block"}, ["train.remat=block", "did you mean blocks"]),
        ("", {"data.placement": "moon"}, ["moon", "device"]),
        ("", {"augment.crop_scale": "0.8"}, ["augment.crop_scale=0.8", "two positive numbers"]),
        ("", {"augment.flip_w": "2"}, ["augment.flip_w=2"]),
    ],
)
def test_a_config_that_cannot_run_is_refused_before_data_are_read(argument, overrides, words):
    with pytest.raises(config.InputError) as error:
        experiment.plan(config.load(f"{VIT2D}:{argument}", overrides))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("overrides", "words"), [({"mesh.data": "64"}, ["mesh.data=64", "devices"]), ({"mesh.fsdp": "0"}, ["mesh.fsdp=0", "positive"])]
)
def test_a_mesh_that_the_devices_do_not_make_is_refused(overrides, words):
    with pytest.raises(config.InputError) as error:
        _ = experiment.plan(config.load(f"{VIT2D}:pretrained=", overrides)).mesh
    assert all(word in str(error.value) for word in words), error.value


def test_in_channels_of_rgb_data_must_be_three():
    with pytest.raises(config.InputError, match=r"model\.in_channels=1: must be 3"):
        experiment.plan(config.load(f"{VIT2D}:dataset=retinamnist", {"model.in_channels": "1"}))


def test_flags_and_overrides_are_told_apart():
    parser = cli.Parser(prog="p")
    parser.add_argument("--config")
    parser.add_argument("--workdir")
    flags, overrides = cli.parse_flags(parser, ["--config=a.py", "--config.x=1", "--workdir", "w", "--config.y.z", "2"])
    assert (flags.config, flags.workdir, overrides) == ("a.py", "w", {"x": "1", "y.z": "2"})
    for argv, words in ((["--wokdir=w"], "--workdir"), (["--config.x"], "has no value"), (["w"], "no such flag")):
        with pytest.raises(config.InputError, match=words):
            cli.parse_flags(parser, argv)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (config.InputError("bad\ninput"), 2),
        (config.MachineError("full"), 1),
        (OSError(28, "No space left on device"), 1),
        (config.Stopped(15), 75),
        (config.Stopped(2), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_ends_a_command_becomes_one_line_and_its_exit_status(error, status, capsys):
    def main(argv):
        raise error

    assert cli.run_cli(main, []) == status
    assert len(capsys.readouterr().err.splitlines()) == (1 if status in (1, 2) else 0)


def test_every_field_that_was_added_has_the_value_of_what_was_before_it():
    fields = config.flatten(config.load(VIT2D).to_dict())
    assert {name: fields[name] for name in fields_lib.ADDED} == config.as_tuples(fields_lib.ADDED)
    of_data = {name.removeprefix("data."): value for name, value in fields_lib.ADDED.items() if name.startswith("data.")}
    tracking = {"name": "", "project": "vitmed", "writers": ""}  # a section that was added as a whole
    known = {"data": {"invert": True}, "other": 1}
    assert fields_lib.completed(known) == {"data": of_data | {"invert": True}, "other": 1, "tracking": tracking}
    assert fields_lib.completed({"data": {"size": 64}})["data"]["size"] == [64]  # it was one number for all axes
    assert fields_lib.completed({"tracking": {"project": "mine"}})["tracking"] == tracking | {"project": "mine"}


def test_a_run_begun_before_a_field_existed_goes_on_and_is_evaluated(tmp_path, small_config):
    now = small_config()
    before = now.to_dict()
    for name in fields_lib.ADDED:
        section, _, field = name.partition(".")
        del before[section][field]
    del before["tracking"]
    run_folder = folder.RunFolder(tmp_path / "run")
    run_folder.create(before)
    run_folder.check(now.to_dict())
    assert inference.restored_config(run_folder, None).data == now.data
    with pytest.raises(config.InputError, match=r"model.kernel_size is \[0\] there, \[14\] here"):
        run_folder.check(small_config(model__kernel_size="14").to_dict())
