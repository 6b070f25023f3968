"""What goes on beside the search, each in a thread of its own: the relay's polls, and the sending to MLflow.

So what is recorded is seen at once also while the cluster or the server takes its time to answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.folder import TrialFolder
from cluster.scan import FollowedTrial
from sweeps.run.store import without_passwords

if TYPE_CHECKING:
    from sweeps.tracking import Tracker

POLL_SECONDS = 0.5
LONGEST_PAUSE = 10.0
"""Between two tries to send what MLflow did not take."""


def first_line(error: Exception) -> str:
    """What an error says first, after SQLAlchemy's word on when it happened."""
    text = without_passwords(str(error))
    lines = [line for line in text.strip().splitlines() if not line.startswith("(raised as a result of")]
    return lines[0] if lines else type(error).__name__


class Attempts:
    """Tries what may fail and is tried again later. What goes wrong is shown once."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._trouble = ""

    def attempt(self, action: Callable[[], None]) -> bool:
        """Whether it went well."""
        try:
            action()
        except Exception as error:  # MLflow, the disk and the cluster fail in their own ways; the next time may be good
            line = first_line(error)
            if line != self._trouble:
                self._trouble = line
                with suppress(OSError):  # of a screen that is gone, or a log on a full disk
                    self._show(f"trying again: {line}")
            return False
        self._trouble = ""
        return True


class Repeated(threading.Thread):
    """Does something every half second, and at once when it is woken, until it is ended."""

    def __init__(self, action: Callable[[], None], show: Callable[[str], None]) -> None:
        super().__init__(name=action.__qualname__, daemon=True)
        self._action = action
        self._attempts = Attempts(show)
        self._woken = threading.Event()
        self._ended = False

    def run(self) -> None:
        while not self._ended:
            self._woken.clear()
            self._attempts.attempt(self._action)
            self._woken.wait(POLL_SECONDS)

    def wake(self) -> None:
        self._woken.set()

    def end(self) -> None:
        """End it, once what it does now is done."""
        self._ended = True
        self._woken.set()
        if self.is_alive():
            self.join()


class Sender(threading.Thread):
    """Opens MLflow's store and sends it what trials have recorded; what it does not take is kept and sent again."""

    def __init__(
        self, connect: Callable[[], Tracker], trials: Path, controls: Collection[str], show: Callable[[str], None]
    ) -> None:
        super().__init__(name="sender", daemon=True)
        self.tracker: Tracker | None = None
        """None until the store is open."""
        self._connect, self._trials, self._controls = connect, trials, controls
        self._attempts = Attempts(show)
        # Of one that has ended the name alone: MLflow may be thousands behind, and in memory each takes 6 KiB.
        self._pending: dict[str, FollowedTrial | None] = {}
        self._news = threading.Condition()
        self._idle, self._ended = False, False

    def see(self, trial: FollowedTrial) -> None:
        """Take on what is new of a trial. One that has no job yet is no run of MLflow's."""
        if trial.results() or trial.job():
            with self._news:
                self._pending[trial.name] = None if trial.ended() else trial
                self._news.notify_all()

    def run(self) -> None:
        pause = POLL_SECONDS
        while not self._ended:
            if self.tracker is None:
                well = self._attempts.attempt(self._open)
            else:
                well = self._attempts.attempt(self._send_all)
            pause = POLL_SECONDS if well else min(2 * pause, LONGEST_PAUSE)
            with self._news:
                if not well:
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
