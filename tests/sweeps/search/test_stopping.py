"""Early stopping ends a trial only for the sake of trials that it can be compared with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.samples import specs

from lorvp.errors import UserError
from sweeps.search.stopping import make_scheduler
from sweeps.search.tune_trial import SCORE
from sweeps.spec.model import Spec

SPEC = """\
name: compared
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: digits}
  epochs: 4
space:
  head.init: {choice: [random, fitted]}
  prompt.rank: {choice: [1, 4]}
  prompt.lr: {log_uniform: [0.003, 0.03]}
search: {algorithm: tpe, trials: 8}
early_stopping: {rule: asha, grace_epochs: 1, reduction_factor: 2}
"""


def load(folder: Path, *overrides: str) -> Spec:
    return specs.load(folder, SPEC, *overrides)


def decisions(spec: Spec, trials: list[tuple[dict[str, Any], float]]) -> list[str]:
    """What is decided on the first epoch of each trial, given by its point and its score."""
    scheduler, said = make_scheduler(spec), []
    for number, (config, score) in enumerate(trials):
        trial: Any = SimpleNamespace(trial_id=str(number), config=config)
        scheduler.on_trial_add(None, trial)
        result = {"epoch": 1, "training_iteration": 1, SCORE: score}
        said.append(scheduler.on_trial_result(None, trial, result))
    return said


FITTED, RANDOM = {"head.init": "fitted", "prompt.rank": 1}, {"head.init": "random", "prompt.rank": 1}
SLOW_STARTERS = [(FITTED, 90.0), (FITTED, 91.0), (RANDOM, 20.0), (RANDOM, 30.0), (RANDOM, 22.0)]


def test_a_fitted_head_does_not_end_one_that_starts_at_random(tmp_path):
    assert decisions(load(tmp_path), SLOW_STARTERS) == ["CONTINUE"] * 4 + ["STOP"]
    apart = load(tmp_path, "early_stopping.within=[]")  # all are compared with all
    assert decisions(apart, SLOW_STARTERS) == ["CONTINUE", "CONTINUE", "STOP", "STOP", "STOP"]


def test_any_choice_axis_may_part_them(tmp_path):
    spec = load(tmp_path, "early_stopping.within=[prompt.rank]")
    other = FITTED | {"prompt.rank": 4}
    assert decisions(spec, [(FITTED, 90.0), (other, 50.0), (other, 40.0), (RANDOM, 20.0)]) == [
        *("CONTINUE", "CONTINUE", "STOP", "STOP")
    ]


def test_shares_are_compared_by_themselves_too(tmp_path):
    spec = load(tmp_path, "search.equal=prompt.rank")
    assert spec.compared_within() == ["prompt.rank", "head.init"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("prompt.rang", "no such axis in space: prompt.rang; did you mean prompt.rank"), ("prompt.lr", "a choice axis")],
)
def test_other_axes_are_refused_in_one_line(tmp_path, name, message):
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path, f"early_stopping.within=[{name}]")
    assert "early_stopping.within" in str(raised.value)
