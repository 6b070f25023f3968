"""Ray Tune's controller in this process alone, and what stands there for Ray's actors.

Tune's `TuneController` asks the searcher for trials, starts an actor for each, hands on each result to the scheduler
and the searcher, and does what they decide. It reaches its actors by one object, the actor manager. Our trials train in
jobs that submitit starts, so an actor has nothing to do but to wait for the next line in a trial's folder. A process of
Ray's for that takes 116 MiB and 0.3 s of CPU, and the Ray cluster around it 12 s in every sweep, ports, sockets, and a
memory monitor that ends processes when others have filled the machine. So `Actors` stands for `RayActorManager` and
keeps plain objects (`TuneTrial`), `SweepTrial` is a trial of Tune's that has no folder of Ray's and no process, and
`SweepController` starts the one for the other. `ray.init` is never called.

The names that these three replace or rely on are Tune's inner ones. Each is held by a test in
`tests/sweeps/search/test_controller.py`, and pyproject.toml allows the versions of ray only that it has seen.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from ray.air.execution._internal import TrackedActor
from ray.tune import Callback, PlacementGroupFactory
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import SearchAlgorithm, Searcher

from lorvp.errors import TrialFailed
from sweeps.search.tune_trial import Trials, TuneTrial
from sweeps.spec.model import Scalar, Spec

logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # trials that fail are told by who follows them

T = TypeVar("T")
AT_ONCE = -math.inf
"""The time of an event that comes before every epoch."""


class Failure:
    """The first error inside the search. It then suggests and stops nothing more, and what trains goes on."""

    def __init__(self, tell: Callable[[Exception], None] = lambda error: None) -> None:
        self.error: Exception | None = None
        self._tell = tell

    def note(self, error: Exception) -> None:
        """Keep the first error, and tell of it."""
        if self.error is None:
            self.error = error
            self._tell(error)

    def guard(self, work: Callable[[], T], otherwise: T) -> T:
        """Give what `work` gives; `otherwise` if it fails now, or something else has failed before."""
        if self.error is None:
            try:
                return work()
            except Exception as error:  # Optuna, a scheduler or the disk: each has kinds of its own
                self.note(error)
        return otherwise


class SweepTrial(Trial):
    """Tune's record of a trial, without the folder and the entry in Ray's registry that Tune would give it."""

    _resources = PlacementGroupFactory([{"CPU": 1}])

    def __init__(self, trial_id: str, params: dict[str, Scalar]) -> None:
        super().__init__("trial", config=params, trial_id=trial_id, stub=True)

    def create_placement_group_factory(self) -> None:
        """Set the resources to one CPU."""
        self.placement_group_factory = self._resources  # type: ignore[assignment]  # None until now

    def set_ray_actor(self, ray_actor: Any) -> None:
        """Keep the actor that follows this trial."""
        self.temporary_state.ray_actor = ray_actor

    def update_last_result(self, result: dict[str, Any]) -> None:
        """Keep the result alone: the means and windows of it that Tune would keep are 13 KiB a trial."""
        self.run_metadata.last_result = result

    @property
    def local_path(self) -> None:
        """None: an error is recorded in the trial's own folder, by its job."""


class SweepSearch(SearchAlgorithm):
    """Gives Tune its trials: so many in all and so many at a time, each at the point that `searcher` suggests."""

    def __init__(self, searcher: Searcher, trials: int, concurrent: int, failure: Failure) -> None:
        self._metric = searcher.metric
        self._searcher, self._trials, self._concurrent, self._failure = searcher, trials, concurrent, failure
        self._suggested = 0
        self._live: set[str] = set()

    def next_trial(self) -> Trial | None:
        """Suggest the next trial; None when none may start now."""
        if self.is_finished() or len(self._live) >= self._concurrent:
            return None
        trial_id = str(self._suggested)
        params: object = self._failure.guard(lambda: self._searcher.suggest(trial_id), None)
        if not isinstance(params, dict):
            self.set_finished()  # type: ignore[no-untyped-call]  # of Ray
            return None
        self._suggested += 1
        self._live.add(trial_id)
        return SweepTrial(trial_id, params)

    def is_finished(self) -> bool:
        """Return whether no further trial will be suggested."""
        return self._finished or self._suggested >= self._trials or self._failure.error is not None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an epoch on to the searcher."""
        self._failure.guard(lambda: self._searcher.on_trial_result(trial_id, result), None)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass a trial's end on to the searcher."""
        self._live.discard(trial_id)
        self._failure.guard(lambda: self._searcher.on_trial_complete(trial_id, result, error), None)


class GuardedScheduler(FIFOScheduler):
    """The scheduler of the spec's early stopping; it stops nothing more once something in the search has failed."""

    def __init__(self, scheduler: TrialScheduler, failure: Failure) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of Ray
        self._scheduler, self._failure = scheduler, failure

    def choose_trial_to_run(self, tune_controller: TuneController) -> None:
        """Leave it to the controller, which starts trials in the order of their suggestion, without a search in all."""

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Pass a new trial on to the scheduler."""
        self._failure.guard(lambda: self._scheduler.on_trial_add(tune_controller, trial), None)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        """Pass a failure on to the scheduler."""
        self._failure.guard(lambda: self._scheduler.on_trial_error(tune_controller, trial), None)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """Return the scheduler's decision on an epoch; CONTINUE once something has failed."""
        decide = partial(self._scheduler.on_trial_result, tune_controller, trial, result)
        return self._failure.guard(decide, TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        """Pass a trial's end on to the scheduler."""
        self._failure.guard(lambda: self._scheduler.on_trial_complete(tune_controller, trial, result), None)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """Pass a trial's removal on to the scheduler."""
        self._failure.guard(lambda: self._scheduler.on_trial_remove(tune_controller, trial), None)


@dataclass
class Decisions:
    """What a scheduler was asked of one config."""

    trial: Trial | None
    """The first of Tune's trials of it; None once that is through."""
    answers: dict[int, str] = field(default_factory=dict)
    """By epochs."""


class OncePerConfig(FIFOScheduler):
    """Asks a scheduler once about each epoch of a config, however often that was suggested.

    All of Tune's trials of a config follow one trial: they get one answer, and count as one where trials are compared.
    """

    def __init__(self, scheduler: TrialScheduler) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of Ray
        self._scheduler = scheduler
        self._decisions: dict[str, Decisions] = {}

    def _decisions_of(self, trial: Trial) -> Decisions:
        actor: Any = trial.temporary_state.ray_actor
        return self._decisions.setdefault(actor.recorded.name, Decisions(trial))

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Pass a new trial on to the scheduler."""
        self._scheduler.on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        """Pass a failure on to the scheduler."""
        self._scheduler.on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """Return the scheduler's decision on this epoch of the config, which is made once."""
        decisions, epoch = self._decisions_of(trial), result["epoch"]
        if epoch not in decisions.answers:
            decisions.answers[epoch] = self._scheduler.on_trial_result(
                tune_controller, decisions.trial or trial, result
            )
        return decisions.answers[epoch]

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        """Pass the end of the config's first trial on to the scheduler."""
        decisions = self._decisions_of(trial)
        if decisions.trial:
            first, decisions.trial = decisions.trial, None
            self._scheduler.on_trial_complete(tune_controller, first, result)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """Pass a trial's removal on to the scheduler."""
        self._scheduler.on_trial_remove(tune_controller, trial)


class Actors:
    """Stands for `RayActorManager`: starts `TuneTrial`s and answers Tune's tasks for them, all in this process.

    A task `train` is answered when the trial has its next epoch. Epochs that are there at the same look are handed on
    in the order in which they were recorded.
    """

    def __init__(self, trials: Trials[Any]) -> None:
        self._trials = trials
        self._live_actors_to_ray_actors_resources: dict[TrackedActor, tuple[TuneTrial, None]] = {}
        self._training: dict[TrackedActor, tuple[Callable[..., None], Callable[..., None]]] = {}
        self._followers: defaultdict[str, set[TrackedActor]] = defaultdict(set)
        self._events: list[tuple[float, int, TrackedActor, Callable[[], None]]] = []  # a heap
        self._order = itertools.count()
        self._ids = itertools.count()

    def next(self, timeout: float | None = None) -> bool:
        """Carry out one event, for which this waits; False when none can come."""
        while not self._events:
            if not self._training:
                return False
            for name in self._trials.wait():
                for actor in list(self._followers.get(name, ())):
                    self._deliver(actor)
        *_, event = heapq.heappop(self._events)
        event()
        return True

    def start(
        self,
        make: Callable[[], TuneTrial],
        on_start: Callable[[TrackedActor], None],
        on_stop: Callable[[TrackedActor], None],
        on_error: Callable[[TrackedActor, Exception], None],
    ) -> TrackedActor:
        """Start what `make` gives, as `RayActorManager.add_actor` starts a process."""
        actor = TrackedActor(next(self._ids), on_start=on_start, on_stop=on_stop, on_error=on_error)
        try:
            trial = make()
        except TrialFailed as error:
            self._schedule_event(AT_ONCE, actor, partial(on_error, actor, error))
        else:
            self._live_actors_to_ray_actors_resources[actor] = trial, None
            self._followers[trial.recorded.name].add(actor)
            self._schedule_event(AT_ONCE, actor, partial(on_start, actor))
        return actor

    def schedule_actor_task(
        self,
        tracked_actor: TrackedActor,
        method_name: str,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        on_result: Callable[..., None] | None = None,
        on_error: Callable[..., None] | None = None,
        _return_future: bool = False,
    ) -> None:
        """Take on the task `train`; `stop` needs no work. Raises ValueError for any other: Tune has none here."""
        if method_name not in ("train", "stop"):
            raise ValueError(f"no actor can {method_name}")
        if method_name == "train":
            assert on_result is not None
            assert on_error is not None
            self._training[tracked_actor] = on_result, on_error
            self._deliver(tracked_actor)

    def remove_actor(self, tracked_actor: TrackedActor, kill: bool = False, stop_future: object = None) -> bool:
        """Forget an actor; whether it lived."""
        live = self._live_actors_to_ray_actors_resources.pop(tracked_actor, None)
        if live is None:
            return False
        name = live[0].recorded.name
        self._followers[name].discard(tracked_actor)
        if not self._followers[name]:
            del self._followers[name]
        if tracked_actor._on_stop:
            self._schedule_event(AT_ONCE, tracked_actor, partial(tracked_actor._on_stop, tracked_actor))
        return True

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:
        """Drop the actor's pending task."""
        self._training.pop(tracked_actor, None)

    def followers(self, name: str) -> int:
        """Count the live actors that follow the trial of this name."""
        return len(self._followers.get(name, ()))

    def is_actor_started(self, tracked_actor: TrackedActor) -> bool:
        """Return whether the actor lives."""
        return tracked_actor in self._live_actors_to_ray_actors_resources

    def is_actor_failed(self, tracked_actor: TrackedActor) -> bool:
        """Return whether the actor does not live."""
        return not self.is_actor_started(tracked_actor)

    @property
    def num_live_actors(self) -> int:
        """The number of live actors."""
        return len(self._live_actors_to_ray_actors_resources)

    @property
    def num_pending_actors(self) -> int:
        """Zero: actors start at once."""
        return 0

    @property
    def num_actor_tasks(self) -> int:
        """The number of actors that wait for their next epoch."""
        return len(self._training)

    def _deliver(self, actor: TrackedActor) -> None:
        """Have Tune told the next epoch of an actor that it lets train, if there is one."""
        if actor not in self._training:
            return
        on_result, on_error = self._training[actor]
        trial, _ = self._live_actors_to_ray_actors_resources[actor]
        try:
            result = trial.next_result()
        except TrialFailed as error:
            self._training.pop(actor)
            self._schedule_event(AT_ONCE, actor, partial(on_error, actor, error))
            return
        if result is not None:
            self._training.pop(actor)
            self._schedule_event(result["time"], actor, partial(on_result, actor, result))

    def _schedule_event(self, time: float, actor: TrackedActor, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), actor, event))


class SweepController(TuneController):
    """Tune's controller over the trials of a spec.

    `failure` is told what ends the search before its time, `tell` of each point at which no trial is possible.
    """

    def __init__(
        self,
        spec: Spec,
        searcher: Searcher,
        scheduler: TrialScheduler,
        trials: Trials[Any],
        failure: Failure,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        actors = Actors(trials)
        super().__init__(
            search_alg=SweepSearch(searcher, spec.number_of_trials(), spec.search.concurrent, failure),
            scheduler=GuardedScheduler(OncePerConfig(scheduler), failure),
            checkpoint_period=10**9,
            callbacks=[GiveUp(trials, actors)],
        )
        self._buffer_length, self._max_pending_trials = 1, 1  # which the user's environment may set otherwise
        self._spec, self._trials_of_sweep, self._failure, self._tell = spec, trials, failure, tell
        self._actor_manager: Actors = actors  # type: ignore[assignment]  # stands for RayActorManager

    def run(self) -> None:
        """Search to the end."""
        while not self.is_finished():  # type: ignore[no-untyped-call]  # of Ray
            self.step()  # type: ignore[no-untyped-call]  # of Ray

    def on_step_begin(self) -> None:
        """Ask nothing of a cluster: there is none of Ray's."""

    def on_step_end(self) -> None:
        """Forget trials that have ended, so that a long sweep takes no more memory and time than a short one."""
        super().on_step_end()  # type: ignore[no-untyped-call]  # of Ray
        ended = self._stopped_trials | self._failed_trials
        if ended:
            self._trials = [trial for trial in self._trials if trial not in ended]
            self._live_trials -= ended
            for forgotten in (self._stopped_trials, self._failed_trials, self._trials_to_cache):
                forgotten.clear()

    def checkpoint(self, force: bool = False, wait: bool = False) -> None:
        """Write nothing: a sweep is resumed from its own files."""

    def _schedule_trial_actor(self, trial: Trial) -> None:
        def make() -> TuneTrial:
            tune_trial = self._failure.guard(lambda: self._make_tune_trial(trial.config), None)
            if tune_trial is None:
                raise TrialFailed("it was not asked for")
            return tune_trial

        actor = self._actor_manager.start(make, self._actor_started, self._actor_stopped, self._actor_failed)
        self._trial_to_actor[trial] = actor
        self._actor_to_trial[actor] = trial

    def _make_tune_trial(self, params: dict[str, Scalar]) -> TuneTrial | None:
        try:
            return TuneTrial(self._spec, params, self._trials_of_sweep)
        except TrialFailed as error:
            self._tell(str(error))
            return None


class GiveUp(Callback):
    """Ends the job of a trial that Tune is through with while it has epochs left.

    A config that was suggested twice is two of Tune's trials and one job, which goes on as long as one of them does.
    """

    def __init__(self, trials: Trials[Any], actors: Actors) -> None:
        self._trials, self._actors = trials, actors

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Give up the trial if no other of Tune's trials follows it."""
        actor: Any = trial.temporary_state.ray_actor
        if actor is not None and actor.unfinished and self._actors.followers(actor.recorded.name) == 1:
            self._trials.give_up(actor.recorded)
