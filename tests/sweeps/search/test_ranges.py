"""An axis with a range for each condition: as the search, a grid, a resumed sweep and the errors see it."""

from __future__ import annotations

import pytest
from support.samples.specs import load

from lorvp.errors import UserError
from sweeps.search.suggest import SpecSearch
from sweeps.spec.model import Spec

SPEC = """\
name: ranges
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: digits}
  epochs: 2
space:
  prompt.optimizer: {choice: [adam, sgd]}
  prompt.lr:
    - {log_uniform: [0.003, 0.03], when: {prompt.optimizer: adam}}
    - {log_uniform: [0.05, 0.5], when: {prompt.optimizer: sgd}}
  head.lr: {log_uniform: [0.01, 1]}
search: {algorithm: tpe, trials: 24}
"""
GRID = SPEC.replace("log_uniform: [0.003, 0.03]", "choice: [0.003, 0.03]").replace(
    "log_uniform: [0.05, 0.5]", "choice: [0.05, 0.1, 0.5]"
)
ENDS = {"adam": (0.003, 0.03), "sgd": (0.05, 0.5)}


@pytest.mark.parametrize("algorithm", ["tpe", "random", "gp"])
def test_each_condition_has_its_range_and_is_resumed(tmp_path, algorithm):
    spec = load(tmp_path, SPEC, f"search.algorithm={algorithm}")
    search = SpecSearch(spec)
    points = []
    for i in range(24):
        point = search.suggest(str(i))
        assert isinstance(point, dict)
        assert point.keys() == spec.space.keys()
        low, high = ENDS[point["prompt.optimizer"]]
        assert low <= point["prompt.lr"] <= high
        assert spec.params(spec.trial_config(point)) == point
        search.on_trial_complete(str(i), {"score": point["prompt.lr"]})
        points.append(point)
    assert {point["prompt.optimizer"] for point in points} == ENDS.keys()
    again = SpecSearch(spec, points)
    assert [again.suggest(str(i)) for i in range(24)] == points


def test_optuna_tells_the_ranges_apart(tmp_path):
    """Each is a parameter of its own, so that a model of one range learns nothing from the other's values."""
    spec = load(tmp_path, SPEC)
    search = SpecSearch(spec)
    for i in range(12):
        search.suggest(str(i))
        search.on_trial_complete(str(i), {"score": 1.0})
    (arm,) = search._arms.values()
    for trial in arm._ot_study.trials:
        lr = "prompt.lr" if trial.params["prompt.optimizer"] == "adam" else "prompt.lr [1]"
        assert trial.params.keys() == {"prompt.optimizer", lr, "head.lr"}


def test_a_grid_takes_the_cells_of_each_range(tmp_path):
    text = GRID.replace("head.lr: {log_uniform: [0.01, 1]}", "head.lr: {choice: [0.1]}")
    spec = load(tmp_path, text, "search={algorithm: grid}")
    found = [(cell["prompt.optimizer"], cell["prompt.lr"]) for cell in spec.cells()]
    assert found == [("adam", 0.003), ("adam", 0.03), ("sgd", 0.05), ("sgd", 0.1), ("sgd", 0.5)]
    search = SpecSearch(spec)
    assert [search.suggest(str(i)) for i in range(5)] == spec.cells()
    assert spec.example({"prompt.lr": 0.5})["prompt.optimizer"] == "sgd"


def test_whoever_asks_for_the_axis_alone_sees_it_whole(tmp_path):
    axis = load(tmp_path, SPEC).space["prompt.lr"]
    assert (axis.bounds, axis.log_uniform, axis.choice) == ((0.003, 0.5), (0.003, 0.5), None)
    assert load(tmp_path, GRID).space["prompt.lr"].choice == [0.003, 0.03, 0.05, 0.1, 0.5]
    mixed = SPEC.replace("log_uniform: [0.05", "uniform: [0.05")
    assert load(tmp_path, mixed).space["prompt.lr"].uniform == (0.003, 0.5)


def test_a_record_of_ranges_is_read_back(tmp_path):
    """As what comes after a sweep reads it: the report, the tables."""
    for text in (SPEC, GRID):
        spec = load(tmp_path, text)
        assert Spec.model_validate(spec.model_dump(mode="json", by_alias=True)) == spec
        assert Spec.model_validate_json(spec.model_dump_json(by_alias=True, exclude_defaults=True)) == spec


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (", when: {prompt.optimizer: sgd}", "", "each range needs when"),
        ("log_uniform: [0.05, 0.5]", "choice: [1]", "ranges are all lists"),
        ("log_uniform: [0.05, 0.5]", "log_uniform: [0.5, 0.05]", "the low end 0.5 must be below"),
        ("when: {prompt.optimizer: sgd}", "when: {prompt.optimiser: sgd}", "no such axis in space: prompt.optimiser"),
        ("when: {prompt.optimizer: sgd}", "when: {prompt.optimizer: adamw}", "'adamw' is not a value of prompt.opt"),
        ("[0.05, 0.5]", "[-1, 0.5]", "log_uniform needs a low end above 0"),
    ],
)
def test_what_is_wrong_with_a_range_is_one_line(tmp_path, old, new, message):
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path, SPEC.replace(old, new))
    assert "sweep.yaml:8: space.prompt.lr" in str(raised.value).replace("yaml:9", "yaml:8").replace("yaml:10", "yaml:8")
    assert "\n" not in str(raised.value)


def test_a_value_that_the_key_can_not_take_names_the_axis(tmp_path):
    with pytest.raises(UserError, match=r"space.prompt.lr: Input should be greater than 0"):
        load(tmp_path, SPEC.replace("log_uniform: [0.05, 0.5]", "uniform: [-1, 0.5]"))


def test_values_under_no_condition_are_pinned_by_set(tmp_path):
    spec = load(tmp_path, SPEC, "trial.prompt.momentum=0.5")  # of the trials whose prompt sgd trains
    momenta = {
        name: spec.trial_config(spec.example({"prompt.optimizer": name})).values().get("prompt.momentum")
        for name in ENDS
    }
    assert momenta == {"adam": None, "sgd": 0.5}


def test_a_condition_names_a_value(tmp_path):
    with pytest.raises(UserError, match="needs at least one value"):
        load(tmp_path, SPEC.replace("when: {prompt.optimizer: sgd}", "when: {prompt.optimizer: []}"))
