"""What a search begins with: the points that the spec asks for, and others spread over the space."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from support.samples import specs

from lorvp.errors import UserError
from sweeps.search.start_points import start_points
from sweeps.search.suggest import SpecSearch
from sweeps.spec.model import Spec

SPEC = """\
name: begun
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: digits}
  epochs: 2
space:
  head.kind: {choice: [flm, lp]}
  prompt.rank: {int: [1, 8]}
  prompt.lr: {log_uniform: [0.001, 1]}
  head.lr: {uniform: [0.1, 1], when: {head.kind: lp}}
search: {algorithm: tpe, trials: 40}
"""


def load(folder: Path, *overrides: str) -> Spec:
    return specs.load(folder, SPEC, *overrides)


def suggested(spec: Spec, count: int, again: list | tuple = ()) -> list:
    search = SpecSearch(spec, again)
    return [search.suggest(str(i)) for i in range(count)]


def test_they_are_spread_over_every_axis(tmp_path):
    spec = load(tmp_path, "search.trials=64")
    points = start_points(spec)
    assert len(points) == 10
    assert [point["head.kind"] for point in points[:8]].count("lp") == 4
    decades = [math.floor(math.log10(point["prompt.lr"])) for point in points[:8]]
    assert min(map(decades.count, (-3, -2, -1))) >= 2  # of 8 points, in three decades
    assert {point["prompt.rank"] > 4 for point in points[:2]} == {False, True}
    assert all(("head.lr" in point) == (point["head.kind"] == "lp") for point in points)


def test_they_are_the_same_each_time_and_others_under_another_seed(tmp_path):
    spec = load(tmp_path)
    assert start_points(spec) == start_points(load(tmp_path)) == suggested(spec, 10)
    assert start_points(load(tmp_path, "search.seed=1")) != start_points(spec)


@pytest.mark.parametrize("done", [1, 3, 12])
def test_a_resumed_sweep_goes_on_with_the_next_of_them(tmp_path, done):
    spec = load(tmp_path, "search.try_first=[{prompt.rank: 8, prompt.lr: 0.5, head.kind: flm}]")
    points = suggested(spec, 12)
    assert points[0] == {"head.kind": "flm", "prompt.rank": 8, "prompt.lr": 0.5}
    assert suggested(spec, 12, points[:done])[:10] == points[:10]


def test_a_point_may_leave_axes_to_the_search(tmp_path):
    first = suggested(load(tmp_path, "search.try_first=[{prompt.lr: 0.5}]"), 1)[0]
    assert first["prompt.lr"] == 0.5
    assert first.keys() >= {"head.kind", "prompt.rank"}


def test_each_share_tries_its_own_first(tmp_path):
    spec = load(tmp_path, "search.equal=head.kind", "search.try_first=[{head.kind: lp, prompt.lr: 0.5}]")
    of_lp = [point for point in suggested(spec, 8) if point["head.kind"] == "lp"]
    of_flm = [point for point in suggested(spec, 8) if point["head.kind"] == "flm"]
    assert of_lp[0]["prompt.lr"] == 0.5
    assert 0.5 not in [point["prompt.lr"] for point in of_flm]


@pytest.mark.parametrize("algorithm", ["random", "cmaes"])
def test_others_start_as_they_do(tmp_path, algorithm):
    overrides = ["space={prompt.lr: {log_uniform: [0.01, 1]}, prompt.rank: {int: [1, 8]}}"]
    assert start_points(load(tmp_path, f"search.algorithm={algorithm}", *overrides)) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.try_first=[{prompt.rang: 1}]", "no such axis in space; did you mean prompt.rank"),
        ("search.try_first=[{prompt.rank: 9}]", "9 is not a value of this axis"),
        ("search.try_first=[{prompt.rank: [9]}]", "must be a single number"),
        ("search.try_first=[{prompt.lr: much}]", "'much' is not a value of this axis"),
        ("search.try_first=[{head.kind: 3}]", "3 is not a value of this axis"),
    ],
)
def test_points_that_are_none_are_refused_in_one_line(tmp_path, override, message):
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path, override)
    assert "search.try_first" in str(raised.value)
