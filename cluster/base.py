"""Say what a sweep needs of a place where jobs run. A kind of place is a subclass in a file of its own."""

from __future__ import annotations

import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from cluster import snapshot
from cluster.profile import KINDS, Profile
from cluster.trial_folder import JobState, TrialFolder


class Cluster(ABC):
    """Start jobs of the sweep in the folder `sweep`, and say what became of them."""

    runs_drivers: ClassVar[bool] = False
    """Whether a driver can be a job: whether there is `submit_driver`."""

    def __init__(self, profile: Profile, sweep: Path, sweep_id: str, concurrent: int, pack: int | str) -> None:
        self.folder = sweep / "jobs"
        self.jobs_in_flight = profile.jobs_in_flight or concurrent
        """Jobs that wait or run at the same time, at most."""
        self.trials_per_job = profile.trials_per_job
        """Trials that a job takes, one after the other."""
        self.pack = pack
        """Trials that a job trains together; or auto."""
        self.max_submissions = self.starts_allowed(profile)
        """Starts of a trial, at most."""

    @abstractmethod
    def submit(self, trials: Sequence[TrialFolder], exclude: str) -> None:
        """Submit a job for each trial, not on the nodes in `exclude`, and record its id. Raises OSError."""

    @abstractmethod
    def adopt(self, trials: Sequence[TrialFolder]) -> None:
        """Find the trials' jobs that were submitted but not recorded. Raises OSError."""

    @abstractmethod
    def states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """Return the state of each job that is known. Raises OSError when the cluster does not answer."""

    @abstractmethod
    def cancel(self, job_ids: Sequence[str]) -> None:
        """Cancel the jobs. Raises OSError when the cluster does not answer."""

    @staticmethod
    def starts_allowed(profile: Profile) -> int:
        """Return how often a trial may be started before it has failed for good."""
        return 3

    @staticmethod
    def seconds_of_a_start(profile: Profile) -> float:
        """Return the time limit of one start of a job, in seconds."""
        return math.inf

    @staticmethod
    def batch_file(profile: Profile, sweep: Path) -> str | None:
        """Return the file by which a job of the sweep in the folder `sweep` is asked for; None if there is none."""
        return None

    @staticmethod
    def submit_driver(profile: Profile, sweep: Path, sweep_id: str, arguments: Sequence[str]) -> tuple[str, Path]:
        """Submit the driver of the sweep in the folder `sweep` as a job; return its id, and its log.

        `arguments` are those of `sweeps/launch.py`. Raises OSError when the job is refused.
        """
        raise NotImplementedError


def cluster_class(profile: Profile) -> type[Cluster]:
    """Return the class of the profile's kind."""
    kind: type[Cluster] = pkgutil.resolve_name(KINDS[profile.kind])
    return kind


def make_cluster(profile: Profile, sweep: Path, sweep_id: str, concurrent: int, pack: int | str = 1) -> Cluster:
    """Make the cluster that `profile` describes, for the sweep in the folder `sweep`; `pack` trials share a process."""
    snapshot.snapshot(sweep / "code")
    return cluster_class(profile)(profile, sweep, sweep_id, concurrent, pack)
