"""Two trials on the same images: the interval of their difference, and what a sweep says of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import digits_values
from scipy import stats
from support.samples.confirmed import SEEDS, make_confirmed, ran, searched
from support.samples.predicted import predicted

from cluster.trial_folder import State, TrialFolder
from sweeps.results import confirm
from sweeps.results.comparison import NOT_RECORDED as NOT_COUNTED
from sweeps.results.comparison import Comparison
from sweeps.results.leaderboard import NOT_RECORDED, OTHER_IMAGES, Leaderboard
from sweeps.results.paired import MAY_BE_NONE, SHOWN, WORSE, Gain, Paired, compare
from sweeps.spec.model import Spec


def counted(both: int, ours: int, theirs: int, neither: int) -> Paired:
    """Through the images themselves."""
    cells = [(True, True)] * both + [(True, False)] * ours + [(False, True)] * theirs + [(False, False)] * neither
    return Paired.of(*np.array(cells, bool).T)


@pytest.mark.parametrize(
    ("cells", "interval"),
    [
        # complete response before and after consolidation therapy (Cavo et al. 2012), by Agresti and Min's interval:
        # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables (2017), chapter 8
        ((59, 6, 16, 80), (-11.82, -0.45)),
        # 8 / 102, and 1.96 times the root of 13 - 64 / 102, over 102
        ((50, 10, 2, 38), (1.084, 14.602)),
    ],
)
def test_the_interval_is_the_published_one(cells, interval):
    paired = counted(*cells)
    assert (paired.both, paired.ours, paired.theirs, paired.images) == (*cells[:3], sum(cells))
    assert paired.points == pytest.approx(100 * (cells[1] - cells[2]) / sum(cells))
    assert paired.interval == pytest.approx(interval, abs=0.005)
    swapped = counted(cells[0], cells[2], cells[1], cells[3])
    assert swapped.interval == pytest.approx([-end for end in reversed(interval)], abs=0.005)


@pytest.mark.parametrize(
    "cells", [(59, 6, 16, 80), (300, 3, 2, 54), (1, 0, 0, 0), (0, 9, 0, 1), (49000, 400, 300, 300)]
)
def test_the_interval_by_other_means(cells):
    """That of a mean of +1, 0 and -1 over the images and half an image more in each cell."""
    values, weights = np.array([0, 1, -1, 0]), np.array(cells) + 0.5
    mean = np.average(values, weights=weights)
    error = np.sqrt(np.average((values - mean) ** 2, weights=weights) / weights.sum())
    expected = np.clip(100 * np.array(stats.norm.interval(0.95, mean, error)), -100, 100)
    assert counted(*cells).interval == pytest.approx(tuple(expected), abs=1e-4)


def test_of_a_model_and_itself():
    low, high = counted(90, 0, 0, 10).interval
    assert low == -high < 0


def test_what_95_percent_of_them_hold():
    random, held = np.random.default_rng(0), 0
    for _ in range(1000):
        at = random.random(200)  # 10 % are ours alone, 5 % theirs alone
        low, high = Paired.of(at < 0.7, (at > 0.1) & (at < 0.75)).interval
        held += low <= 5 <= high
    assert 930 < held < 975


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return Spec.model_validate(
        {
            "name": "done",
            "trial": digits_values(epochs=2),
            "space": {"prompt.rank": {"choice": [1, 2, 3, 4]}, "dataset.split_seed": {"choice": [0, 1]}},
            "search": {"algorithm": "grid"},
            "output": tmp_path,
        }
    )


def trials(spec: Spec, test: float | None = 90, **best: object) -> tuple[TrialFolder, TrialFolder]:
    """The best trial, with three others behind it, and the control, both of val top-1 90."""
    for rank, state in ((2, State.FINISHED), (3, State.FINISHED), (4, State.STOPPED)):
        ran(spec, spec.trial_config({"prompt.rank": rank, "dataset.split_seed": 0}), 50, 50, state)
    winner = spec.trial_config({"prompt.rank": 1, "dataset.split_seed": 0} | best)
    (control,) = spec.control_configs()
    return ran(spec, winner, 90, test), ran(spec, control, 90, test)


HALF = list(range(50, 100))


@pytest.mark.parametrize(
    ("wrong", "control_wrong", "words"),
    [([0], [0, *HALF], SHOWN), ([1, 2, 3], [4, 5], MAY_BE_NONE), ([0, *HALF], [0], WORSE), ([], [], MAY_BE_NONE)],
)
def test_the_verdict_says_what_is_shown(spec: Spec, wrong, control_wrong, words):
    best, control = trials(spec)
    predicted(best, val=[0, 1], test=wrong)
    predicted(control, val=[0, 2, 3], test=control_wrong)
    board = Leaderboard.read(spec)
    alone, other = len(set(control_wrong) - set(wrong)), len(set(wrong) - set(control_wrong))
    paired = Paired(100, 100 - len({*wrong, *control_wrong}), alone, other)
    assert compare(best, control) == {"val": Paired(100, 96, 2, 1), "test": paired}
    lines = board.verdict()[2:]
    assert lines[0] == (
        f"difference: val +1.00 [-2.86, +4.82], test {paired} points (one seed; 95 % intervals over images)"
    )
    assert lines[1] == f"test: {words} (100 images: on {alone} only the best is right, on {other} only the control)"
    assert lines[2] == "val is optimistic: the best of 4 trials was chosen on these 100 images"
    assert len(lines) == 3
    assert board.gain() == Gain("test", paired.points, *paired.interval, 100)
    assert board.gain().in_words() == words


def test_without_the_test_set_val_is_told_and_that_it_is_optimistic(spec: Spec):
    best, control = trials(spec, test=None)
    predicted(best, val=[1])
    predicted(control, val=HALF)
    board = Leaderboard.read(spec)
    first, words, optimistic = board.verdict()[2:]
    assert "test" not in first
    assert words == f"val: {SHOWN} (100 images: on 50 only the best is right, on 1 only the control)"
    assert optimistic == "val is optimistic: the best of 4 trials was chosen on these 100 images"
    assert (board.gain().split, board.gain().images) == ("val", 100)


def test_a_sweep_of_an_earlier_version_has_no_interval(spec: Spec):
    best, control = trials(spec)
    for record in (None, best, control):
        if record is not None:
            predicted(record, val=[], test=[])
        board = Leaderboard.read(spec)
        if record is not control:
            difference = f"difference: val +0.00, test +0.00 points (one seed; {NOT_RECORDED})"
            assert board.verdict()[2:] == [difference]
            assert board.gain() == Gain("test", 0.0)
            assert board.gain().in_words() is None
    assert NOT_RECORDED not in "\n".join(Leaderboard.read(spec).verdict())


def test_other_images_are_not_compared(spec: Spec):
    """Val is drawn anew by another seed, and the labels may agree; the test set stays."""
    best, control = trials(spec, **{"dataset.split_seed": 1})
    predicted(best, val=[1], test=[1])
    predicted(control, val=[2], test=[2])
    assert compare(best, control) == {"test": Paired(100, 98, 1, 1)}
    first, second = Leaderboard.read(spec).verdict()[2:]
    assert first.startswith("difference: val +0.00, test +0.00 [")
    assert second.startswith(f"test: {MAY_BE_NONE}")
    predicted(best, val=[1])
    assert compare(best, control) == {}
    assert Leaderboard.read(spec).verdict()[2] == f"difference: val +0.00, test +0.00 points (one seed; {OTHER_IMAGES})"


@pytest.mark.parametrize(
    "only_in_training", [{"dataset.crop_flip": True}, {"dataset.trivial_augment": True}, {"dataset.color_jitter": 0.4}]
)
def test_what_is_done_to_training_images_alone_leaves_val_the_same(spec: Spec, only_in_training: dict):
    best, control = trials(spec, **only_in_training)
    predicted(best, val=[1])
    predicted(control, val=[2])
    assert best.config.dataset != control.config.dataset
    assert compare(best, control) == {"val": Paired(100, 98, 1, 1)}


def test_a_confirmation_tells_seeds_and_images(tmp_path):
    spec = make_confirmed(tmp_path)
    searched(spec)
    choices = low_rank, border, control = confirm.choose(spec)
    for choice, vals, tests, wrong in (
        (low_rank, [79, 82, 81], [90, 95, 94], [0, 1]),
        (border, [50, 51, 52], [60, 60, 61], [*HALF, 0]),
        (control, [76, 77, 75], [73, 74.5, 72.5], [1, 2, 3]),
    ):
        config = TrialFolder(spec.trials / choice.trial).config
        for seed, val, test in zip(SEEDS, vals, tests, strict=True):
            predicted(ran(spec, spec.confirmed(config, seed), val, test), val=[0], test=[*wrong, seed])
    comparison = Comparison.of(Leaderboard.read(spec), choices)
    said = comparison.verdict()
    label = f"{low_rank.trial} (prompt.kind low_rank)"
    (line,) = [each for each in said if each.startswith(f"{label} less the control")]
    assert line.endswith("(mean of 3 seeds, 95 % t interval; 100 val and 100 test images)")
    assert f"{low_rank.trial}, test: {SHOWN}" in said
    assert f"{border.trial}, test: {WORSE}" in said
    assert f"{border.trial}, val: {WORSE}" in said
    # the model is of the seed that is best on val: 8
    low, high = Paired(100, 95, 2, 1).interval
    assert said[-1] == (
        f"the model, {low_rank.seeds[8]}, less the control: test +1.00 [{low:+.2f}, {high:+.2f}] points (seed 8; "
        "95 % interval over 100 images: on 2 only the model is right, on 1 only the control)"
    )
    record = comparison.records()[0]
    assert (record["val_images"], record["test_images"]) == (100, 100)
    means = record["test_difference_mean"], record["test_difference_low"], record["test_difference_high"]
    assert comparison.gain() == Gain("test", *means, 100)
    parquet, markdown = comparison.write()
    assert [row["test_images"] for row in pq.read_table(parquet).to_pylist()] == [100] * 3
    assert "100 val and 100 test images" in markdown.read_text()
    for name in low_rank.seeds.values():
        TrialFolder(spec.trials / name).newest().predictions.unlink()
    said = Comparison.of(Leaderboard.read(spec), choices).verdict()
    assert NOT_COUNTED in said
    assert not any("the model" in one for one in said)
    assert comparison.records()[0]["test_images"] is None


def test_the_words_follow_the_interval():
    gains = [Gain("test", 0.0, low, high, 9) for low, high in pairwise((-2.0, -1.0, 0.0, 1.0, 2.0))]
    assert [gain.in_words() for gain in gains] == [WORSE, MAY_BE_NONE, MAY_BE_NONE, SHOWN]
