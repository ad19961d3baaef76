"""What users type, whatever it is: a value or one line; and records that come back as they were. Hypothesis looks for the exceptions."""

import json
import pathlib
import string

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitmed import config as config_lib
from vitmed import planning
from vitmed.runs import files, folder
from vitmed.study import points

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
# But for model.pretrained, whose values are looked for on the hub: test_weight_forms.py and test_hub.py have it.
FIELDS = sorted(config_lib.flatten(config_lib.load(f"{CONFIGS}/quickstart.py").to_dict()).keys() - {"model.pretrained"})
ARGUMENTS = ("dataset", "patch", "variant", "size")

settings.register_profile("vitmed", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("vitmed")

numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats()).map(str)
odd = st.sampled_from(
    [
        "",
        "nan",
        "-inf",
        "1e999",
        "0",
        "-1",
        "()",
        "(,)",
        "0x7",
        "7x",
        "x",
        "9" * 400,
        "auto",
        "None",
        "True",
        "__class__",
        "\x00",
        "../..",
        "a" * 5000,
    ]
)
words = st.text(st.one_of(st.sampled_from(string.printable), st.characters()), max_size=30)
values = st.one_of(numbers, odd, words, st.lists(st.integers(-3, 300), max_size=4).map(lambda sizes: "x".join(map(str, sizes))))
names = st.sampled_from(FIELDS)


def refused(call, *arguments):
    """Whether the call is refused with some words; a call that is not returns something, and what else it raises is a failure."""
    try:
        assert call(*arguments)
        return False
    except config_lib.InputError as error:
        said = str(error)
    assert said.strip()
    return True


def planned(spec, overrides):
    """Everything that is checked before data are read."""
    return planning.plan(config_lib.load(spec, overrides))


@settings(max_examples=150)
@given(st.dictionaries(names, values, min_size=1, max_size=3))
def test_any_value_of_any_field_is_taken_or_refused_in_a_line(overrides):
    refused(planned, f"{CONFIGS}/quickstart.py", overrides)


@settings(max_examples=100)
@given(st.dictionaries(st.one_of(st.sampled_from(ARGUMENTS), words), values, max_size=3))
def test_any_arguments_of_a_config_are_taken_or_refused_in_a_line(arguments):
    refused(planned, f"{CONFIGS}/vit3d.py:" + ",".join(f"{key}={value}" for key, value in ({"pretrained": ""} | arguments).items()), {})


@settings(max_examples=100)
@given(st.one_of(words, st.builds("{}={}".format, words, words)), values)
def test_any_field_name_is_taken_or_refused_in_a_line(name, value):
    assert refused(config_lib.load, f"{CONFIGS}/quickstart.py", {name: value}) or name in config_lib.flatten(
        config_lib.load(f"{CONFIGS}/quickstart.py").to_dict()
    )


@settings(max_examples=200)
@given(
    st.one_of(
        words, st.lists(st.builds("{}={}|{}".format, st.sampled_from(["patch", "dataset", "x"]), words, words), max_size=3).map(",".join)
    )
)
def test_any_choice_of_points_keeps_some_or_is_refused(expression):
    every = [points.Point({"dataset": name, "patch": patch}) for name in ("breastmnist", "retinamnist") for patch in ("28", "7")]
    refused(points.selected, every, expression)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=30)
@given(st.dictionaries(st.text(), json_values))
def test_rows_of_metrics_come_back(tmp_path_factory, row):
    run = folder.RunFolder(tmp_path_factory.mktemp("rows"))
    try:
        run.write_metrics([row, row])
    except UnicodeEncodeError:  # half a surrogate pair is no text
        return
    assert run.read_metrics() == [json.loads(json.dumps(files.json_ready(row)))] * 2


@settings(max_examples=50)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_predictions_come_back_to_the_bit(tmp_path_factory, num_seeds, num_images, num_classes, seed):
    rng = np.random.default_rng(seed)
    given_ = folder.Predictions(
        rng.integers(-(2**62), 2**62, (num_images, num_classes)),
        rng.integers(0, 2**32, (num_seeds, num_images, num_classes), np.uint32).view(np.float32),  # NaNs and infinities too
        rng.integers(0, 2**32, num_seeds),
    )
    run = folder.RunFolder(tmp_path_factory.mktemp("predictions"))
    run.write_predictions("test", **given_._asdict())
    for came, went in zip(run.read_predictions("test"), given_, strict=True):
        assert came.tobytes() == went.tobytes()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, '{"a": NaN}', '{"a": Infinity}', "{}{}", "\x00", "[]", "\ud800"]
)
def test_json_that_is_no_object_is_refused(text):
    with pytest.raises(config_lib.InputError):
        files.parse_json(text.encode(errors="surrogatepass"), where="x")
