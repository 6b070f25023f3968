"""Tune's controller in this process: what it decides, what it does on errors, and the inner names that it stands on."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from textwrap import dedent

import optuna
import pytest
import ray
from conftest import digits_values
from ray.air.execution._internal import RayActorManager, TrackedActor
from ray.tune import Callback
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import SearchAlgorithm, Searcher

from cluster.trial_folder import End, State
from lorvp.config import TrialConfig
from sweeps.search import controller
from sweeps.search.controller import (
    Actors,
    Failure,
    GiveUp,
    GuardedScheduler,
    OncePerConfig,
    SweepController,
    SweepSearch,
    SweepTrial,
)
from sweeps.search.stopping import make_scheduler
from sweeps.search.suggest import SpecSearch
from sweeps.search.tune_trial import SCORE
from sweeps.spec.model import Spec

optuna.logging.set_verbosity(optuna.logging.WARNING)
SEEN = "2.60"
"""The version of ray whose inner names these tests have seen."""


def spec(tmp_path: Path, **more: object) -> Spec:
    values = {
        "name": "searched",
        "trial": digits_values(epochs=3),
        "space": {"prompt.rank": {"choice": [1, 2, 3, 4, 5, 6]}},
        "search": {"algorithm": "grid", "concurrent": 2},
        "output": tmp_path,
    }
    return Spec.model_validate(values | more)


class Told:
    """A trial that records what a test says."""

    def __init__(self, config: TrialConfig) -> None:
        self.config, self.name = config, config.content_hash()
        self.recorded: list[dict] = []
        self.end: End | None = None

    @property
    def rank(self) -> int:
        return self.config.prompt.rank

    def results(self) -> list[dict]:
        return self.recorded

    def ended(self) -> End | None:
        return self.end


class Script:
    """The place where trials are trained: each round records the next of `epochs`, (rank, val_top1, time) each."""

    def __init__(self, epochs: list[list[tuple[int, float, float]]]) -> None:
        self.rounds = iter(epochs)
        self.asked: list[int] = []
        self.given_up: list[tuple[int, int]] = []
        self.trials: dict[int, Told] = {}

    def request(self, config: TrialConfig) -> Told:
        trial = self.trials.setdefault(config.prompt.rank, Told(config))
        self.asked.append(trial.rank)
        return trial

    def give_up(self, trial: Told) -> None:
        self.given_up.append((trial.rank, len(trial.recorded)))
        trial.end = End(State.STOPPED)

    def wait(self) -> list[str]:
        told = []
        for rank, value, time in next(self.rounds):
            trial = self.trials[rank]
            if value < 0:
                trial.end = End(State.FAILED, "train loss is nan in epoch 1")
            else:
                epoch = len(trial.recorded) + 1
                trial.recorded.append({"epoch": epoch, "val_top1": value, "time": time, "whole": True, "seconds": 1.0})
            told.append(trial.name)
        return told


def whole(*ranks: int) -> list[list[tuple[int, float, float]]]:
    """Rounds in which trials of these ranks train to their end, one after the other."""
    return [[(rank, 50.0, float(epoch))] for rank in ranks for epoch in range(3)]


class Heard(SpecSearch):
    """Notes what it is told."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.heard: list[tuple] = []

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        self.heard.append((trial_id, result["epoch"], result[SCORE]))
        super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self.heard.append((trial_id, "failed" if error else result["epoch"], result and result[SCORE]))
        super().on_trial_complete(trial_id, result, error)


class Says(SpecSearch):
    """Suggests these ranks, and notes at which epoch each of Tune's trials ended."""

    def __init__(self, spec: Spec, ranks: list[int]) -> None:
        super().__init__(spec, [{"prompt.rank": rank} for rank in ranks])
        self.ended: list[tuple[str, int | str]] = []

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self.ended.append((trial_id, "failed" if error else result["epoch"]))
        super().on_trial_complete(trial_id, result, error)


ASHA = {"rule": "asha", "grace_epochs": 1, "reduction_factor": 2}


def test_so_many_at_a_time_and_each_epoch_is_told(tmp_path):
    grid, script, failure = spec(tmp_path), Script(whole(1, 2, 3, 4, 5, 6)), Failure()
    search = Heard(grid)
    SweepController(grid, search, make_scheduler(grid), script, failure).run()
    assert script.asked == [1, 2, 3, 4, 5, 6]
    assert search.heard[:4] == [("0", 1, 50.0), ("0", 2, 50.0), ("0", 3, 50.0), ("1", 1, 50.0)]
    assert len(search.heard) == 18
    assert (failure.error, script.given_up) == (None, [])
    assert not ray.is_initialized()


def test_epochs_of_one_look_are_told_in_the_order_of_their_times(tmp_path):
    """As after a resume, when all is there at once: the search then goes the way that it went."""
    grid = spec(tmp_path)
    script = Script([[(1, 10.0, 1.0), (1, 11.0, 4.0), (1, 12.0, 6.0), (2, 20.0, 2.0), (2, 21.0, 3.0), (2, 22.0, 5.0)]])
    search = Heard(grid)
    with pytest.raises(StopIteration):
        SweepController(grid, search, make_scheduler(grid), script, Failure()).run()
    assert search.heard == [("0", 1, 10), ("1", 1, 20), ("1", 2, 21), ("0", 2, 11), ("1", 3, 22), ("0", 3, 12)]


def test_what_falls_behind_is_given_up(tmp_path):
    asha = spec(tmp_path, early_stopping=ASHA)
    script = Script([[(1, 90.0, 1.0)], [(2, 10.0, 2.0)], *whole(1, 3, 4, 5, 6)])
    SweepController(asha, SpecSearch(asha), make_scheduler(asha), script, Failure()).run()
    assert script.given_up == [(2, 1), (3, 2), (4, 2)]  # at the first rung, and at the second, of two epochs
    assert script.asked == [1, 2, 3, 4, 5, 6]


def test_a_trial_that_fails_is_told_as_failed(tmp_path):
    grid, script = spec(tmp_path), Script([[(1, -1.0, 0.0)], *whole(2, 3, 4, 5, 6)])
    search = Heard(grid)
    SweepController(grid, search, make_scheduler(grid), script, Failure()).run()
    assert search.heard[0] == ("0", "failed", None)
    assert script.asked == [1, 2, 3, 4, 5, 6]


def test_the_same_config_again_is_the_same_trial(tmp_path):
    random = spec(tmp_path, space={"prompt.rank": {"choice": [1, 2]}}, search={"algorithm": "random", "trials": 8})
    script = Script(whole(1, 2, 1, 2))
    SweepController(random, SpecSearch(random), make_scheduler(random), script, Failure()).run()
    assert len(script.asked) == 8
    assert len(script.trials) == 2
    assert all(len(trial.recorded) == 3 for trial in script.trials.values())


def test_a_repeated_suggestion_does_not_end_the_trial_that_it_repeats(tmp_path):
    """Rank 1 is suggested again when rank 2 has passed it at the rung: what was decided of it then holds."""
    asha = spec(tmp_path, search={"algorithm": "random", "trials": 4, "concurrent": 3}, early_stopping=ASHA)
    script = Script([[(1, 50.0, 1.0)], [(2, 90.0, 2.0)], [(3, -1.0, 3.0)], [(1, 95.0, 4.0)], [(1, 96.0, 5.0)]])
    search = Says(asha, [1, 2, 3, 1])
    with pytest.raises(StopIteration):  # rank 2 would go on
        SweepController(asha, search, make_scheduler(asha), script, Failure()).run()
    assert search.ended == [("2", "failed"), ("0", 3), ("3", 3)]
    assert script.given_up == []


@pytest.mark.parametrize("ranks", [[1, 2, 3], [1, 2, 2, 2, 3]])
def test_a_config_counts_once_at_a_rung_however_often_it_is_suggested(tmp_path, ranks):
    """Rank 3 is better than the mean of the two others, and worse than the best of them, which is not three."""
    trials = {"algorithm": "random", "trials": len(ranks), "concurrent": len(ranks)}
    asha = spec(tmp_path, search=trials, early_stopping=ASHA)
    script = Script([[(1, 10.0, 1.0)], [(2, 80.0, 2.0)], [(3, 50.0, 3.0)]])
    made = SweepController(asha, Says(asha, ranks), make_scheduler(asha), script, Failure())
    with pytest.raises(StopIteration):  # all would go on
        made.run()
    assert script.given_up == []


def test_a_trial_ends_with_the_last_of_its_repetitions(tmp_path):
    """Both of rank 1 are stopped at the first rung, the second one after it was told of the first one's epoch."""
    asha = spec(tmp_path, search={"algorithm": "random", "trials": 3, "concurrent": 3}, early_stopping=ASHA)
    script = Script([[(2, 90.0, 1.0)], [(1, 10.0, 2.0)], [(2, 91.0, 3.0)], [(2, 92.0, 4.0)]])
    SweepController(asha, Says(asha, [2, 1, 1]), make_scheduler(asha), script, Failure()).run()
    assert script.given_up == [(1, 1)]


def test_a_point_without_a_trial_is_told_and_the_search_goes_on(tmp_path):
    space = {"prompt.rank": {"choice": [1, 2]}, "head.kind": {"choice": ["lp", "flm"]}}
    mixed = spec(tmp_path, space=space, trial=digits_values(head={"init": "fitted"}))
    script, lines = Script([[(rank, 1.0, 1.0)] * 3 for rank in (1, 2)]), []
    SweepController(mixed, SpecSearch(mixed), make_scheduler(mixed), script, Failure(), lines.append).run()
    invalid = len(mixed.cells()) - len(script.asked)
    assert len(lines) == invalid
    assert all(line.startswith("no trial is possible at {") for line in lines)


class Breaks(SpecSearch):
    """Fails at one of its calls, and counts those after that."""

    def __init__(self, spec: Spec, at: str) -> None:
        super().__init__(spec)
        self.at, self.calls_since, self.broken = at, 0, False

    def _break(self, at: str) -> None:
        self.calls_since += self.broken
        if at == self.at and len(self._arm_of_trial) == 2:
            self.broken = True
            raise OSError(28, "No space left on device", "suggestions.jsonl")

    def suggest(self, trial_id: str) -> dict | str | None:
        self._break("suggest")
        return super().suggest(trial_id)

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        self._break("result")
        super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self._break("complete")
        super().on_trial_complete(trial_id, result, error)


@pytest.mark.parametrize("at", ["suggest", "result", "complete"])
def test_an_error_of_the_searcher_lets_what_runs_go_on(tmp_path, at):
    concurrent = 3 if at == "suggest" else 2
    grid = spec(tmp_path, search={"algorithm": "grid", "concurrent": concurrent})
    script, told = Script(whole(1, 2)), []
    failure, search = Failure(told.append), Breaks(grid, at)
    SweepController(grid, search, make_scheduler(grid), script, failure).run()
    assert script.asked == [1, 2]
    assert [len(trial.recorded) for trial in script.trials.values()] == [3, 3]
    assert (script.given_up, told, search.calls_since) == ([], [failure.error], 0)
    assert failure.error.errno == 28


@pytest.mark.parametrize("name", ["on_trial_add", "on_trial_result", "on_trial_complete"])
def test_an_error_of_the_scheduler_stops_nothing(tmp_path, name, monkeypatch):
    grid, script, failure = spec(tmp_path), Script(whole(1, 2)), Failure()
    scheduler = make_scheduler(grid)

    def broken(*_: object) -> None:
        raise ZeroDivisionError("median of nothing")

    monkeypatch.setattr(scheduler, name, broken)
    SweepController(grid, SpecSearch(grid), scheduler, script, failure).run()
    assert str(failure.error) == "median of nothing"
    assert script.given_up == []
    assert all(len(trial.recorded) == 3 for trial in script.trials.values())


def test_a_trial_that_can_not_be_asked_for_ends_the_search(tmp_path):
    """A full disk under its folder: the suggestion is written down and made again on a resume."""
    grid, failure = spec(tmp_path), Failure()

    class Full(Script):
        def request(self, config: TrialConfig) -> Told:
            if len(self.asked) == 2:
                raise OSError(28, "No space left on device")
            return super().request(config)

    script = Full(whole(1, 2))
    SweepController(grid, SpecSearch(grid), make_scheduler(grid), script, failure).run()
    assert script.asked == [1, 2]
    assert failure.error.errno == 28
    assert [len(trial.recorded) for trial in script.trials.values()] == [3, 3]


def test_what_the_users_environment_says_of_tune_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE_RESULT_BUFFER_LENGTH", "5")
    monkeypatch.setenv("TUNE_MAX_PENDING_TRIALS_PG", "50")
    grid, script = spec(tmp_path), Script(whole(1, 2, 3, 4, 5, 6))
    SweepController(grid, SpecSearch(grid), make_scheduler(grid), script, Failure()).run()
    assert script.asked == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="no actor can save"):
        Actors(script).schedule_actor_task(None, "save")


def test_ended_trials_are_forgotten(tmp_path):
    """Tune keeps 17 KiB of each, and goes through all of them in places."""
    grid, script = spec(tmp_path), Script(whole(1, 2, 3, 4, 5, 6))
    search = SpecSearch(grid)
    made = SweepController(grid, search, make_scheduler(grid), script, Failure())
    made.run()
    assert made.get_trials() == []
    for name in ("_live_trials", "_stopped_trials", "_failed_trials", "_trials_to_cache", "_trial_to_actor"):
        assert not getattr(made, name), name
    share = search._arms[None]
    assert (share._ot_trials, share._completed_trials) == ({}, set())
    told = share._ot_study.get_trials(deepcopy=False)
    assert [(trial.value, trial.intermediate_values) for trial in told] == 6 * [(50.0, {})]
    assert made._actor_manager.num_live_actors == 0


ALONE = """\
    import os, sys
    sys.path[:0] = {tests!r}
    import psutil
    from pathlib import Path
    from test_controller import *
    grid = spec(Path("out"), early_stopping={{"rule": "median", "grace_epochs": 1}})
    SweepController(grid, SpecSearch(grid), make_scheduler(grid), Script(whole(1, 2, 3, 4, 5, 6)), Failure()).run()
    me = psutil.Process()
    connections = [c for c in me.net_connections(kind="all")]
    print(json.dumps([len(me.children()), len(connections), ray.is_initialized()]))
"""


def test_no_process_port_socket_token_or_file_of_rays(tmp_path):
    """In a temporary folder with a path of over 107 characters, longer than a socket's may be."""
    temporary = tmp_path / ("t" * 108)
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (temporary, home, here):
        folder.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary), "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    code = dedent(ALONE).format(tests=[str(Path(__file__).parents[depth]) for depth in (3, 0, 2)])
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 0, False]
    assert [path for folder in (temporary, home, here) for path in folder.rglob("*") if path.is_file()] == []


# -- the names: a version of ray that changes one of them fails the test of that name

SOURCE = inspect.getsource(TuneController)
ASKED_OF_ACTORS = sorted(set(re.findall(r"self\._actor_manager\.(\w+)", SOURCE)))
NEVER_REACHED = {
    "_actor_task_events": "trials have no export_formats",
    "add_actor": "_schedule_trial_actor is ours",
    "cleanup": "a search that is through has no actor left",
    "get_live_actors_resources": "nothing shows resources",
    "num_total_actors": "of cleanup",
}


@pytest.mark.parametrize("name", ASKED_OF_ACTORS)
def test_what_tune_asks_of_its_actor_manager(name, tmp_path):
    if name in NEVER_REACHED:
        return
    theirs, ours = getattr(RayActorManager, name, None), getattr(Actors, name, None)
    if theirs is None:  # an attribute
        assert hasattr(Actors(Script([])), name)
    elif isinstance(theirs, property):
        assert isinstance(ours, property)
    else:
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_what_tune_never_asks_here_is_still_asked_where_it_was():
    assert set(ASKED_OF_ACTORS) >= set(NEVER_REACHED)


OVERRIDDEN = [
    (SweepController, TuneController, ["step", "is_finished", "on_step_begin", "on_step_end", "checkpoint"]),
    (SweepController, TuneController, ["_schedule_trial_actor"]),
    (SweepTrial, Trial, ["create_placement_group_factory", "set_ray_actor", "update_last_result", "local_path"]),
    (SweepSearch, SearchAlgorithm, ["next_trial", "is_finished", "on_trial_result", "on_trial_complete"]),
    (GuardedScheduler, FIFOScheduler, ["choose_trial_to_run", "on_trial_add", "on_trial_error", "on_trial_remove"]),
    (GuardedScheduler, FIFOScheduler, ["on_trial_result", "on_trial_complete"]),
    (OncePerConfig, FIFOScheduler, ["on_trial_add", "on_trial_error", "on_trial_remove"]),
    (OncePerConfig, FIFOScheduler, ["on_trial_result", "on_trial_complete"]),
    (GiveUp, Callback, ["on_trial_complete"]),
    (SpecSearch, Searcher, ["suggest", "on_trial_result", "on_trial_complete", "save"]),
]


@pytest.mark.parametrize(("ours", "theirs", "name"), [(a, b, name) for a, b, names in OVERRIDDEN for name in names])
def test_what_takes_the_place_of_tunes_own(ours, theirs, name):
    own, original = getattr(ours, name), getattr(theirs, name)
    if isinstance(original, property):
        assert isinstance(own, property)
        return
    assert list(inspect.signature(own).parameters) == list(inspect.signature(original).parameters)


@pytest.mark.parametrize("name", ["_actor_started", "_actor_stopped", "_actor_failed"])
def test_what_an_actors_life_calls(name):
    more = {"_actor_started": ["log"], "_actor_stopped": [], "_actor_failed": ["exception"]}[name]
    assert list(inspect.signature(getattr(TuneController, name)).parameters) == ["self", "tracked_actor", *more]


STATE = ["_trial_to_actor", "_actor_to_trial", "_trials", "_live_trials", "_stopped_trials", "_failed_trials"]
SET = ["_buffer_length", "_max_pending_trials", "_actor_manager"]


@pytest.mark.parametrize("name", [*STATE, "_trials_to_cache", *SET])
def test_what_is_read_of_the_controllers_state(name, tmp_path):
    assert re.search(rf"self\.{name}\b[^=\n]* = |self\.{name} = ", SOURCE)
    grid = spec(tmp_path)
    assert hasattr(SweepController(grid, SpecSearch(grid), make_scheduler(grid), Script([]), Failure()), name)


def test_what_is_taken_of_other_classes(tmp_path):
    actor = TrackedActor(1, on_start=None, on_stop=print, on_error=None)
    assert actor._on_stop is print
    trial = SweepTrial("0", {"prompt.rank": 1})
    assert trial.run_metadata.last_result == {}
    assert trial.temporary_state.ray_actor is None
    trial.update_last_result({"epoch": 1})
    assert trial.last_result == {"epoch": 1, "trial_id": "0"}
    share = SpecSearch(spec(tmp_path))._arms[None]
    assert hasattr(share, "_ot_trials")
    assert hasattr(share, "_completed_trials")


def test_the_methods_that_tune_calls_by_name_are_two():
    assert set(re.findall(r'method_name="(\w+)"', SOURCE)) == {"export_model", "reset", "save"}
    assert set(re.findall(r'method_name = "(\w+)"', SOURCE)) == {"restore", "train", "train_buffered"}
    assert '"stop", _return_future=True' in SOURCE


def test_pyproject_allows_only_what_was_seen_here():
    project = tomllib.loads((Path(controller.__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (bounds,) = [each for each in project["dependencies"] if each.startswith("ray")]
    major, minor = SEEN.split(".")
    assert bounds == f"ray[tune]>={SEEN},<{major}.{int(minor) + 1}"
    assert ray.__version__.startswith(f"{SEEN}.")
