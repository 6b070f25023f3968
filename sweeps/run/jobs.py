"""Have the trials of a sweep trained by jobs: the job manager looks after the jobs, in rounds of polls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from cluster.job_manager import JobManager
from cluster.scan import FollowedTrial
from cluster.trial_folder import StopReason
from lorvp.config import TrialConfig
from sweeps.run.live_view import Follower
from sweeps.tracking.retry import PeriodicThread, Retry
from sweeps.tracking.sender import Sender

LONGEST_ROUND = 5.0
"""Seconds until the next round at the latest, for what jobs wait for."""


class Jobs:
    """What the search takes for its trials (`sweeps.search.tune_trial.Trials`).

    A round looks at the trials' folders once, and what it finds goes to the search, to MLflow and to the screen.
    """

    def __init__(self, manager: JobManager, follower: Follower, sender: Sender) -> None:
        self._manager, self._follower, self._sender = manager, follower, sender
        self._scan = manager.scan
        self._news: set[str] = set()
        self._requested = False
        self._giving_up: list[FollowedTrial] = []  # whose jobs do not know yet
        self._poll_retry, self._stop_retry = Retry(follower.warn), Retry(follower.warn)
        self._poll_thread = PeriodicThread(manager.poll, follower.warn)
        for listener in (follower.show, sender.enqueue, self._note):
            self.subscribe(listener)

    def subscribe(self, listener: Callable[[FollowedTrial], None]) -> None:
        """Have `listener` told of each trial with news; before `start`, of what was recorded before, too."""
        self._scan.subscribe(listener)

    def start(self) -> None:
        """Read what is there, and begin to look after the jobs."""
        self._poll_retry.call(self._manager.take_over)
        self._poll_retry.call(self._scan.poll)
        self._follower.start()
        self._poll_thread.start()
        self._sender.start()

    @property
    def at_once(self) -> int:
        """Number of jobs that the cluster runs at a time."""
        return self._manager.cluster.jobs_in_flight

    def request(self, config: TrialConfig) -> FollowedTrial:
        """Ask for a trial of `config`; equal configs are one trial."""
        self._requested = True
        return self._scan.request(config)

    def give_up(self, trial: FollowedTrial) -> None:
        """Ask the trial's job to stop it, for good."""
        self._giving_up.append(trial)
        self._stop_given_up()

    def wait(self) -> set[str]:
        """Go through one round; the names of the trials with news. Raises GivenUp as the follower does."""
        if self._requested:  # now that all are known that can start, so that they go to the cluster together
            self._requested = False
            self._poll_thread.wake()
        self._scan.changed.wait(min(self._scan.seconds_until_due(), LONGEST_ROUND))
        self._poll_retry.call(self._scan.poll)
        self._stop_given_up()
        self._follower.check()
        news, self._news = self._news, set()
        return news

    def wait_for_all(self) -> None:
        """Go through rounds until all trials have ended."""
        while self._scan.open():
            self.wait()

    def stop(self) -> None:
        """Stop looking after the jobs, and showing."""
        self._poll_thread.end()
        self._follower.stop()

    def interrupt(self) -> None:
        """End the jobs so that their trials can be continued; what they record until then is seen."""
        self._manager.interrupt()

    def finish(self, patience: float = 60.0) -> bool:
        """Send away jobs that wait, and the last news to MLflow; False if that could not be done in time."""
        with suppress(OSError):
            self._manager.release_idle()
        return self._sender.finish(patience)

    def _note(self, trial: FollowedTrial) -> None:
        self._news.add(trial.name)

    def _stop_given_up(self) -> None:
        """Leave the word to end in the folders; on a full disk it is tried again in the next round."""
        stopped = [trial for trial in self._giving_up if self._stop_retry.call(lambda: trial.stop(StopReason.SEARCH))]  # noqa: B023
        self._giving_up = [trial for trial in self._giving_up if trial not in stopped]
