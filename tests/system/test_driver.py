"""Whole sweeps by a driver in this process, with real jobs: what it decides, and what becomes of errors in it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import psutil
import pytest
from ray.tune.experiment import Trial
from support import warm
from typer.testing import CliRunner, Result

from cluster import profile as profiles
from cluster.trial_folder import State, TrialFolder
from sweeps import launch
from sweeps.lock import Holder
from sweeps.run.live_view import Follower
from sweeps.run.signals import SignalHandler
from sweeps.search.controller import GuardedScheduler
from sweeps.search.suggest import SpecSearch, Suggestions
from sweeps.search.tune_trial import SCORE
from sweeps.simulate import replay
from sweeps.simulate.curves import RecordedCurves
from sweeps.spec import file as spec_file
from sweeps.spec.model import Spec
from sweeps.tracking import store
from sweeps.tracking.tracker import Tracker, draft_prefix, make_tables

pytestmark = pytest.mark.slow

SPEC = """\
name: small
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: digits, max_per_class: 10, val_fraction: 0.3}
  prompt: {optimizer: adam}
  optimizer: {lr: 0.5}
  epochs: 2
  batch_size: 32
  precision: fp32
space:
  head.kind: {choice: [rlm, flm, fm]}
  prompt.lr: {log_uniform: [0.005, 0.2]}
search: {algorithm: tpe, trials: 6, seed: 1, concurrent: 2}
early_stopping: {rule: asha, grace_epochs: 1, reduction_factor: 2}
control: null
cluster: profile.yaml
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Iterator[Spec]:
    """A sweep whose trials are trained by one job after the other, so that epochs come in one order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in warm.for_jobs(dict(os.environ)).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "profile.yaml").write_text("kind: local\njobs_in_flight: 1\ntrials_per_job: 9\n")
    (tmp_path / "sweep.yaml").write_text(SPEC)
    before = {signum: signal.getsignal(signum) for signum in SignalHandler.SIGNALS}
    yield spec_file.load(tmp_path / "sweep.yaml", [])
    for signum, handler in before.items():
        signal.signal(signum, handler)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(launch.app, ["sweep.yaml", *arguments])


def whole(result: Result) -> str:
    """What it printed, in one line however wide the terminal was."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return " ".join(result.output.split())


class Decisions:
    """What Tune's searcher and scheduler are asked and decide, in that order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple] = []
        suggest, decide = SpecSearch.suggest, GuardedScheduler.on_trial_result
        end = GuardedScheduler.on_trial_complete

        def watched_suggest(search: SpecSearch, trial_id: str) -> dict | str | None:
            point = suggest(search, trial_id)
            self.made.append(("suggest", trial_id, point))
            return point

        def watched_decide(scheduler: GuardedScheduler, controller: object, trial: Trial, result: dict) -> str:
            decision = decide(scheduler, controller, trial, result)
            self.made.append(("epoch", trial.trial_id, result["epoch"], result[SCORE], decision))
            return decision

        def watched_end(scheduler: GuardedScheduler, controller: object, trial: Trial, result: dict) -> None:
            self.made.append(("end", trial.trial_id, result["epoch"], result[SCORE]))
            end(scheduler, controller, trial, result)

        monkeypatch.setattr(SpecSearch, "suggest", watched_suggest)
        monkeypatch.setattr(GuardedScheduler, "on_trial_result", watched_decide)
        monkeypatch.setattr(GuardedScheduler, "on_trial_complete", watched_end)


def test_a_sweep_and_its_replay_decide_the_same(sweep):
    """The replay goes by the curves that the sweep recorded: suggestions, what is stopped and when, and the order.

    A trial that is stopped may have recorded its last epoch by then, where epochs are quicker than looks; that is not
    the search's decision.
    """
    with pytest.MonkeyPatch.context() as patch:
        real = Decisions(patch)
        result = run()
    assert result.exit_code == 0, result.output
    curves = RecordedCurves(sweep.folder / "results.parquet", sweep)
    with pytest.MonkeyPatch.context() as patch:
        virtual = Decisions(patch)
        replay.replay(sweep, curves, replay.Place(profiles.load(sweep.cluster), gpus=1))
    assert virtual.made == real.made
    assert [made[2] for made in real.made if made[0] == "suggest"] == Suggestions(sweep.folder).read()
    assert [made for made in real.made if made[-1] == "STOP"]


def fail_at(monkeypatch: pytest.MonkeyPatch, suggestion: int) -> None:
    """The disk is full when this suggestion is written down."""
    append, count = Suggestions.append, iter(range(1, 100))

    def full(self: Suggestions, params: dict) -> None:
        if next(count) >= suggestion:
            raise OSError(28, "No space left on device", str(self.path))
        append(self, params)

    monkeypatch.setattr(Suggestions, "append", full)


def test_a_full_disk_under_the_search_interrupts_no_job(sweep):
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, 4)
        result = run()
    said = whole(result)
    assert result.exit_code == 1
    assert "the search failed: OSError: [Errno 28] No space left on device:" in said
    assert "the search failed after 3 of 6 trials: OSError: [Errno 28]" in said
    assert "mend that, and --resume goes on with it" in said
    trials = TrialFolder.requested(sweep.trials)
    assert len(trials) == 3
    assert all(trial.ended().state in (State.FINISHED, State.STOPPED) for trial in trials)
    assert all(trial.newest().path.name == "0001" for trial in trials)
    before = {trial.name: trial.results() for trial in trials}
    resumed = run("--resume")
    assert resumed.exit_code == 0, resumed.output
    assert len(Suggestions(sweep.folder).read()) == 6
    for name, results in before.items():
        assert TrialFolder(sweep.trials / name).results() == results


def test_a_search_that_fails_after_its_last_suggestion_is_concluded(sweep, monkeypatch):
    complete = SpecSearch.on_trial_complete

    def fail(self: SpecSearch, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if trial_id == "5":
            raise ZeroDivisionError("in a sampler")
        complete(self, trial_id, result, error)

    monkeypatch.setattr(SpecSearch, "on_trial_complete", fail)
    result = run()
    said = whole(result)
    assert result.exit_code == 0, result.output
    assert "the search failed: ZeroDivisionError: in a sampler; the jobs that run go on" in said
    assert "best prompt:" in said


def test_an_error_of_the_drivers_own_is_one_line_and_the_jobs_go_on(sweep, monkeypatch):
    def broken(self: Follower) -> None:
        raise KeyError("no such column")

    with monkeypatch.context() as patch:
        patch.setattr(Follower, "check", broken)
        result = run()
    said = whole(result)
    assert result.exit_code == 1
    assert "KeyError: 'no such column'; the jobs go on, and so does --resume;" in said
    assert "Traceback" not in said
    assert "no such column" in (sweep.folder / "driver-error.txt").read_text()
    resumed = run("--resume")
    assert resumed.exit_code == 0, resumed.output


def test_a_store_that_can_not_be_opened_is_refused_before_anything_is_written(sweep, tmp_path):
    for uri, reason in (
        ("sqlite:////dev/null/mlflow.db", "File exists: '/dev/null'"),
        ("sqlite:///sweep.yaml", "not a database"),
    ):
        result = run("--set", f"tracking.uri={uri}")
        assert result.exit_code == 2, result.output
        assert reason in whole(result)
        assert not (tmp_path / "runs" / "small").exists()


def test_a_store_that_fails_while_the_sweep_runs_is_tried_again(sweep, monkeypatch):
    create, failures = Tracker.__init__, iter([True, True, False])

    def fail(self: Tracker, *arguments: object) -> None:
        if next(failures, False):
            raise OSError("database is locked")
        create(self, *arguments)

    monkeypatch.setattr(Tracker, "__init__", fail)
    result = run("--set", "search.trials=2")
    assert result.exit_code == 0, result.output
    assert whole(result).count("trying again: database is locked") == 1
    client = mlflow.MlflowClient(store.tracking_uri(sweep))
    runs = client.search_runs([client.get_experiment_by_name("lorvp").experiment_id])
    assert len(runs) == 2 + 1


def test_a_driver_killed_while_tables_are_made_leaves_no_part_of_them(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    class Killed(BaseException):
        pass

    def killed(source: Path, target: Path) -> None:
        assert source.exists()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("os.link", killed)
        with pytest.raises(Killed):
            make_tables(uri)
    assert not (tmp_path / "mlflow.db").exists()
    make_tables(uri)
    assert store.is_sure_to_open(uri, "lorvp")
    made = (tmp_path / "mlflow.db").stat().st_ino
    make_tables(uri)
    assert (tmp_path / "mlflow.db").stat().st_ino == made
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_drafts_of_tables_that_dead_drivers_have_left_are_removed(tmp_path):
    path = tmp_path / "mlflow.db"
    dead = subprocess.Popen(["true"])
    began = psutil.Process(dead.pid).create_time()
    dead.wait()
    here = Holder.this_process()
    reused = replace(here, started=here.started - 1000)  # another has its number by now
    elsewhere = replace(here, host="node7.site.org")
    makers = {"killed": replace(here, process=dead.pid, started=began), "reused": reused, "mine": here}
    makers |= {"long ago": elsewhere, "elsewhere": elsewhere}
    for name, maker in makers.items():
        (tmp_path / f"{draft_prefix(path, maker)}{name}" / "part").mkdir(parents=True)
    (tmp_path / ".mlflow.db.of_an_earlier_version").mkdir()
    for name in (".mlflow.db.of_an_earlier_version", f"{draft_prefix(path, elsewhere)}long ago"):
        os.utime(tmp_path / name, (1, 1))
    path.touch()
    make_tables(f"sqlite:///{path}")
    left = sorted(each.name.rpartition(".")[2] for each in tmp_path.iterdir())
    assert left == ["db", "elsewhere", "mine"]


def test_what_a_sqlite_file_shows(tmp_path):
    path = tmp_path / "mlflow.db"
    assert store.is_sure_to_open(f"sqlite:///{path}", "lorvp")
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    assert store.is_sure_to_open(f"sqlite:///{path}", "lorvp")
    with sqlite3.connect(path) as database:
        database.execute("update alembic_version set version_num = 'older'")
    assert not store.is_sure_to_open(f"sqlite:///{path}", "lorvp")
    assert not store.is_sure_to_open("http://127.0.0.1:1", "lorvp")
    assert not store.is_sure_to_open(f"sqlite:///{tmp_path / 'none' / 'mlflow.db'}", "lorvp")


def test_packages_are_named_as_pip_names_them():
    from importlib.metadata import version

    from sweeps.tracking.tracker import installed_packages

    packages = installed_packages()
    for name in ("torch", "optuna", "mlflow"):
        assert f"{name}=={version(name)}" in packages
    assert not [line for line in packages if Path(line).suffix == ".dist-info"]
