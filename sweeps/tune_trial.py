"""A trial as Ray Tune sees it: asked for by writing its folder, followed by reading it, stopped by a word in it.

A process of Ray's imports this for each running trial, so it imports little: Optuna, for one, is the driver's.
"""

from __future__ import annotations

import time
from typing import Any

from pydantic import ValidationError
from ray import tune
from ray.tune.experiment import Trial

from cluster.folder import State, StopReason, TrialFolder
from lorvp.config import TrialConfig
from lorvp.errors import TrialFailed
from lorvp.explain import explain
from sweeps.spec import Scalar, Spec

SCORE = "score"
"""What the search sees of a trial: the best value of the objective so far."""
POLL_SECONDS = 0.2
NOT_VALID = "no trial is possible at"


class TuneTrial(tune.Trainable):
    """Hands each epoch that the job records on to Tune.

    The driver's relay submits the job, or finds it running: to ask twice for the same config, in this sweep or after
    a resume, is to follow the same folder. The epochs that lie there are handed on like new ones.
    """

    def setup(self, config: dict[str, Scalar], spec: Spec) -> None:  # type: ignore[override]  # by with_parameters
        self.spec = spec
        self.follow(config)

    def reset_config(self, new_config: dict[str, Scalar]) -> bool:
        """Lets Tune use one actor for many trials: starting one costs a second."""
        self.follow(new_config)
        return True

    def follow(self, params: dict[str, Scalar]) -> None:
        """Asks for the trial at this point of the space, and starts over with its first epoch."""
        try:
            config = self.spec.trial_config(params)
        except ValidationError as error:  # each axis is valid by itself, but not every two of them together
            location, message = explain(error, TrialConfig)
            raise TrialFailed(f"{NOT_VALID} {params}: {'.'.join(map(str, (*location, message)))}") from None
        self.folder = TrialFolder.request(self.spec.trials, config)
        self.handed_on = 0
        self.score: float | None = None

    def step(self) -> dict[str, Any]:
        """Waits for the next epoch. The end of a trial that was stopped before it got there is its last epoch."""
        while True:
            end = self.folder.ended()  # looked at first: what was recorded before the end is read below
            results = self.folder.results()
            if len(results) > self.handed_on:
                result = results[self.handed_on]
                self.handed_on += 1
                value = result[self.spec.objective]
                better = max if self.spec.mode == "max" else min
                if self.handed_on > 1 and result["whole"] != results[self.handed_on - 2]["whole"]:
                    self.score = None  # what a rung gave is no figure of the trial
                self.score = value if self.score is None else better(self.score, value)
                last = self.handed_on == self.folder.config.epochs
                return {"epoch": result["epoch"], SCORE: self.score, "done": last}
            if end is not None:
                if end.state == State.FAILED or self.score is None:
                    raise TrialFailed(end.reason or f"{end.state} before its first epoch")
                return {"epoch": self.handed_on, SCORE: self.score, "done": True}
            time.sleep(POLL_SECONDS)


class StopGivenUp(tune.Callback):
    """Ends the jobs of trials that Tune is through with while they have epochs left. Lives in the driver."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        folder = TrialFolder.request(self.spec.trials, self.spec.trial_config(trial.config))
        if trial.last_result["epoch"] < folder.config.epochs and folder.ended() is None:
            folder.stop(StopReason.SEARCH)
