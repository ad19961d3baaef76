"""Choosing among the points of a sweep."""

import types

import pytest

from vitmed import config
from vitmed.study import points, tables

SWEEP = [{"dataset": "a2d", "patch": patch} for patch in (28, 7, 4)] + [{"dataset": "b3d", "patch": patch} for patch in (14, 7)]
POINTS = points.of_sweep(types.SimpleNamespace(__file__="own.py", sweep=lambda: SWEEP))


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("dataset=b3d", ["b3d-patch14", "b3d-patch7"]),
        ("patch=7", ["a2d-patch7", "b3d-patch7"]),
        ("patch=4|28", ["a2d-patch28", "a2d-patch4"]),
        ("dataset=a2d,patch=7|4", ["a2d-patch7", "a2d-patch4"]),
        ("dataset=a2d|b3d,patch=7", ["a2d-patch7", "b3d-patch7"]),
    ],
)
def test_an_expression_keeps_the_points_it_names_in_their_order(expression, names):
    assert [point.name for point in points.selected(POINTS, expression)] == names


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("pacth=7", ["no 'pacth'", "did you mean patch?"]),
        ("patch=70", ["patch=70", "did you mean 7?"]),
        ("dataset=a3d", ["dataset=a3d", "did you mean b3d or a2d?"]),
        ("dataset=b3d,patch=7|4", ["no point has patch=4 beside dataset=b3d", "did you mean 14?"]),
        ("patch=14,dataset=a2d", ["no point has patch=14 beside dataset=a2d", "did you mean 4?"]),
        ("patch", ["patch=VALUE|VALUE"]),
        ("patch=", ["patch=VALUE|VALUE"]),
        ("patch=7|", ["patch=VALUE|VALUE"]),
        ("patch=7,patch=4", ["every key once"]),
        ("", ["no ''", "dataset, patch"]),
    ],
)
def test_an_expression_that_names_no_point_is_refused(expression, words):
    with pytest.raises(config.InputError) as raised:
        points.selected(POINTS, expression)
    assert all(word in str(raised.value) for word in [f"--points={expression}: ", *words]), raised.value


@pytest.mark.parametrize(
    ("kept", "expression"),
    [
        ((0, 1, 2), "dataset=a2d"),
        ((1, 4), "patch=7"),
        ((1, 2), "dataset=a2d,patch=7|4"),
        ((0, 1, 2, 3), None),
        ((), None),
    ],
)
def test_the_expression_of_some_points(kept, expression):
    some = [POINTS[index] for index in kept]
    assert points.expression_of(some, POINTS) == expression
    if expression:
        assert points.selected(POINTS, expression) == some


def test_points_without_a_key_are_left_out():
    mixed = [points.Point({"dataset": "a"}), points.Point({"dataset": "a", "patch": "7"})]
    assert points.selected(mixed, "patch=7") == mixed[1:]
    assert points.selected(mixed, "dataset=a") == mixed


def result_of(patch, tokens, dataset="breastmnist"):
    spread = {"balanced_accuracy": [0.5, 0.7], "auc": [None, 0.75]}
    sizes = {"patch_size": [patch, patch], "num_tokens": tokens, "train_seconds": 3.0, "test_milliseconds_per_image": 0.5}
    return {"dataset": dataset, **sizes, "seeds": [0, 1], "failed_seeds": [], "test": spread}


@pytest.mark.parametrize(("second", "shown"), [(14, False), (28, True)])
def test_the_table_names_points_that_data_set_and_patch_do_not_tell_apart(second, shown):
    table = tables.of_results(points.ordered({"one": result_of(second, 5), "other": result_of(28, 2)}))
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["tokens"] == ["2", "5"]
    assert columns["balanced accuracy"] == ["0.600 ± 0.141"] * 2
    assert columns["AUC"] == ["0.750"] * 2
    assert columns.get("point") == (["other", "one"] if shown else None)
