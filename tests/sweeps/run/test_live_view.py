"""What the follower says and decides, by the folders of a sweep with a confirmation."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import digits_values
from rich.console import Console

from cluster.scan import Scan
from cluster.trial_folder import End, State, TrialFolder
from lorvp.config import TrialConfig
from sweeps.run.live_view import Follower, GivenUp
from sweeps.spec.model import Spec
from sweeps.tracking.sender import Sender


@pytest.fixture
def spec(tmp_path):
    return Spec.model_validate(
        {
            "name": "followed",
            "trial": digits_values(epochs=1),
            "space": {"prompt.rank": {"int": [1, 9]}},
            "search": {"algorithm": "tpe", "trials": 4},
            "confirm": {"seeds": [1, 2]},
            "failure_limit": {"share": 0.25, "trials": 4},
            "output": tmp_path,
        }
    )


@pytest.fixture
def follower(spec):
    """Makes one for which nothing is submitted or sent; `look` is a round of it."""

    def make() -> Follower:
        scan = Scan(spec.trials)
        manager = SimpleNamespace(states={}, troubles={})
        made = Follower(spec, manager, Console(file=StringIO(), width=200))
        scan.subscribe(made.show)
        scan.poll()
        made.start()

        def poll() -> None:
            scan.poll_all()
            made.check()

        made.request, made.poll = scan.request, poll
        return made

    return make


def ended(following: Follower, config: TrialConfig, state: State = State.FINISHED) -> str:
    trial = following.request(config)
    attempt = trial.claim()
    attempt.append({"epoch": 1, "val_top1": 50.0})
    attempt.end(state)
    return trial.name


def summary(follower: Follower) -> str:
    return follower.view().renderables[1]


def test_stages_are_counted_apart(spec, follower):
    configs = [spec.trial_config({"prompt.rank": rank}) for rank in (1, 2, 3, 4)]
    following = follower()
    for config in [*configs[:3], *spec.control_configs()]:
        ended(following, config)
    earlier = ended(following, spec.confirmed(configs[3], 1))  # of a shorter search
    following.poll()
    assert summary(following).startswith("4 of 5 trials begun: 4 finished")
    ended(following, configs[3])
    names = {ended(following, spec.confirmed(configs[0], seed)) for seed in (1, 2)} | {"still to come"}
    assert earlier not in names
    following.poll()
    assert summary(following).startswith("5 of 5 trials begun: 5 finished")
    following.confirm(names)
    assert summary(following).startswith("2 of 3 trials of the confirmation begun: 2 finished")
    said = following.console.file.getvalue()
    assert f"{earlier}  confirm  rank=4 seed=1  epoch 1/1" in said


def test_the_controls_figure_is_the_one_to_beat(spec, follower):
    """From the moment that the control has ended, also for a driver that comes back to it."""
    following = follower()
    ended(following, spec.trial_config({"prompt.rank": 1}))
    following.poll()
    assert "best so far 50; " in summary(following)
    (control,) = spec.control_configs()
    attempt = following.request(control).claim()
    attempt.append({"epoch": 1, "val_top1": 62.5})
    following.poll()
    assert "to beat" not in summary(following)
    attempt.end(State.FINISHED)
    following.poll()
    assert "best so far 50, 62.5 to beat; " in summary(following)
    assert "to beat: val_top1 62.5, the control's" in following.console.file.getvalue()
    assert "best so far 50, 62.5 to beat; " in summary(follower())


def test_what_fails_in_the_confirmation_does_not_end_the_sweep(spec, follower):
    configs = [spec.trial_config({"prompt.rank": rank}) for rank in (1, 2)]
    following = follower()
    ended(following, configs[0], State.FAILED)
    for seed in (1, 2):
        ended(following, spec.confirmed(configs[0], seed), State.FAILED)
    following.poll()
    ended(following, configs[1], State.FAILED)
    with pytest.raises(GivenUp, match=r"^2 of the first 2 trials failed \(failure_limit\)$"):
        following.poll()
    follower().poll()


def test_of_an_ended_trial_the_name_is_kept_until_mlflow_has_it(spec, follower):
    """In memory a trial takes 6 KiB, and MLflow may be away for thousands of them."""
    told: list[tuple] = []
    away = [OSError("it is away")]

    class Told:
        def record(self, trial: TrialFolder, results: list[dict[str, Any]], control: bool) -> None:
            if away:
                raise away.pop()
            told.append((trial.name, trial.config, [result["epoch"] for result in results], control))

        def end(self, trial: TrialFolder, end: End, control: bool) -> None:
            told.append((trial.name, end.state))

    config = spec.trial_config({"prompt.rank": 1})
    following, sender = follower(), Sender(Told, spec.trials, spec.control_names(), print)
    running = following.request(config)
    attempt = running.claim()
    attempt.append({"epoch": 1, "val_top1": 50.0})
    following.poll()
    sender.enqueue(running)
    assert sender._pending == {running.name: running}
    attempt.end(State.FINISHED)
    following.poll()
    sender.enqueue(running)
    assert sender._pending == {running.name: None}
    sender.start()
    assert sender.finish(patience=20)
    assert told == [(running.name, config, [1], False), (running.name, State.FINISHED)]
