"""Which trials are given up early: Tune's schedulers, by epochs and on the score."""

from __future__ import annotations

import math
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from sweeps.search.tune_trial import SCORE
from sweeps.spec.model import Scalar, Spec


class ArmScheduler(FIFOScheduler):
    """Early stopping that compares a trial with those of its own arm only, so that none stops all of another."""

    def __init__(self, axis: str, arms: dict[Scalar, TrialScheduler]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of Ray
        self._axis, self._arms = axis, arms

    def _arm(self, trial: Trial) -> TrialScheduler:
        return self._arms[trial.config[self._axis]]

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        """Pass a new trial on to its arm's scheduler."""
        self._arm(trial).on_trial_add(controller, trial)

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        """Pass a failure on to its arm's scheduler."""
        self._arm(trial).on_trial_error(controller, trial)

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Return the decision of the arm's scheduler on an epoch."""
        return self._arm(trial).on_trial_result(controller, trial, result)

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Pass a trial's end on to its arm's scheduler."""
        self._arm(trial).on_trial_complete(controller, trial, result)

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:
        """Pass a trial's removal on to its arm's scheduler."""
        self._arm(trial).on_trial_remove(controller, trial)


def make_scheduler(spec: Spec) -> TrialScheduler:
    """Tune's early stopping by epochs, on the score."""
    if spec.search.equal:
        return ArmScheduler(spec.search.equal, {value: make_scheduler(arm) for value, arm in spec.arms().items()})
    rule = spec.early_stopping
    if rule.rule == "asha":
        return ASHAScheduler(
            time_attr="epoch",
            metric=SCORE,
            mode=spec.mode,
            max_t=spec.max_epochs(),
            grace_period=rule.grace_epochs,
            reduction_factor=rule.reduction_factor,
        )
    if rule.rule == "median":
        return MedianStoppingRule(
            time_attr="epoch",
            metric=SCORE,
            mode=spec.mode,
            grace_period=rule.grace_epochs,
            min_time_slice=math.inf,  # type: ignore[arg-type]  # else it pauses a trial for one that waits, which takes a checkpoint of Tune's
        )
    return FIFOScheduler()  # type: ignore[no-untyped-call]  # of Ray
