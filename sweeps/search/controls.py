"""Have the controls trained beside the first trials of a search, and not before them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Generic

from lorvp.config import TrialConfig
from sweeps.search.tune_trial import R, Trials


class WithControls(Generic[R]):
    """Where a search has its trials trained (`Trials`), with the controls among the first of them.

    `jobs_at_once` jobs run at a time. The controls are the last of the jobs that start together, after at least one
    trial of the search. So the search never waits for them, and what is to beat is known soon.
    """

    def __init__(
        self,
        trials: Trials[R],
        controls: Sequence[TrialConfig],
        request_control: Callable[[TrialConfig], object],
        jobs_at_once: int,
    ) -> None:
        self._trials, self._controls, self._request_control = trials, list(controls), request_control
        self._left = max(1, jobs_at_once - len(controls))

    def request(self, config: TrialConfig) -> R:
        """Ask for a trial of the search; with the last of those that go before them, ask for the controls, too."""
        trial = self._trials.request(config)
        self._left -= 1
        if not self._left:
            self.request_controls()
        return trial

    def give_up(self, trial: R) -> None:
        """End the trial's job."""
        self._trials.give_up(trial)

    def wait(self) -> Collection[str]:
        """Wait as `Trials` does: the search asks for no more trials now."""
        self.request_controls()
        return self._trials.wait()

    def request_controls(self) -> None:
        """Ask for the controls, unless that was done."""
        while self._controls:
            self._request_control(self._controls[0])
            self._controls.pop(0)
