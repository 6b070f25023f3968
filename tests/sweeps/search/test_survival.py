"""How often early stopping keeps the best of recorded trials, when they come in other orders."""

from __future__ import annotations

import itertools

import pytest
from conftest import digits_values

from sweeps.search.survival import ScoreCurve, survival
from sweeps.spec.model import Spec

EARLY = [[50 + i, 60 + i, 70 + i, 80 + i] for i in range(6)]
"""Curves that lie in the order of their ends from the first epoch on."""
LATE = [[50 - i, 60 - i, 70 + i, 80 + i] for i in range(6)]
"""The best starts slowest."""


def make(scores: list[list[float]], concurrent: int = 1, inits: list[str] | None = None, **stopping) -> tuple:
    spec = Spec.model_validate(
        {
            "name": "recorded",
            "trial": digits_values(epochs=4, method="lorvp"),
            "space": {"prompt.rank": {"int": [1, 9]}, "head.init": {"choice": ["random", "fitted"]}},
            "search": {"concurrent": concurrent},
            "early_stopping": stopping,
        }
    )
    inits = inits or ["random"] * len(scores)
    points = [{"prompt.rank": i + 1, "head.init": init} for i, init in enumerate(inits)]
    return spec, [ScoreCurve(point, curve) for point, curve in zip(points, scores, strict=True)]


def test_without_a_rule_all_is_kept_and_paid():
    found = survival(*make(LATE), orders=20)
    assert (found.best, found.one_of_two, found.loss, found.cost) == (1, 1, 0, 1)


@pytest.mark.parametrize("concurrent", [1, 3])
def test_the_best_is_kept_where_it_leads_from_the_start(concurrent: int):
    found = survival(*make(EARLY, concurrent, rule="asha", grace_epochs=1, reduction_factor=2), orders=50)
    assert (found.best, found.loss) == (1, 0)
    assert found.cost < 0.8


def test_a_slow_starter_is_kept_only_where_it_comes_first():
    """One trial after another: at each rung the better half of those that came so far goes on."""
    spec, trials = make(LATE, rule="asha", grace_epochs=1, reduction_factor=2)
    kept = 0
    for order in itertools.permutations(range(6)):
        rungs: dict[int, list[float]] = {1: [], 2: []}
        for i in order:
            for epoch, seen in rungs.items():
                seen.append(LATE[i][epoch - 1])
                better = sorted(seen[:-1])
                middle = len(better) // 2
                median = (better[middle] + better[~middle]) / 2 if better else LATE[i][epoch - 1]
                if LATE[i][epoch - 1] < median:
                    break
            else:
                kept += i == 5
    assert survival(spec, trials, orders=3000).best == pytest.approx(kept / 720, abs=0.03)
    patient = make(LATE, rule="asha", grace_epochs=3, reduction_factor=2)
    assert survival(*patient, orders=20).best == 1


def test_trials_that_are_not_compared_do_not_end_each_other():
    inits = ["random", "random", "random", "fitted", "fitted", "fitted"]
    curves = [[20, 40, 90], [19, 39, 80], [18, 38, 70], [60, 61, 62], [59, 60, 61], [58, 59, 60]]
    rule = {"rule": "asha", "grace_epochs": 1, "reduction_factor": 3}
    assert survival(*make(curves, inits=inits, **rule), orders=100).best == 1
    assert survival(*make(curves, inits=inits, within=[], **rule), orders=100).best < 0.5


def test_equal_ends_are_equally_good_and_a_stopped_trial_is_never_the_best():
    curves = [[1, 2, 3, 9], [9, 9, 9, 9], [99, 99]]
    spec, trials = make(curves, rule="asha", grace_epochs=1, reduction_factor=2)
    found = survival(spec, trials, orders=200)
    assert 0 < found.best < 1  # the stopped one, where it comes first, ends both
    assert found.one_of_two == found.best
    median = make(curves, rule="median", grace_epochs=1)
    assert survival(*median, orders=20).best == 1  # it takes three others before it ends a trial


def test_a_forecast_goes_by_those_that_have_caught_up():
    """Random heads start below fitted ones, end above them, and lie in the order of their ends among themselves."""
    slow = [[100 - error * (80 + 8 * i) / 80 for error in (80, 40, 20, 10)] for i in range(4)]
    inert = [[60, 60, 60 + i, 61 + i] for i in range(4)]
    trials = make(slow + inert, inits=["random"] * 4 + ["fitted"] * 4, rule="forecast", grace_epochs=1)
    found = survival(*trials, orders=100)
    assert (found.best, found.loss) == (1, 0)
    early = survival(*make(EARLY, rule="forecast", grace_epochs=1), orders=100)
    assert early.best == 1
    assert early.cost < 0.8


def test_a_forecast_of_a_loss(monkeypatch):
    spec, _ = make(EARLY, rule="forecast", grace_epochs=1)
    losses = [ScoreCurve({}, [2.0 + i, 1.5 + i, 1.2 + i, 1.0 + i]) for i in range(6)]
    found = survival(spec.model_copy(update={"objective": "val_loss"}), losses, orders=100)
    assert found.best == 1
    assert found.cost < 0.8
