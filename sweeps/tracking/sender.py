"""The thread that sends MLflow what trials have recorded, so that the search never waits for a server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from pathlib import Path

from cluster.scan import FollowedTrial
from cluster.trial_folder import TrialFolder
from sweeps.tracking.retry import POLL_SECONDS, Retry
from sweeps.tracking.tracker import Tracker

LONGEST_PAUSE = 10.0
"""Between two tries to send what MLflow did not take."""


class Sender(threading.Thread):
    """Opens MLflow's store and sends it what trials have recorded; what it does not take is kept and sent again."""

    def __init__(
        self, connect: Callable[[], Tracker], trials: Path, controls: Collection[str], show: Callable[[str], None]
    ) -> None:
        super().__init__(name="sender", daemon=True)
        self.tracker: Tracker | None = None
        """None until the store is open."""
        self._connect, self._trials, self._controls = connect, trials, controls
        self._retry = Retry(show)
        # Of one that has ended the name alone: MLflow may be thousands behind, and in memory each takes 6 KiB.
        self._pending: dict[str, FollowedTrial | None] = {}
        self._news = threading.Condition()
        self._idle, self._ended = False, False

    def enqueue(self, trial: FollowedTrial) -> None:
        """Take on what is new of a trial. One that has no job yet is no run of MLflow's."""
        if trial.results() or trial.job():
            with self._news:
                self._pending[trial.name] = None if trial.ended() else trial
                self._news.notify_all()

    def run(self) -> None:
        """Send what is pending until the thread is ended."""
        pause = POLL_SECONDS
        while not self._ended:
            succeeded = self._retry.call(self._open if self.tracker is None else self._send_all)
            pause = POLL_SECONDS if succeeded else min(2 * pause, LONGEST_PAUSE)
            with self._news:
                if not succeeded:
                    self._news.wait_for(lambda: self._ended, pause)
                elif not self._pending:
                    self._idle = True
                    self._news.notify_all()
                    self._news.wait_for(lambda: self._pending or self._ended)
                    self._idle = False

    def finish(self, patience: float) -> bool:
        """End it, when all is sent or `patience` seconds are over; whether all was sent."""
        with self._news:
            sent = self._news.wait_for(lambda: self._idle and not self._pending, patience if self.is_alive() else 0)
            self._ended = True
            self._news.notify_all()
        return sent

    def _open(self) -> None:
        self.tracker = self._connect()

    def _send_all(self) -> None:
        """Send what is pending of each trial. Raises the last error, once each was tried."""
        trouble: Exception | None = None
        for name in list(self._pending):
            if self._ended:
                return
            try:
                self._send(self._pending[name] or TrialFolder(self._trials / name))
            except Exception as error:
                trouble = error
        if trouble:
            raise trouble

    def _send(self, trial: TrialFolder) -> None:
        assert self.tracker is not None
        end = trial.ended()  # before the results: what was recorded before the end is sent, too
        results = list(trial.results())
        control = trial.name in self._controls
        self.tracker.record(trial, results, control)
        if end is not None:
            self.tracker.end(trial, end, control)
        with self._news:
            if end is not None or (trial.ended() is None and len(results) == len(trial.results())):
                self._pending.pop(trial.name, None)
