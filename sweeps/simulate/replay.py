"""A sweep in virtual time: what happens when, without a trial being trained.

The search is the sweep's own (`sweeps.search.controller`). Only what it waits for is another: one loop over events
stands for the cluster, and a clock of its own for time.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optuna

from cluster.base import cluster_class
from cluster.profile import Profile
from cluster.trial_folder import End, State
from lorvp.config import TrialConfig
from lorvp.errors import UserError
from sweeps.run.live_view import GivenUp
from sweeps.search.controller import Failure, SweepController
from sweeps.search.controls import WithControls
from sweeps.search.stopping import make_scheduler
from sweeps.search.suggest import ArmSeconds, SpecSearch
from sweeps.simulate.curves import Curve, Curves
from sweeps.spec.model import Spec, Stage


@dataclass(frozen=True)
class Place:
    """Where the jobs of a replay run. Times in seconds. Raises UserError for fewer GPUs than a job takes."""

    profile: Profile
    gpus: int
    submission_delay: float = 0.0
    start_up: float = 0.0
    failure_rate: float = 0.0
    """Of a job's starts, the share that fails: at a moment anywhere between its start and the end of the trial that it
    starts with, if the search lets that go on so long. The trial goes on after its last epoch, in another job."""

    def __post_init__(self) -> None:
        if self.gpus < self.profile.gpus:
            raise UserError(f"--gpus {self.gpus}: must be at least {self.profile.gpus}, what a job takes")

    @property
    def starts(self) -> int:
        """How often a trial may be started before it has failed for good, as `cluster.job_manager` counts."""
        return cluster_class(self.profile).starts_allowed(self.profile)

    @property
    def time_limit(self) -> float:
        """Of one start of a job; its trial goes on where it was, in another."""
        return cluster_class(self.profile).seconds_of_a_start(self.profile)


@dataclass
class ReplayResult:
    """What a replay came to. Times in seconds; GPU-seconds are those that jobs had a GPU for."""

    gpus: int
    states: list[State] = field(default_factory=list)
    """How the trials ended, those of the control and of the confirmation among them, in that order."""
    invalid: int = 0
    """Points of the space that are no valid trial."""
    repeated: int = 0
    """Points that gave the config of an earlier trial: nothing is trained for them."""
    failed_starts: int = 0
    beyond_curve: int = 0
    """Trials that went on longer than their curve."""
    makespan: float = 0.0
    gpu_seconds: float = 0.0
    training_seconds: float = 0.0
    """GPU-seconds of the epochs that were recorded: without start-up, and what failures cost."""
    best: list[tuple[float, float]] = field(default_factory=list)
    """Each new best value of the search's objective, the control's left out, after the GPU-seconds until then."""
    given_up: str = ""

    @property
    def utilisation(self) -> float:
        """The fraction of all GPUs' time that trained recorded epochs."""
        return self.training_seconds / (self.gpus * self.makespan) if self.makespan else 0.0

    def best_after(self, gpu_seconds: float) -> float:
        """Return the best value after so many GPU-seconds, which are at least those of the first."""
        return self.best[bisect_right(self.best, gpu_seconds, key=lambda point: point[0]) - 1][1]


@dataclass(eq=False)
class Trial:
    """What is trained: equal configs are one. The search reads it as it reads a folder."""

    config: TrialConfig
    name: str
    control: bool
    curve: Curve
    part: float = 0.0
    """Seconds of the next epoch that the checkpoint of a job at its time limit holds."""
    starts: int = 0
    state: State | None = None
    job: Job | None = None
    recorded: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epochs(self) -> int:
        """The number of epochs recorded so far."""
        return len(self.recorded)

    def results(self) -> list[dict[str, Any]]:
        """Return the epochs recorded so far."""
        return self.recorded

    def ended(self) -> End | None:
        """Return how the trial ended; None before its end."""
        return End(self.state) if self.state else None


@dataclass(eq=False)
class Job:
    """One start of a job, from its submission on. It has one event to come, of the trial that it then trains."""

    trial: Trial
    place: int = 1
    started: float | None = None
    ends: float = math.inf
    """When its time limit or a failure ends it."""
    fails: bool = False
    training_since: float | None = None
    """When it began, or went on with, its trial's next epoch."""


def replay(spec: Spec, curves: Curves, place: Place, seed: int = 0) -> ReplayResult:
    """Return what the sweep comes to when each trial takes its epochs from `curves`, the same for the same `seed`.

    As in the sweep itself: the control is among the first trials that run; Tune asks for `search.concurrent` trials at
    a time and hears of each epoch; a trial that it gives up ends at once, and so does the job of one, unless it takes
    the next; jobs wait and run up to `jobs_in_flight`, each with the GPUs of its profile, first submitted, first
    started; too many failures at the start end the sweep (`failure_limit`); the best are confirmed. Otherwise than
    there, nothing takes time but submission, start-up and epochs: suggestions, polls, the test set's reading and a
    job's wait for its next trial.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Define-by-run function")  # Ray's, of samplers that take a second
        return _Replay(spec, curves, place, seed).run()


class _Replay:
    """The loop over events, and what each does. To the search it is the place where trials are trained."""

    def __init__(self, spec: Spec, curves: Curves, place: Place, seed: int) -> None:
        self.spec = spec
        self.curves = curves
        self.place = place
        self.spent = ArmSeconds(spec)
        self.random = random.Random(seed)
        self.result = ReplayResult(place.gpus)
        self.better = max if spec.mode == "max" else min
        self.total = spec.number_of_trials() + len(spec.control_configs())
        self.trials: dict[str, Trial] = {}
        self.news: set[str] = set()
        self.unsubmitted: deque[Trial] = deque()
        self.queue: deque[Job] = deque()  # for a GPU
        self.idle: list[Job] = []  # whose trial has just ended
        self.jobs = 0  # that wait or run
        self.jobs_in_flight = place.profile.jobs_in_flight or spec.search.concurrent
        self.free_gpus = place.gpus
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()  # of events at the same time

    def run(self) -> ReplayResult:
        try:
            self.search()
            self.run_to_end()
            if self.spec.confirm:
                self.confirm()
                self.run_to_end()
        except GivenUp as reason:
            self.result.given_up = str(reason)
        self.result.beyond_curve = sum(trial.epochs > trial.curve.known for trial in self.trials.values())
        return self.result

    def search(self) -> None:
        def count_invalid(line: str) -> None:
            self.result.invalid += 1

        failure, searcher = Failure(), SpecSearch(self.spec, spent=self.spent)
        add_control = partial(self.add_trial, control=True)
        trials = WithControls(self, self.spec.control_configs(), add_control, self.jobs_in_flight)
        SweepController(self.spec, searcher, make_scheduler(self.spec), trials, failure, count_invalid).run()
        trials.request_controls()
        if failure.error:
            raise failure.error

    def run_to_end(self) -> None:
        """Until nothing more happens."""
        self.fill()
        while self.events:
            self.step()
            self.fill()

    def confirm(self) -> None:
        """Ask for the best trials of each arm, and of the control, under each seed."""
        finished = [trial for trial in self.trials.values() if trial.state == State.FINISHED]
        finished.sort(key=lambda trial: self.better(trial.curve.values), reverse=self.spec.mode == "max")
        best = [trial for trial in finished if trial.control][:1]
        for value in self.spec.arms():
            of_arm = [t for t in finished if not t.control and self.spec.arm(t.config) == value]
            best += of_arm[: self.spec.top]
        for trial in best:
            for seed in self.spec.seeds:
                self.add_trial(self.spec.confirmed(trial.config, seed), trial.control)

    def schedule(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (time, next(self.order), event))

    def step(self) -> None:
        """Carry out the next event. Raises GivenUp where too many trials failed at the start."""
        then, _, event = heapq.heappop(self.events)
        self.result.gpu_seconds += (self.place.gpus - self.free_gpus) * (then - self.now)
        self.now = then
        event()

    def fill(self) -> None:
        """Submit and starts what there is room for."""
        for job in self.idle:
            self.take_next(job)
        self.idle.clear()
        while self.unsubmitted and self.jobs < self.jobs_in_flight:
            trial = self.unsubmitted.popleft()
            if trial.state is None:
                trial.job = Job(trial)
                self.jobs += 1
                self.schedule(self.now + self.place.submission_delay, partial(self.queue.append, trial.job))
        while self.queue and self.free_gpus >= self.place.profile.gpus:
            self.start(self.queue.popleft())

    def add_trial(self, config: TrialConfig, control: bool = False) -> Trial:
        name = config.content_hash()
        if name not in self.trials:
            self.trials[name] = Trial(config, name, control, self.curves.curve(config, control))
            self.unsubmitted.append(self.trials[name])
        return self.trials[name]

    # What the search asks of the place where trials are trained

    def request(self, config: TrialConfig) -> Trial:
        before = len(self.trials)
        trial = self.add_trial(config)
        self.result.repeated += len(self.trials) == before
        return trial

    def give_up(self, trial: Trial) -> None:
        self.end(trial, State.STOPPED)

    def wait(self) -> set[str]:
        """Let events happen until a trial has news. The search may then ask for another before jobs are filled up."""
        while not self.news:
            self.fill()
            self.step()
        news, self.news = self.news, set()
        return news

    # What the cluster does. An event of a trial that has ended meanwhile is nothing.

    def start(self, job: Job) -> None:
        """Give the job its GPUs, and draws how it will end."""
        trial, place = job.trial, self.place
        if trial.state is not None:
            return
        self.free_gpus -= place.profile.gpus
        job.started = self.now
        job.ends = self.now + place.time_limit
        if self.random.random() < place.failure_rate:
            remaining = place.start_up + sum(trial.curve.seconds[trial.epochs :]) - trial.part
            failure = self.now + self.random.random() * remaining
            job.fails = failure < job.ends
            job.ends = min(failure, job.ends)
        trial.starts += 1
        ready = self.now + place.start_up
        self.schedule(min(ready, job.ends), partial(self.train if ready <= job.ends else self.interrupt, job, trial))

    def train(self, job: Job, trial: Trial) -> None:
        """Begin the next epoch, or goes on with it."""
        if trial.state is not None:
            return
        job.training_since = self.now
        end = self.now + trial.curve.seconds[trial.epochs] - trial.part
        self.schedule(min(end, job.ends), partial(self.record if end <= job.ends else self.interrupt, job, trial))

    def record(self, job: Job, trial: Trial) -> None:
        """Record the end of an epoch."""
        if trial.state is not None:
            return
        value, best = trial.curve.values[trial.epochs], self.result.best
        self.result.training_seconds += self.place.profile.gpus * trial.curve.seconds[trial.epochs]
        searched = not trial.control and self.spec.stage(trial.config) == Stage.SEARCH
        if searched and (not best or self.better(value, best[-1][1]) != best[-1][1]):
            best.append((self.result.gpu_seconds, value))
        result = {"epoch": trial.epochs + 1, self.spec.objective: value, "seconds": trial.curve.seconds[trial.epochs]}
        trial.recorded.append(result | {"time": self.now, "whole": True})
        trial.part = 0.0
        self.note(trial)
        if trial.epochs == trial.config.epochs:
            self.end(trial, State.FINISHED)
        else:
            self.schedule(self.now, partial(self.train, job, trial))

    def interrupt(self, job: Job, trial: Trial) -> None:
        """End a job that its trial outlives: at a failure, or at the time limit, before which a checkpoint is made."""
        if trial.state is not None:
            return
        if job.fails:
            self.result.failed_starts += 1
        elif job.training_since is not None:
            trial.part += self.now - job.training_since
        self.release(job)
        if trial.starts < self.place.starts:
            self.unsubmitted.appendleft(trial)
        else:
            self.end(trial, State.FAILED)

    def end(self, trial: Trial, state: State) -> None:
        trial.state = state
        states = self.result.states
        states.append(state)
        self.result.makespan = self.now
        if trial.job is not None and trial.job.started is not None:
            self.idle.append(trial.job)
        elif trial.job is not None:  # it waits for its start, and is cancelled
            self.jobs -= 1
        self.note(trial)
        limit = self.spec.failure_limit
        failed = states[: limit.trials].count(State.FAILED)
        if failed > limit.share * limit.trials and len(states) < self.total:
            raise GivenUp(f"{failed} of the first {len(states)} trials failed (failure_limit)")

    def note(self, trial: Trial) -> None:
        self.spent.note(trial)
        self.news.add(trial.name)

    def take_next(self, job: Job) -> None:
        """Hand the job a trial that waits and needs what it has loaded, or lets it go."""
        if job.place < self.place.profile.trials_per_job:
            for trial in self.unsubmitted:
                if trial.state is None and trial.config.shares_with(job.trial.config):
                    self.unsubmitted.remove(trial)
                    job.trial, trial.job = trial, job
                    job.place += 1
                    trial.starts += 1
                    self.train(job, trial)
                    return
        self.release(job)

    def release(self, job: Job) -> None:
        job.trial.job = None
        self.jobs -= 1
        self.free_gpus += self.place.profile.gpus
