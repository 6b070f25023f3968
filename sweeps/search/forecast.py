"""A scheduler for Tune that ends trials by a forecast of their last score."""

from __future__ import annotations

import math
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from sweeps.search.tune_trial import SCORE

PERFECT = 100.0
"""Of a score that grows, a top-1 or top-5 accuracy in percent; the rest of it is the error."""
SMALLEST = 0.1
"""Added to an error, in percent, so that a perfect score leaves a ratio to the others."""


class ForecastScheduler(FIFOScheduler):
    """End a trial whose forecast is worse than the best that trained to its end.

    The forecast multiplies the trial's error after an epoch by the smallest ratio of last error to error after that
    epoch, among the trials that trained to their end. There must be `enough` of these.
    """

    def __init__(self, first_decision: int, epochs: int, mode: str, enough: int = 2) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of Ray
        self._first_decision, self._epochs, self._mode, self._enough = first_decision, epochs, mode, enough
        self._errors: dict[str, dict[int, float]] = {}
        """Of each trial, by epoch."""
        self._ended: set[str] = set()
        """Trials with a last epoch."""

    def _note(self, trial: Trial, result: dict[str, Any]) -> None:
        score = float(result[SCORE])
        error = PERFECT - score if self._mode == "max" else score
        self._errors.setdefault(trial.trial_id, {})[result["epoch"]] = error + SMALLEST

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Note an epoch, and decide whether the trial goes on."""
        self._note(trial, result)
        epoch = result["epoch"]
        if epoch < self._first_decision or epoch >= self._epochs:
            return TrialScheduler.CONTINUE
        known = [self._errors[name] for name in self._ended if epoch in self._errors[name]]
        if len(known) < self._enough:
            return TrialScheduler.CONTINUE
        best = min(errors[self._epochs] for errors in known)
        forecast = self._errors[trial.trial_id][epoch] * min(errors[self._epochs] / errors[epoch] for errors in known)
        if not forecast > best:
            return TrialScheduler.CONTINUE
        del self._errors[trial.trial_id]
        return TrialScheduler.STOP

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Note the last epoch of a trial, from which others are forecast."""
        if "epoch" in result and SCORE in result:
            self._note(trial, result)
            if result["epoch"] == self._epochs and math.isfinite(result[SCORE]):
                self._ended.add(trial.trial_id)
