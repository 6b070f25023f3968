"""What is said of a sweep at its end, from folders as the jobs leave them."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from conftest import digits_values
from scipy import stats
from support.samples.confirmed import SEEDS, confirmed, make_confirmed, ran, searched

from cluster.trial_folder import Cause, State, TrialFolder
from sweeps.results import confirm
from sweeps.results.comparison import PUBLISHED_BIAS, VAL_TRAINED_ON, Comparison, paired_difference
from sweeps.results.leaderboard import NO_VAL, Bias, Leaderboard
from sweeps.results.paired import MAY_BE_NONE
from sweeps.spec.model import Spec


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
    assert board.rung_correlation() == ["rank correlation with the end, of 3 finished trials: epoch 1 0.50"]


def test_an_epoch_at_a_rung_is_never_the_best(spec: Spec):
    winner = record(spec, 1, [20, 60, 61])
    record(spec, 2, [99, 55, 52])
    best = Leaderboard.read(spec).best()
    assert best.trial.name == winner.name
    assert [entry.best()["val_top1"] for entry in Leaderboard.read(spec).entries] == [61, 55]


@pytest.mark.parametrize("state", [State.FAILED, None])
def test_a_control_that_is_missing_is_said(spec: Spec, state: State | None):
    record(spec, 1, [20, 60, 61])
    if state:
        (config,) = spec.control_configs()
        TrialFolder.request(spec.trials, config).claim().end(state, "CUDA out of memory", Cause.OUT_OF_MEMORY)
    why = "out of memory: CUDA out of memory" if state else "none has run to its end"
    missing = f"the control is missing ({why}): how much the prompt gains is not known"
    assert Leaderboard.read(spec).verdict()[1:] == [missing]
    without = spec.model_copy(update={"control": None})
    assert len(Leaderboard.read(without).verdict()) == 1


def test_the_best_of_each_share_are_confirmed(tmp_path):
    spec = make_confirmed(tmp_path)
    searched(spec)
    assert confirm.chosen(spec) is None
    choices = confirm.choose(spec)
    vals = [TrialFolder(spec.trials / choice.trial).results()[-1]["val_top1"] for choice in choices]
    assert vals == [80, 50, 77]
    assert [choice.control for choice in choices] == [False, False, True]
    assert confirm.chosen(spec) == choices
    jobs = SimpleNamespace(request=partial(TrialFolder.request, spec.trials))
    names = confirm.request(spec, choices, jobs.request)
    assert names == {name for choice in choices for name in choice.seeds.values()}
    assert len(names) == spec.number_of_confirmations() == 9
    for choice in choices:
        for seed, name in choice.seeds.items():
            config = TrialFolder(spec.trials / name).config
            assert spec.stage(config) == "confirm"
            assert (config.init_seed, config.order_seed, config.read_test) == (seed, seed, True)
    # what was better, had it been there then, changes nothing; a longer search chooses again
    ran(spec, spec.trial_config({"prompt.kind": "low_rank", "prompt.rank": 5}), 90)
    assert confirm.chosen(spec) == choices
    longer = make_confirmed(tmp_path, search={"algorithm": "tpe", "trials": 8, "equal": "prompt.kind"})
    assert confirm.chosen(longer) is None
    assert confirm.choose(longer)[1:] == choices[1:]
    assert confirm.chosen(longer)[0].trial == Leaderboard.read(spec).best().trial.name != choices[0].trial


def test_configs_that_differ_in_a_seed_are_confirmed_once(tmp_path):
    space = {"init_seed": {"choice": [0, 1]}, "prompt.rank": {"int": [1, 8]}}
    spec = make_confirmed(tmp_path, space=space, search={"algorithm": "tpe", "trials": 4}, confirm={"top": 2})
    for seed, rank, val in ((0, 1, 60), (1, 1, 70), (0, 2, 50)):
        ran(spec, spec.trial_config({"init_seed": seed, "prompt.rank": rank}), val)
    found = [TrialFolder(spec.trials / choice.trial).config for choice in confirm.choose(spec)]
    assert [(config.init_seed, config.prompt.rank) for config in found] == [(1, 1), (0, 2)]


def test_where_val_was_trained_on_the_search_says_which_is_best(tmp_path):
    spec = make_confirmed(tmp_path, confirm={"seeds": SEEDS, "all_images": True})
    searched(spec)
    low_rank, border, control = choices = confirm.choose(spec)
    for choice, val in ((low_rank, 97), (border, 99), (control, 98)):
        confirmed(spec, choice, [val, val + 1, val - 1], [70, 72, 74])
    for entry in (entries := Leaderboard.read(spec).entries):
        again = entry.trial.name in {name for choice in choices for name in choice.seeds.values()}
        assert entry.trial.config.dataset.train_on_val == again
        assert entry.best()["epoch"] == 2
    assert len(entries) > 9
    comparison = Comparison.of(Leaderboard.read(spec), choices)
    assert comparison.best_row().choice == low_rank
    first, second, *_ = comparison.verdict()
    assert first == VAL_TRAINED_ON
    assert second.startswith(f"best config {low_rank.trial} ")


def test_figures_over_seeds(tmp_path):
    spec = make_confirmed(tmp_path)
    searched(spec)
    choices = low_rank, border, control = confirm.choose(spec)
    mine, theirs = ([79, 82, 81], [70, 75, 74]), ([76, 77, 75], [73, 74.5, 72.5])
    confirmed(spec, low_rank, *mine, peak_memory_mib=120.0)
    confirmed(spec, border, [50, 51, 52], [60, 60, 60], parameters={"head": 7, "adapter": 9})
    confirmed(spec, control, *theirs, parameters={})
    board = Leaderboard.read(spec)
    assert board.best().best()["val_top1"] == 80  # what confirms is no trial of the search
    assert board.best(control=True).best()["val_top1"] == 77
    comparison = Comparison.of(board, choices)
    assert comparison.best().best()["val_top1"] == 82
    first, second, last = comparison.records()
    for i, name in enumerate(("val", "test")):
        assert first[f"{name}_top1"] == pytest.approx(sum(mine[i]) / 3)
        spread = stats.describe(mine[i]).variance ** 0.5
        assert first[f"{name}_top1_sd"] == pytest.approx(spread)
        expected = stats.ttest_rel(mine[i], theirs[i]).confidence_interval(0.95)
        assert first[f"{name}_difference_mean"] == pytest.approx(sum(mine[i]) / 3 - sum(theirs[i]) / 3)
        assert first[f"{name}_difference_low"] == pytest.approx(expected.low)
        assert first[f"{name}_difference_high"] == pytest.approx(expected.high)
    # by hand: differences 3, 5, 6: mean 14/3, sd sqrt(7/3); t of 2 degrees of freedom at 97.5 % is 4.302653
    assert first["val_difference_low"] == pytest.approx(14 / 3 - 4.302653 * math.sqrt(7 / 9))
    assert (first["n"], first["peak_memory_mib"], first["seconds"]) == (3, 120, 3)
    assert [first[f"parameters_{part}"] for part in ("prompt", "adapter", "head")] == [30, 4, 5]
    assert [second[f"parameters_{part}"] for part in ("prompt", "adapter", "head")] == [None, 9, 7]
    assert (last["parameters_head"], last["val_difference_mean"], last["control"]) == (None, None, True)
    assert [record["search_seconds"] for record in (first, second, last)] == [4 * 3, 2 * 3, 4 * 3]
    said = "\n".join(comparison.verdict())
    assert f"best config {low_rank.trial} (prompt.kind low_rank): val top-1 80.67 ± 1.53 %, test top-1 73.00 ±" in said
    assert f"{low_rank.trial} (prompt.kind low_rank) less the control: val +4.67 [+0.87, +8.46], test -0.33 [" in said
    assert f"{low_rank.trial}, test: {MAY_BE_NONE}" in said
    assert said.count(MAY_BE_NONE) == 1
    assert PUBLISHED_BIAS not in said
    assert [row["prompt"] for row in comparison.cells()] == ["low_rank", "border", "none"]


def test_a_fitted_control_is_paired_with_every_seed(tmp_path):
    spec = make_confirmed(tmp_path, control={})
    ran(spec, spec.trial_config({"prompt.kind": "low_rank"}), 80)
    for config in spec.control_configs():
        ran(spec, config, 90)
    choices = prompt, control = confirm.choose(spec)
    assert len(set(control.seeds.values())) == 1
    confirmed(spec, prompt, [78, 80, 82], [70, 71, 72])
    confirmed(spec, control, [90] * 3, [75] * 3)
    comparison = Comparison.of(Leaderboard.read(spec), choices)
    first, last = comparison.records()
    assert (last["n"], last["val_top1"], last["val_top1_sd"], last["test_top1_sd"]) == (1, 90, 0, 0)
    assert (first["val_difference_mean"], first["test_difference_mean"]) == (-10, -4)
    expected = stats.t.interval(0.95, 2, loc=-10, scale=2 / math.sqrt(3))
    assert (first["val_difference_low"], first["val_difference_high"]) == pytest.approx(expected)
    assert comparison.verdict()[1].endswith("test top-1 75.00 ± 0.00 % (one trial: no seed is used)")


def test_a_seed_that_failed(tmp_path):
    spec = make_confirmed(tmp_path)
    searched(spec)
    choices = low_rank, border, control = confirm.choose(spec)
    config = TrialFolder(spec.trials / low_rank.trial).config
    ran(spec, spec.confirmed(config, 7), 95, 90)
    for seed in (8, 9):
        ran(spec, spec.confirmed(config, seed), 10, state=State.FAILED)
    confirmed(spec, border, [50, 51, 52], [60, 60, 60])
    confirmed(spec, control, [50, 51, 52], [61, 61, 61])
    comparison = Comparison.of(Leaderboard.read(spec), choices)
    assert comparison.best_row().choice == border
    first, second, _ = comparison.records()
    assert (first["n"], first["val_top1"], first["val_top1_sd"]) == (1, 95, None)
    assert (first["val_difference_mean"], first["val_difference_low"]) == (45, None)
    assert (second["val_difference_low"], second["test_difference_high"]) == (0, -1)
    said = "\n".join(comparison.verdict())
    assert "val +45.00, test +29.00 points (one pair)" in said
    assert f"{border.trial}, val: {MAY_BE_NONE}" in said
    assert comparison.cells()[0]["val top-1"] == "95.00 ± -"


def test_nothing_was_confirmed(tmp_path):
    spec = make_confirmed(tmp_path)
    spec.folder.mkdir()
    assert confirm.choose(spec) == confirm.chosen(spec) == []
    comparison = Comparison.of(Leaderboard.read(spec), [])
    assert comparison.best() is None
    assert comparison.verdict() == ["no trial was confirmed: there is no best prompt"]
    comparison.write()
    comparison.table()


def test_comparison_files(tmp_path):
    spec = make_confirmed(tmp_path, trial=digits_values(select="test_best_epoch"))
    searched(spec)
    choices = confirm.choose(spec)
    for choice in choices:
        config = TrialFolder(spec.trials / choice.trial).config
        for seed in SEEDS:
            attempt = ran(spec, spec.confirmed(config, seed), 60, 70).newest()
            first, second = attempt.results()
            (attempt.path / "results.jsonl").unlink()
            attempt.append(first | {"test_top1": 72})
            attempt.append(second)
    comparison = Comparison.of(Leaderboard.read(spec), choices)
    parquet, markdown = comparison.write()
    assert (parquet.name, markdown.name) == ("comparison.parquet", "comparison.md")
    rows = pq.read_table(parquet).to_pylist()
    assert [row["prompt.kind"] for row in rows] == ["low_rank", "border", "none"]
    assert [{k: v for k, v in row.items() if k != "prompt.kind"} for row in rows] == comparison.records()
    assert rows[0]["test_top1"] == 72  # of the best test epoch
    assert rows[0]["val_top1"] == 59
    assert rows[0]["test_at_best_val"] == 70
    text = markdown.read_text()
    assert text.count("\n|") == 2 + 3
    assert (
        f"| low_rank | {choices[0].trial} | 59.00 ± 0.00 | 72.00 ± 0.00 | 3 | 30 | 4 | 5 | 100 | 3 | 0.5 | 12 |" in text
    )
    assert PUBLISHED_BIAS in text
    assert "against the epoch that is best on val: +2.00 points (mean of 9 trials, +2.00 to +2.00)" in text
    assert "test top-1 70.00 ± 0.00 %, less the control +0.00 [+0.00, +0.00] points" in text
    assert {path.name for path in spec.folder.iterdir()} == {"trials", "confirm.json", parquet.name, markdown.name}
    one = make_confirmed(tmp_path / "one", search={"algorithm": "tpe", "trials": 4})
    searched(one)
    table = pq.read_table(Comparison.of(Leaderboard.read(one), []).write()[0])
    assert table.column_names[0] == "trial"


def test_the_bias_of_the_published_protocol(spec: Spec, tmp_path: Path):
    """Its best test epoch less the test figure at the best val epoch, of finished trials with epochs to choose from."""
    published = spec.model_copy(update={"trial": digits_values(epochs=3, select="test_best_epoch")})
    for rank, (vals, tests, state) in enumerate(
        [
            ([50, 70, 60], [40, 51, 55], State.FINISHED),  # 55 - 51
            ([50, 60, 60], [41, 42, 43], State.FINISHED),  # of two equal ones the earlier: 43 - 42
            ([50, 60, 70], [40, 50, 60], State.FINISHED),
            ([50, 40], [10, 90], State.STOPPED),
        ],
        start=1,
    ):
        attempt = TrialFolder.request(published.trials, published.trial_config({"prompt.rank": rank})).claim()
        for epoch, (val, test) in enumerate(zip(vals, tests, strict=True), start=1):
            others = {"whole": True, "parameters": {}, "lr": {}, "time": 0.0, "test_loss": 0.0, "test_top5": 99.0}
            attempt.append({"epoch": epoch, "val_top1": val, "test_top1": test} | others)
        attempt.end(state)
    board = Leaderboard.read(published)
    assert Bias.of(board.entries) == Bias(mean=5 / 3, low=0, high=4, trials=3)
    board.write_parquet(tmp_path / "results.parquet")
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert {row["test_at_best_val"] for row in rows if row["param.prompt.rank"] == 1} == {51}
    (control,) = published.control_configs()
    attempt = TrialFolder.request(published.trials, control).claim()
    attempt.append({"epoch": 1, "val_top1": 60, "test_top1": 50, "whole": True})
    attempt.end(State.FINISHED)
    assert str(Bias.of(board.entries)) in Leaderboard.read(published).verdict()
    assert Bias.of(Leaderboard.read(spec).entries[:0]) is None


def test_without_validation_images_no_bias_is_told(spec: Spec):
    """Where nothing is held back (val_fraction 0) val is the test set, and says nothing of the bias."""
    trial = digits_values(epochs=3, select="test_best_epoch", dataset={"name": "digits", "val_fraction": 0})
    whole = spec.model_copy(update={"trial": trial})
    for config in (whole.trial_config({"prompt.rank": 1}), *whole.control_configs()):
        attempt = TrialFolder.request(whole.trials, config).claim()
        for epoch, top1 in enumerate([40, 60, 50], start=1):
            attempt.append({"epoch": epoch, "val_top1": top1, "test_top1": top1, "whole": True})
        attempt.end(State.FINISHED)
    board = Leaderboard.read(whole)
    assert board.entries[0].test_at_best_val() is None
    assert Bias.of(board.entries) is None
    assert NO_VAL in board.verdict()
    assert NO_VAL not in Leaderboard.read(spec).verdict()


def test_an_interval_is_scipys():
    assert (paired_difference([3.0]).mean, paired_difference([3.0]).low) == (3, None)
    assert (paired_difference([2.0, 2.0]).low, paired_difference([2.0, 2.0]).high) == (2, 2)
    values = [0.3, -1.2, 2.4, 0.1, 0.9]
    found = paired_difference(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.in_words() == MAY_BE_NONE) == (stats.ttest_1samp(values, 0).pvalue > 0.05)
    assert paired_difference([3.0]).in_words() is None


def test_stages_in_the_results(tmp_path):
    spec = make_confirmed(tmp_path)
    searched(spec)
    choices = confirm.choose(spec)
    confirmed(spec, choices[0], [79, 82, 81], [70, 75, 74])
    board = Leaderboard.read(spec)
    board.write_parquet(tmp_path / "results.parquet")
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert len(rows) == 2 * (10 + 3)
    assert {row["trial"] for row in rows if row["stage"] == "confirm"} == set(choices[0].seeds.values())
    assert board.table().title == "confirmed: 10 trials"
