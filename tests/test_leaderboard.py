"""What is said of a sweep at its end, from folders as the jobs leave them."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import digits_values

from cluster.folder import State, TrialFolder
from sweeps.leaderboard import Leaderboard
from sweeps.spec import Spec


@pytest.fixture
def spec(tmp_path) -> Spec:
    return Spec.model_validate(
        {
            "name": "done",
            "trial": digits_values(epochs=3, rungs=[{"epochs": 1, "image_size": 16}]),
            "space": {"prompt.rank": {"choice": [1, 2, 3, 4]}},
            "search": {"algorithm": "grid"},
            "output": tmp_path,
        }
    )


def record(spec: Spec, rank: int, values: list[float], state: State = State.FINISHED) -> TrialFolder:
    """A trial with these val accuracies, the first at a rung."""
    trial = TrialFolder.request(spec.trials, spec.trial_config({"prompt.rank": rank}))
    attempt = trial.claim()
    for epoch, value in enumerate(values, start=1):
        last = {"test_top1": value - 1} if epoch == 3 else {"test_top1": None}
        attempt.append({"epoch": epoch, "val_top1": value, "whole": epoch > 1} | last)
    attempt.end(state)
    return trial


def test_how_far_a_rung_can_be_trusted(spec: Spec, tmp_path: Path):
    for rank, values in ((1, [50, 60, 61]), (2, [40, 55, 52]), (3, [45, 50, 51])):
        record(spec, rank, values)
    record(spec, 4, [10], State.STOPPED)
    board = Leaderboard.read(spec)
    assert board.trust() == ["rank correlation with the end, of 3 finished trials: epoch 1 0.50"]


def test_an_epoch_at_a_rung_is_never_the_best(spec: Spec):
    winner = record(spec, 1, [20, 60, 61])
    record(spec, 2, [99, 55, 52])
    best = Leaderboard.read(spec).best()
    assert best.trial.name == winner.name
    assert [entry.best()["val_top1"] for entry in Leaderboard.read(spec).entries] == [61, 55]
