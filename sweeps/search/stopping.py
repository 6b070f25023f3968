"""Which trials are given up early: Tune's schedulers, by epochs and on the score."""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from sweeps.spec.choices import stopping_rule
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
    """Make the scheduler of the spec's stopping rule, for each arm one of its own."""
    if spec.search.equal:
        return ArmScheduler(spec.search.equal, {value: make_scheduler(arm) for value, arm in spec.arms().items()})
    return stopping_rule(spec.early_stopping).make_scheduler(spec)
