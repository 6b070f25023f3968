"""A trial as Ray Tune follows it: each epoch that its job recorded, then its end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

from cluster.trial_folder import End, State
from lorvp.config import TrialConfig
from lorvp.errors import TrialFailed
from lorvp.utils.explain import explain
from sweeps.spec.model import Scalar, Spec

SCORE = "score"
"""What the search sees of a trial: the best value of the objective so far."""
NOT_VALID = "no trial is possible at"


class RecordedTrial(Protocol):
    """What a trial has recorded until now: a folder on the disk, or a trial of a replay."""

    @property
    def name(self) -> str:
        """The config's content hash."""

    @property
    def config(self) -> TrialConfig:
        """The trial's config."""

    def results(self) -> Sequence[dict[str, Any]]:
        """Return the epochs recorded so far."""

    def ended(self) -> End | None:
        """Return how the trial ended; None before its end."""


R = TypeVar("R", bound=RecordedTrial)


class Trials(Protocol[R]):
    """Where trials are trained: by jobs, or in the virtual time of a replay."""

    def request(self, config: TrialConfig) -> R:
        """Ask for a trial of `config`; equal configs are one trial."""

    def give_up(self, trial: R) -> None:
        """End the trial's job: the search is through with it."""

    def wait(self) -> Collection[str]:
        """Wait until there may be something new; the names of the trials that have news."""


class TuneTrial:
    """Stands for a Tune actor. It holds one trial at a point of the space and hands its epochs on one by one.

    To ask twice for the same config, in this sweep or after a resume, is to follow the same trial. The epochs that lie
    there are handed on like new ones. Raises TrialFailed for a point at which no trial is possible.
    """

    def __init__(self, spec: Spec, params: dict[str, Scalar], trials: Trials[Any]) -> None:
        try:
            config = spec.trial_config(params)
        except ValidationError as error:  # each axis is valid by itself, but not every two of them together
            location, message = explain(error, TrialConfig)
            raise TrialFailed(f"{NOT_VALID} {params}: {'.'.join(map(str, (*location, message)))}") from None
        self.recorded = trials.request(config)
        self._objective = spec.objective
        self._better = max if spec.mode == "max" else min
        self._delivered = 0
        self._score: float | None = None

    def next_result(self) -> dict[str, Any] | None:
        """Give the next epoch as Tune takes it, and when it was recorded (`time`); None while there is none.

        The end of a trial that was stopped before it got there is its last epoch. Raises TrialFailed for one that
        failed, or ended before its first epoch.
        """
        results, end = self.recorded.results(), self.recorded.ended()
        if len(results) > self._delivered:
            result = results[self._delivered]
            value = result[self._objective]
            if self._delivered and result["whole"] != results[self._delivered - 1]["whole"]:
                self._score = None  # what a rung gave is no figure of the trial
            self._score = value if self._score is None else self._better(self._score, value)
            self._delivered += 1
            return self._tune_result(result["epoch"], result["time"], self._delivered == self.recorded.config.epochs)
        if end is None:
            return None
        if end.state == State.FAILED or self._score is None:
            raise TrialFailed(end.reason or f"{end.state} before its first epoch")
        return self._tune_result(self._delivered, results[-1]["time"] if results else 0.0, done=True)

    def _tune_result(self, epoch: int, time: float, done: bool) -> dict[str, Any]:
        return {"epoch": epoch, SCORE: self._score, "training_iteration": epoch, "time": time, "done": done}

    @property
    def unfinished(self) -> bool:
        """Whether its job has epochs left to train."""
        return self._delivered < self.recorded.config.epochs and self.recorded.ended() is None
