"""The relay: submits a job for every trial that was asked for and has none, and notices the jobs that died."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cluster.folder import State, StopReason, TrialFolder

MAX_SUBMISSIONS = 3
"""A job that dies without a word (killed, out of memory, power) is submitted again until it has had this many."""


class Cluster(Protocol):
    """What the relay needs of the place where jobs run."""

    jobs_in_flight: int

    def submit(self, trial: TrialFolder) -> str: ...

    def alive(self, job_ids: Sequence[str]) -> set[str]: ...

    def cancel(self, job_ids: Sequence[str]) -> None: ...


class Relay:
    """Looks after the jobs of all trials under one folder; `poll` does what is due and returns at once."""

    def __init__(self, trials: Path, cluster: Cluster) -> None:
        self.trials = trials
        self.cluster = cluster
        self._ended: set[str] = set()
        self._ending = False
        self._submissions: Counter[str] = Counter()  # by this relay: an earlier driver's are another story

    def poll(self) -> None:
        if self._ending:
            return
        open_trials = self.open_trials()
        jobs = {trial.name: job for trial in open_trials if (job := trial.job())}
        alive = self.cluster.alive([job["id"] for job in jobs.values()])
        waiting = [t for t in open_trials if t.name not in jobs or jobs[t.name]["id"] not in alive]
        free = self.cluster.jobs_in_flight - (len(open_trials) - len(waiting))
        for trial in waiting:
            if trial.ended():  # between the look at its folder and the look at its job
                continue
            submissions = self._submissions[trial.name]
            if submissions >= MAX_SUBMISSIONS:
                reason = f"its job ended {MAX_SUBMISSIONS} times without a result"
                trial.claim().end(State.FAILED, ": ".join([reason, *trial.last_log_lines(1)]))
            elif free > 0:
                if not submissions:
                    trial.clear_stop()  # it was meant for an earlier driver's job
                trial.submitted(self.cluster.submit(trial))
                self._submissions[trial.name] += 1
                free -= 1

    def open_trials(self) -> list[TrialFolder]:
        """The trials that have not ended, oldest request first."""
        trials = [t for t in TrialFolder.requested(self.trials) if t.name not in self._ended]
        self._ended |= {t.name for t in trials if t.ended()}
        return [t for t in trials if t.name not in self._ended]

    def interrupt(self, patience: float = 20.0) -> None:
        """Ends all jobs so that their trials can be continued; deaf ones are killed after `patience` s."""
        self._ending = True
        for trial in self.open_trials():
            trial.stop(StopReason.INTERRUPT)
        deadline = time.monotonic() + patience
        while (alive := self._alive_jobs()) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.cluster.cancel(sorted(alive))

    def _alive_jobs(self) -> set[str]:
        return self.cluster.alive([job["id"] for trial in self.open_trials() if (job := trial.job())])
