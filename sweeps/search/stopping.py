"""Which trials are given up early: Tune's schedulers, each for trials that can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from sweeps.spec.choices import stopping_rule
from sweeps.spec.model import Scalar, Spec


class ComparableScheduler(FIFOScheduler):
    """Early stopping that compares a trial only with those that have the same values on some axes.

    So a kind of trial that starts slowly is not ended by one that starts well.
    """

    def __init__(self, axes: Sequence[str], make: Callable[[], TrialScheduler]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of Ray
        self._axes, self._make = axes, make
        self._schedulers: dict[tuple[Scalar, ...], TrialScheduler] = {}

    def _of(self, trial: Trial) -> TrialScheduler:
        values = tuple(trial.config.get(axis) for axis in self._axes)
        if values not in self._schedulers:
            self._schedulers[values] = self._make()
        return self._schedulers[values]

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        """Pass a new trial on to its scheduler."""
        self._of(trial).on_trial_add(controller, trial)

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        """Pass a failure on to the trial's scheduler."""
        self._of(trial).on_trial_error(controller, trial)

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Return the decision of the trial's scheduler on an epoch."""
        return self._of(trial).on_trial_result(controller, trial, result)

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Pass a trial's end on to its scheduler."""
        self._of(trial).on_trial_complete(controller, trial, result)

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:
        """Pass a trial's removal on to its scheduler."""
        self._of(trial).on_trial_remove(controller, trial)


def make_scheduler(spec: Spec) -> TrialScheduler:
    """Make the scheduler of the spec's stopping rule, one for each set of trials that can be compared."""
    rule, axes = stopping_rule(spec.early_stopping), spec.compared_within()
    return ComparableScheduler(axes, lambda: rule.make_scheduler(spec)) if axes else rule.make_scheduler(spec)
