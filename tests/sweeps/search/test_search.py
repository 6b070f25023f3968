"""Equal shares of a search, asked as Tune would ask, without it."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import optuna
import pytest
from conftest import digits_values
from ray.tune.search import Searcher

from cluster.profile import Profile
from cluster.trial_folder import State, TrialFolder
from lorvp.config import TrialConfig
from sweeps.search.stopping import make_scheduler
from sweeps.search.suggest import ArmSeconds, RecordingSearch, SpecSearch, Suggestions
from sweeps.search.tune_trial import SCORE
from sweeps.simulate.curves import Curve
from sweeps.simulate.replay import Place, replay
from sweeps.spec.model import Spec

optuna.logging.set_verbosity(optuna.logging.WARNING)
GOOD_LR = {"lorvp": 0.01, "linear_probe": 1.0}


@pytest.fixture
def make(tmp_path):
    def make(trials: int = 8, algorithm: str = "tpe", seed: int = 0, **more: object) -> Spec:
        search = {"algorithm": algorithm, "trials": trials, "seed": seed, "equal": "method", "concurrent": 1}
        return Spec.model_validate(
            {
                "name": "shared",
                "trial": digits_values(),
                "space": {
                    "method": {"choice": ["lorvp", "linear_probe"]},
                    "head.lr": {"log_uniform": [1e-3, 10]},
                    "prompt.optimizer": {"choice": ["adam", "sgd"], "when": {"method": "lorvp"}},
                    "prompt.momentum": {"uniform": [0.5, 0.99], "when": {"prompt.optimizer": "sgd"}},
                },
                "search": search | more.pop("search", {}),
                "output": tmp_path,
            }
            | more
        )

    return make


def value_of(point: dict) -> float:
    """A weak method and a strong one, each with a learning rate of its own that is good."""
    strength = {"lorvp": 50, "linear_probe": 90}[point["method"]]
    ratio = point["head.lr"] / GOOD_LR[point["method"]]
    return strength - 10 * abs(max(ratio, 1 / ratio) - 1) ** 0.5


def run(search: Searcher, count: int) -> list[dict]:
    points = []
    for n in range(count):
        points.append(search.suggest(str(n)))
        search.on_trial_complete(str(n), {SCORE: value_of(points[-1])})
    return points


@pytest.mark.parametrize("algorithm", ["random", "tpe", "gp"])
def test_values_take_turns(make, algorithm):
    spec = make(9, algorithm)
    points = run(SpecSearch(spec), 9)
    assert [point["method"] for point in points] == ["lorvp", "linear_probe"] * 4 + ["lorvp"]
    assert points == run(SpecSearch(spec), 9) != run(SpecSearch(make(9, algorithm, seed=1)), 9)
    for point in points:
        assert ("prompt.optimizer" in point) == (point["method"] == "lorvp")
        assert ("prompt.momentum" in point) == (point.get("prompt.optimizer") == "sgd")
        assert spec.arm(spec.trial_config(point)) == point["method"]
    assert [share.number_of_trials() for share in spec.arms().values()] == [5, 4]


def test_each_value_is_searched_by_itself(make):
    """The weaker one's good learning rate is found, though all of its trials are worse than any of the other."""
    points = run(SpecSearch(make(80)), 80)[40:]
    for method, good in GOOD_LR.items():
        rates = [point["head.lr"] for point in points if point["method"] == method]
        near = [rate for rate in rates if good / 4 < rate < good * 4]
        assert len(near) >= len(rates) / 2 == 10  # of the whole axis they are 30 %; one search for both finds none


def test_shares_of_a_resumed_search(make):
    spec = make(12)
    spec.folder.mkdir()
    whole = run(SpecSearch(spec), 12)
    first = run(RecordingSearch(spec, Suggestions(spec.folder), dict), 5)
    assert first == whole[:5]
    assert [json.loads(line) for line in (spec.folder / "suggestions.jsonl").read_text().splitlines()] == first
    again = run(RecordingSearch(spec, Suggestions(spec.folder), dict), 12)
    assert again[:5] == first
    assert [point["method"] for point in again] == [point["method"] for point in whole]
    assert len({(point["method"], point["head.lr"]) for point in again}) == 12


def record(spec: Spec, point: dict, seconds: list[float]) -> TrialFolder:
    trial = TrialFolder.request(spec.trials, spec.trial_config(point))
    attempt = trial.claim()
    for epoch, each in enumerate(seconds, start=1):
        attempt.append({"epoch": epoch, "seconds": each})
    return trial


def test_a_share_that_had_its_seconds_is_passed_over(make):
    spec = make(20, search={"seconds": 10}, confirm={})
    spec.folder.mkdir()
    spent = ArmSeconds(spec)
    search = RecordingSearch(spec, Suggestions(spec.folder), spent)
    suggested = []
    while (point := search.suggest(str(len(suggested)))) != Searcher.FINISHED:
        suggested.append(point)
        spent.note(record(spec, point, [1, 1] if point["method"] == "lorvp" else [2, 4]))
    assert Counter(point["method"] for point in suggested) == {"lorvp": 5, "linear_probe": 2}
    assert [point["method"] for point in suggested[:4]] == ["lorvp", "linear_probe"] * 2
    assert spent() == {"lorvp": 10, "linear_probe": 12}
    more = record(spec, {"method": "lorvp", "head.kind": "fm"}, [5])
    for _ in range(2):  # what was counted before is not counted again
        spent.note(more)
    more.newest().append({"epoch": 2, "seconds": 3})
    more.newest().end(State.FINISHED)
    spent.note(more)
    assert spent()["lorvp"] == 18
    for config in [spec.control_configs()[0], spec.confirmed(spec.trial_config(suggested[0]), 1)]:
        trial = TrialFolder.request(spec.trials, config)
        trial.claim().append({"epoch": 1, "seconds": 100})
        spent.note(trial)
    assert spent()["lorvp"] == 18  # neither the control nor what confirms is searched
    assert len(Suggestions(spec.folder).read()) == 7
    resumed = RecordingSearch(spec, Suggestions(spec.folder), spent)
    assert [resumed.suggest(str(n)) for n in range(8)] == [*suggested, Searcher.FINISHED]


def test_a_torn_suggestion_is_left_out_and_written_over(make):
    spec = make()
    spec.folder.mkdir()
    suggestions = Suggestions(spec.folder)
    suggestions.append({"method": "lorvp"})
    with open(suggestions.path, "a") as file:
        file.write('{"method": "line')
    assert suggestions.read() == [{"method": "lorvp"}]
    suggestions.append({"method": "linear_probe"})
    assert suggestions.read() == [{"method": "lorvp"}, {"method": "linear_probe"}]


class _Trial:
    """What a scheduler sees of Tune's."""

    def __init__(self, name: str, method: str) -> None:
        self.trial_id, self.config = name, {"method": method}


def test_early_stopping_compares_within_a_share(make):
    spec = make(early_stopping={"rule": "asha", "grace_epochs": 1, "reduction_factor": 2})
    scheduler = make_scheduler(spec)

    def decision(name: str, method: str, score: float) -> str:
        trial = _Trial(name, method)
        scheduler.on_trial_add(None, trial)
        return scheduler.on_trial_result(None, trial, {"epoch": 1, "training_iteration": 1, SCORE: score})

    strong = [decision(f"s{n}", "linear_probe", score) for n, score in enumerate([90, 89, 95])]
    weak = [decision(f"w{n}", "lorvp", score) for n, score in enumerate([50, 49, 55])]
    assert strong == weak == ["CONTINUE", "STOP", "CONTINUE"]


def test_a_trial_is_never_paused(make):
    """Nothing of it could be restored from Tune's own state."""
    spec = make(search={"equal": None}, early_stopping={"rule": "median", "grace_epochs": 1})
    scheduler, trial = make_scheduler(spec), _Trial("a", "lorvp")
    controller = SimpleNamespace(get_live_trials=lambda: [SimpleNamespace(status="PENDING")])
    scheduler.on_trial_add(controller, trial)
    assert scheduler.on_trial_result(controller, trial, {"epoch": 1, SCORE: 1.0}) == "CONTINUE"


class _Flat:
    """Every epoch takes a second; linear_probe's take ten."""

    def curve(self, config: TrialConfig, control: bool) -> Curve:
        seconds = 10.0 if config.method == "linear_probe" else 1.0
        return Curve([config.head.lr] * config.epochs, [seconds] * config.epochs, config.epochs)


def test_replay_of_shares_and_confirmation(make):
    place = Place(Profile.model_validate({"kind": "local"}), 1)
    spec = make(12, control=None)
    plain = replay(spec, _Flat(), place)
    assert (len(plain.states), plain.makespan) == (12, 6 * 3 * 1 + 6 * 3 * 10)
    limited = replay(make(40, control=None, search={"seconds": 30}), _Flat(), place)
    assert limited.makespan == 30 + 30  # one trial of linear_probe, ten of lorvp
    confirmed = replay(make(12, control=None, confirm={"top": 2, "seeds": [1, 2, 3]}), _Flat(), place)
    assert confirmed.states == [State.FINISHED] * (12 + 2 * 2 * 3)
    assert confirmed.makespan == plain.makespan + 2 * 3 * 3 * (1 + 10)
    assert confirmed.best == plain.best


def test_without_equal_shares_the_search_is_one(make):
    spec = make(search={"equal": None})
    assert list(spec.arms().items()) == [(None, spec)]
    assert spec.arm(spec.trial_config(spec.example())) is None
    assert len({point["method"] for point in run(SpecSearch(spec), 8)}) == 2
