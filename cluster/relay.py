"""The relay: submits a job for every trial that was asked for and has none, and notices the jobs that died."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cluster import code
from cluster.folder import JobState, State, StopReason, TrialFolder
from cluster.local import LocalCluster
from cluster.profile import Profile
from cluster.slurm import SlurmCluster

NO_USE = {"OUT_OF_MEMORY": "out of memory", "DEADLINE": "past its deadline"}
"""States of a job that another start would end in again."""
UNEXPLAINED = 3
"""Starts of a job that keeps dying without a word, which the place where it ran has no word for either."""
LONGEST_WAIT = 60.0


class Cluster(Protocol):
    """What the relay needs of the place where jobs run."""

    jobs_in_flight: int
    max_submissions: int

    def submit(self, trials: Sequence[TrialFolder]) -> None: ...

    def adopt(self, trials: Sequence[TrialFolder]) -> None: ...

    def states(self, job_ids: Sequence[str]) -> dict[str, JobState]: ...

    def cancel(self, job_ids: Sequence[str]) -> None: ...


def make_cluster(profile: Profile, sweep: Path, sweep_id: str, concurrent: int) -> Cluster:
    """The place that `profile` describes, for the sweep in the folder `sweep`."""
    code.snapshot(sweep / "code")
    kind = {"local": LocalCluster, "slurm": SlurmCluster}[profile.kind]
    return kind(profile, sweep, sweep_id, concurrent)


class Relay:
    """Looks after the jobs of all trials under one folder; `poll` does what is due and returns at once."""

    def __init__(self, trials: Path, cluster: Cluster) -> None:
        self.trials = trials
        self.cluster = cluster
        self.states: dict[str, JobState] = {}
        """What is known of the job of each open trial, by the trial's name."""
        self._ended: set[str] = set()
        self._ending = False
        self._submissions: Counter[str] = Counter()  # by this relay: an earlier driver's are another story
        self._wait, self._refused_until = 0.0, 0.0
        cluster.adopt(self.open_trials())

    def poll(self) -> None:
        """Submits what waits, within the limit of jobs in flight, and what died; raises OSError when that can't be."""
        if self._ending:
            return
        open_trials = self.open_trials()
        jobs = {trial.name: job["id"] for trial in open_trials if (job := trial.job())}
        by_job = self.cluster.states(list(jobs.values()))
        self.states = {name: by_job[job_id] for name, job_id in jobs.items() if job_id in by_job}
        alive = {name for name, state in self.states.items() if state.alive}
        due = []
        for trial in open_trials:
            if trial.name in alive or trial.ended():  # it may have ended since the look at its folder
                continue
            hopeless = self._hopeless(trial)
            if hopeless:
                trial.claim().end(State.FAILED, ": ".join([hopeless, *trial.last_log_lines(1)]))
            else:
                due.append(trial)
        due = due[: max(0, self.cluster.jobs_in_flight - len(alive))]
        if due and time.monotonic() >= self._refused_until:
            self._submit(due)

    def _submit(self, trials: list[TrialFolder]) -> None:
        """Submits, or waits longer before each next try."""
        for trial in trials:
            if not self._submissions[trial.name]:
                trial.clear_stop()  # it was meant for an earlier driver's job
        try:
            self.cluster.submit(trials)
        except Exception as error:  # submitit and the file system raise their own kinds
            self._wait = min(LONGEST_WAIT, 2 * self._wait + 1)
            self._refused_until = time.monotonic() + self._wait
            last_line = str(error).strip().splitlines()[-1:]
            raise OSError(f"submission refused, again in {self._wait:.0f} s: {''.join(last_line)}") from error
        self._wait = 0.0
        self._submissions.update(trial.name for trial in trials)

    def _hopeless(self, trial: TrialFolder) -> str:
        """Why the trial, whose job is gone, shall have no other one; empty if it shall."""
        submissions = self._submissions[trial.name]
        state = self.states.get(trial.name)
        if submissions and state and state.state in NO_USE:
            return NO_USE[state.state]
        unexplained = state is None or state.state in ("FAILED", "COMPLETED")
        limit = min(UNEXPLAINED, self.cluster.max_submissions) if unexplained else self.cluster.max_submissions
        return f"its job ended {submissions} times without a result" if submissions >= limit else ""

    def open_trials(self) -> list[TrialFolder]:
        """The trials that have not ended, oldest request first."""
        trials = [t for t in TrialFolder.requested(self.trials) if t.name not in self._ended]
        self._ended |= {t.name for t in trials if t.ended()}
        return [t for t in trials if t.name not in self._ended]

    def interrupt(self, patience: float = 20.0) -> None:
        """Ends all jobs so that their trials can be continued.

        Jobs that wait are cancelled at once, those that run stop by themselves, or are cancelled after `patience` s.
        """
        self._ending = True
        for trial in self.open_trials():
            trial.stop(StopReason.INTERRUPT)
        deadline = time.monotonic() + patience
        cancelled: set[str] = set()
        while alive := self._alive_jobs():
            late = time.monotonic() > deadline
            now = {job_id for job_id, state in alive.items() if late or state.waiting} - cancelled
            self.cluster.cancel(sorted(now))
            cancelled |= now
            if late and time.monotonic() > deadline + patience:
                return  # they were cancelled; how long that takes is the cluster's business
            time.sleep(0.1)

    def _alive_jobs(self) -> dict[str, JobState]:
        jobs = [job["id"] for trial in self.open_trials() if (job := trial.job())]
        return {job_id: state for job_id, state in self.cluster.states(jobs).items() if state.alive}
