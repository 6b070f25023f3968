"""Sweeps replayed in virtual time. What they come to is worked out by hand: every epoch takes 10 s."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import digits_values
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from typer.testing import CliRunner

from cluster.profile import Profile
from cluster.trial_folder import State, TrialFolder
from lorvp.errors import UserError
from lorvp.utils import cli
from sweeps.folder import RECORD
from sweeps.report.stopping import stopping_lines
from sweeps.results.leaderboard import Leaderboard
from sweeps.search.stopping import make_scheduler
from sweeps.search.tune_trial import SCORE
from sweeps.simulate import __main__ as simulate
from sweeps.simulate import survival
from sweeps.simulate.curves import AssumedCurves, RecordedCurves
from sweeps.simulate.replay import Place, ReplayResult, replay
from sweeps.spec import file as spec_file
from sweeps.spec.choices import StoppingRule
from sweeps.spec.model import Spec

SPEC = """\
name: replayed
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: digits}
  epochs: 4
space:
  prompt.rank: {choice: [1, 2, 3, 4]}
search: {algorithm: grid, concurrent: 8}
control: null
"""
WIDE = """\
space:
  head.kind: {choice: [flm, lp]}
  prompt.lr: {log_uniform: [1e-3, 1]}
  head.lr: {log_uniform: [1e-2, 10], when: {head.kind: lp}}
search: {algorithm: tpe, trials: 60, concurrent: 6}
early_stopping: {rule: asha, grace_epochs: 1, reduction_factor: 2}
"""


@pytest.fixture
def make(tmp_path):
    """Reads `SPEC`, with other values put in."""

    def make(*overrides: str, text: str = SPEC) -> Spec:
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return spec_file.load(path, overrides)

    return make


@pytest.fixture
def wide(make):
    return make(text=SPEC[: SPEC.index("space:")] + WIDE)


def place(gpus: int, profile: dict | None = None, **times: float) -> Place:
    return Place(Profile.model_validate({"kind": "local"} | (profile or {})), gpus, **times)


def steady(spec: Spec, seed: int = 0) -> AssumedCurves:
    return AssumedCurves(spec, 10.0, seed)


def record(path: Path, curves: dict[str, tuple], axes: list[str]) -> Path:
    """A results.parquet of trials by name: whether of the control, values on the axes, val_top1 of each epoch, s."""
    rows = [
        {"trial": name, "control": control, "epoch": epoch, "val_top1": value, "seconds": seconds}
        | dict(zip((f"param.{axis}" for axis in axes), point, strict=True))
        for name, (control, point, values, seconds) in curves.items()
        for epoch, value in enumerate(values, start=1)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_two_gpus(make):
    found = replay(make(), steady(make()), place(gpus=2))
    assert found.states == [State.FINISHED] * 4
    assert (found.makespan, found.gpu_seconds, found.training_seconds) == (80, 160, 160)
    assert found.utilisation == 1
    found = replay(make("space.prompt.rank.choice=[1, 2, 3]"), steady(make()), place(gpus=2))
    assert (found.makespan, found.gpu_seconds, found.utilisation) == (80, 120, 0.75)


def test_delay_and_start_up_add(make):
    one_by_one = make("search.concurrent=1")
    found = replay(one_by_one, steady(one_by_one), place(gpus=2, submission_delay=7, start_up=5))
    assert (found.makespan, found.gpu_seconds, found.training_seconds) == (4 * (7 + 5 + 40), 4 * 45, 160)
    at_once = replay(make(), steady(make()), place(gpus=2, submission_delay=7, start_up=5))
    assert at_once.makespan == 7 + 2 * 45  # the other two wait in the queue meanwhile
    assert at_once.utilisation == pytest.approx(160 / (2 * 97))


@pytest.mark.parametrize(
    ("gpus", "profile", "makespan", "gpu_seconds"),
    [
        (8, {}, 45, 4 * 45),
        (8, {"jobs_in_flight": 1}, 4 * 45, 4 * 45),
        (1, {"kind": "slurm", "trials_per_job": 4}, 4 * 45, 4 * 45),  # all four have jobs of their own by then
        (8, {"kind": "slurm", "trials_per_job": 3, "jobs_in_flight": 1}, 5 + 3 * 40 + 45, 5 + 3 * 40 + 45),
        (3, {"kind": "slurm", "gres": "gpu:a100:2"}, 4 * 45, 2 * 4 * 45),
        (4, {"kind": "slurm", "gres": "gpu:a100:2"}, 2 * 45, 2 * 4 * 45),
    ],
)
def test_limits_of_the_cluster(make, gpus, profile, makespan, gpu_seconds):
    found = replay(make(), steady(make()), place(gpus, profile, start_up=5))
    assert (found.makespan, found.gpu_seconds) == (makespan, gpu_seconds)


def test_time_limit_loses_nothing_but_start_up(make):
    spec = make("space.prompt.rank.choice=[1]")
    profile = {"kind": "slurm", "time_limit_minutes": 1}
    found = replay(spec, AssumedCurves(spec, 40.0, 0), place(1, profile, submission_delay=3, start_up=10))
    # four starts of 10 + 50 s, 40, 40 and 40 of them for an epoch or the parts of two; 160 = 50 + 50 + 50 + 10
    assert (found.makespan, found.gpu_seconds) == (4 * 3 + 3 * 60 + 20, 3 * 60 + 20)
    assert (found.states, found.failed_starts, found.training_seconds) == ([State.FINISHED], 0, 160)
    short = replay(spec, steady(spec), place(1, profile | {"requeues": 2}, start_up=60))
    assert (short.states, short.gpu_seconds) == ([State.FAILED], 3 * 60)  # it never gets to a step


def test_failures_cost_time(make):
    without = replay(make(), steady(make()), place(2, start_up=5))
    found = replay(make(), steady(make()), place(2, {"kind": "slurm"}, start_up=5, failure_rate=0.6))
    assert found.states == [State.FINISHED] * 4
    assert found.failed_starts > 0
    assert found.gpu_seconds > without.gpu_seconds + 5 * found.failed_starts
    assert found.training_seconds == without.training_seconds
    assert found.utilisation < without.utilisation
    always = replay(make(), steady(make()), place(2, start_up=5, failure_rate=1))
    assert (always.states, always.failed_starts) == ([State.FAILED] * 4, 4 * 3)
    limited = make("failure_limit={share: 0, trials: 2}")
    given_up = replay(limited, steady(limited), place(2, failure_rate=1))
    assert given_up.states == [State.FAILED]
    assert given_up.given_up == "1 of the first 1 trials failed (failure_limit)"


def test_control_runs_beside_the_first_trials(make):
    spec = make("control={}", "search.concurrent=1")
    found = replay(spec, steady(spec), place(1))
    assert len(found.states) == 5
    assert found.best[0][0] == 10  # the control, fitted at once, has no part in it, and goes second
    assert found.gpu_seconds == 10 + 4 * 40
    together = replay(make("control={}", "search.concurrent=4"), steady(spec), place(2))
    assert together.gpu_seconds == 10 + 4 * 40


def test_equal_configs_are_one_and_points_may_be_invalid(make):
    text = SPEC.replace("{choice: [1, 2, 3, 4]}", "{choice: [1, 2]}\n  method: {choice: [lorvp, linear_probe]}")
    spec = make("search={algorithm: random, trials: 40}", "trial.head.kind=flm", text=text)
    found = replay(spec, steady(spec), place(2))
    assert found.states == [State.FINISHED] * 2
    assert found.gpu_seconds == 2 * 40
    assert found.invalid + found.repeated + 2 == 40
    assert min(found.invalid, found.repeated) > 5


def test_recorded_curves(make, tmp_path):
    axes = ["head.kind", "prompt.lr"]
    curves = {
        "a": (False, ("lp", 0.01), [10.0, 20.0], 1.0),
        "b": (False, ("lp", 0.5), [30.0, 40.0, 50.0, 60.0], 2.0),
        "c": (False, ("flm", 0.01), [5.0] * 9, 3.0),
        "d": (True, ("lp", None), [70.0] * 4, 4.0),
    }
    path = record(tmp_path / "results.parquet", curves, axes)
    text = SPEC.replace(
        "prompt.rank: {choice: [1, 2, 3, 4]}",
        "head.kind: {choice: [flm, lp]}\n  prompt.lr: {log_uniform: [1e-3, 1]}",
    )
    spec = make("search={algorithm: random, trials: 2}", text=text)
    recorded = RecordedCurves(path, spec)

    def curve(head: str, prompt_lr: float, control: bool = False):
        params = {"head.kind": head, "prompt.lr": prompt_lr}
        return recorded.curve(spec.trial_config(params), control)

    assert curve("lp", 0.06).values == [10, 20, 20, 20]  # by the logarithm it is nearer to 0.01 than to 0.5
    assert curve("lp", 0.06).known == 2
    assert curve("lp", 0.08).values == [30, 40, 50, 60]
    assert curve("lp", 0.08).seconds == [2] * 4
    assert curve("flm", 0.9).values == [5] * 4  # another choice is as far as the whole of an axis
    assert curve("lp", 0.9, control=True).values == [70] * 4
    assert RecordedCurves(path, spec, epoch_seconds=9).curve(spec.trial_config({}), False).seconds == [9] * 4
    arguments = [str(tmp_path / "sweep.yaml"), "--gpus", "2", "--curves", str(path)]
    overrides = ["--set", "search={algorithm: grid}", "--set", "space.prompt.lr={choice: [0.01]}"]
    shown = CliRunner().invoke(simulate.app, [*arguments, *overrides]).output
    assert f"the nearest of 4 in {path}" in shown
    assert "short curves:    1 trials" in shown
    assert "2 finished, 0 stopped early, 0 failed" in shown
    assert "makespan:        0:00:12" in shown


def test_asha_stops_what_falls_behind(make, tmp_path):
    """One after the other, of two at a rung one goes on: 60 is below the median of 50, 90 and 80 after an epoch."""
    curves = {str(rank): (False, (rank,), [value] * 4, 10.0) for rank, value in enumerate((50.0, 90.0, 80.0, 60.0), 1)}
    path = record(tmp_path / "results.parquet", curves, ["prompt.rank"])
    spec = make("early_stopping={rule: asha, grace_epochs: 1, reduction_factor: 2}", "search.concurrent=1")
    found = replay(spec, RecordedCurves(path, spec), place(1))
    assert found.states == [State.FINISHED] * 3 + [State.STOPPED]
    assert found.gpu_seconds == (4 + 4 + 4 + 1) * 10
    assert found.best == [(10, 50.0), (50, 90.0)]


def test_decisions_are_those_of_tune(wide, monkeypatch):
    """The results that a replay gave its scheduler, given to another one as Tune's trials."""
    calls = []

    def watched(spec: Spec) -> TrialScheduler:
        scheduler = make_scheduler(spec)
        tell = scheduler.on_trial_result, scheduler.on_trial_complete

        def on_result(controller, trial, result):
            calls.append(("result", trial.trial_id, dict(result), tell[0](controller, trial, result)))
            return calls[-1][-1]

        def on_complete(controller, trial, result):
            calls.append(("complete", trial.trial_id, dict(result), None))
            tell[1](controller, trial, result)

        scheduler.on_trial_result, scheduler.on_trial_complete = on_result, on_complete
        return scheduler

    monkeypatch.setattr("sweeps.simulate.replay.make_scheduler", watched)
    found = replay(wide, steady(wide), place(6))
    tune = make_scheduler(wide)
    trials: dict[str, Trial] = {}
    decisions = []
    for kind, name, result, _ in calls:
        if name not in trials:
            trials[name] = Trial("simulated", stub=True, trial_id=name)
            tune.on_trial_add(None, trials[name])
        if kind == "result":
            decisions.append(tune.on_trial_result(None, trials[name], result))
        else:
            tune.on_trial_complete(None, trials[name], result)
    assert decisions == [decision for kind, *_, decision in calls if kind == "result"]
    assert found.states.count(State.STOPPED) == decisions.count(TrialScheduler.STOP) > 20
    assert len(trials) == 60


def test_median_rule_and_losses(wide):
    spec = wide.model_copy(
        update={
            "early_stopping": wide.early_stopping.model_copy(update={"rule": "median"}),
            "objective": "val_loss",
            "search": wide.search.model_copy(update={"algorithm": "random"}),
        }
    )
    found = replay(spec, steady(spec), place(6))
    assert found.states.count(State.STOPPED) > 5
    assert [value for _, value in found.best] == sorted((value for _, value in found.best), reverse=True)


def test_same_seed_same_replay(wide):
    def run(seed: int) -> ReplayResult:
        return replay(wide, steady(wide, seed), place(4, start_up=3, failure_rate=0.2), seed)

    assert run(1) == run(1) != run(2)


def test_family(wide):
    curves = AssumedCurves(wide, 10.0, seed=0)

    def last(prompt_lr: float) -> float:
        return curves.curve(wide.trial_config({"head.kind": "flm", "prompt.lr": prompt_lr}), False).values[-1]

    middle = last(10**-1.5)
    assert middle - last(10**-0.5) == pytest.approx(10, abs=3 * 0.3 * 2)
    assert middle == pytest.approx(90, abs=4)


def test_work_grows_as_the_trials_do(make, monkeypatch):
    """Calls of functions are counted: on a busy machine times say little. Optuna's own growth is left out."""

    class Points:
        metric = SCORE

        def __init__(self, spec: Spec, spent: object) -> None:
            self.suggested = 0

        def suggest(self, trial_id: str) -> dict:
            self.suggested += 1
            return {"prompt.lr": 0.001 * self.suggested}

        def on_trial_result(self, trial_id: str, result: dict) -> None: ...

        def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None: ...

    monkeypatch.setattr("sweeps.simulate.replay.SpecSearch", Points)
    text = SPEC.replace("prompt.rank: {choice: [1, 2, 3, 4]}", "prompt.lr: {log_uniform: [1e-3, 10]}")

    def work(trials: int) -> int:
        spec = make(f"search={{algorithm: random, trials: {trials}, concurrent: {trials // 2}}}", text=text)
        curves, where = steady(spec), place(trials // 4, start_up=5, submission_delay=1, failure_rate=0.2)
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            replay(spec, curves, where)
        finally:
            sys.setprofile(None)
        return calls

    work(10)  # what is done once
    assert work(400) < 4 * 1.3 * work(100)


def refused(arguments: list[str], monkeypatch, capsys) -> str:
    """The one line that the command says, with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["simulate", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.run(simulate.app)
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1), said
    return said


def test_bad_input(make, tmp_path, monkeypatch, capsys):
    make()
    spec = str(tmp_path / "sweep.yaml")
    other = record(tmp_path / "other.parquet", {"a": (False, (1,), [1.0], 1.0)}, ["optimizer.lr"])
    control = record(tmp_path / "control.parquet", {"a": (True, (1,), [1.0], 1.0)}, ["prompt.rank"])

    def say(*arguments: str) -> str:
        return refused([*arguments], monkeypatch, capsys)

    assert "none.yaml: no such file" in say(str(tmp_path / "none.yaml"), "--gpus", "1")
    assert "--gpus 0: must be at least 1" in say(spec, "--gpus", "0")
    assert "--epoch-seconds 0: must be above 0" in say(spec, "--gpus", "1", "--epoch-seconds", "0")
    assert "none.parquet: no such file; --curves takes" in say(spec, "--gpus=1", "--curves=none.parquet")
    assert "can't be read as Parquet" in say(spec, "--gpus=1", f"--curves={spec}")
    assert "other.parquet: no column param.prompt.rank; it must be" in say(spec, "--gpus=1", f"--curves={other}")
    assert "control.parquet: holds no trial but the control's" in say(spec, "--gpus=1", f"--curves={control}")


def test_output(wide, tmp_path):
    arguments = [str(tmp_path / "sweep.yaml"), "--gpus", "6", "--submission-delay", "30", "--failure-rate", "0.1"]
    result = CliRunner().invoke(simulate.app, [*arguments, "--epoch-seconds", "20", "--set", "search.algorithm=random"])
    assert result.exit_code == 0, result.output
    for words in ("random, early stopping asha, 6 GPUs", "61 with the control", "GPU-hours", "utilisation", "assumed"):
        assert words in result.output
    table = result.output[result.output.index("GPU-seconds  best val_top1 so far") :].splitlines()[1:]
    assert len(table) == 10
    assert sorted(float(row.split()[1]) for row in table) == [float(row.split()[1]) for row in table]


def make_recorded(folder: Path, rule: str) -> Spec:
    """A sweep on the disk, of six trials of eight epochs in the order of their ends from the first epoch on."""
    spec = Spec.model_validate(
        {
            "name": f"recorded_{rule}",
            "trial": digits_values(epochs=8),
            "space": {"prompt.rank": {"choice": [1, 2, 3, 4, 5, 6]}},
            "search": {"algorithm": "grid"},
            "early_stopping": {"rule": rule},
            "control": None,
            "output": folder,
        }
    )
    spec.folder.mkdir(parents=True)
    (spec.folder / RECORD).write_text(json.dumps({"id": "0", "spec": spec.model_dump(mode="json", by_alias=True)}))
    for rank in range(1, 7):
        trial = TrialFolder.request(spec.trials, spec.trial_config({"prompt.rank": rank}))
        attempt = trial.claim()
        for epoch in range(1, 9):
            attempt.append({"epoch": epoch, "val_top1": 10.0 * rank + epoch, "whole": True, "test_top1": None})
        attempt.end(State.FINISHED)
    return spec


def test_which_early_stopping_keeps_the_best(tmp_path):
    folder = make_recorded(tmp_path, "none").folder
    result = CliRunner().invoke(survival.app, [str(folder), "--orders", "20"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "early stopping replayed on 1 sweeps" in lines[0]
    rows = [line.split("  ") for line in lines[2:] if line.strip()]
    assert len(rows) == len(survival.candidates(8))
    assert all("100 %" in "  ".join(row) for row in rows if row[0].strip().startswith("asha"))  # the best leads


def test_stopped_trials_can_not_be_replayed_under_other_rules(tmp_path):
    folder = make_recorded(tmp_path, "asha").folder
    result = CliRunner().invoke(survival.app, [str(folder)])
    assert isinstance(result.exception, UserError)
    assert "early_stopping.rule must be none" in str(result.exception)


def test_the_end_says_how_often_its_early_stopping_keeps_the_best(tmp_path):
    spec = make_recorded(tmp_path, "asha")
    (line,) = stopping_lines(Leaderboard.read(spec))
    assert line.startswith("early stopping: in 200 random orders of these trials it keeps the best one in 100 %")
    assert stopping_lines(Leaderboard.read(make_recorded(tmp_path, "none"))) == []


def test_the_end_of_a_long_sweep_does_not_wait_for_that(tmp_path, monkeypatch):
    spec = make_recorded(tmp_path, "asha")
    monkeypatch.setattr(StoppingRule, "epochs_in_a_second", 19 * 48)  # of 20 orders of six trials of eight epochs
    assert stopping_lines(Leaderboard.read(spec)) == []
