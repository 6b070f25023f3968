"""How often early stopping keeps the best of a sweep's trials: their recorded curves, in random orders."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from sweeps.search.stopping import make_scheduler
from sweeps.search.tune_trial import SCORE
from sweeps.spec.model import Scalar, Spec


@dataclass(frozen=True)
class ScoreCurve:
    """A trial as the search saw it."""

    params: dict[str, Scalar]
    """Its values on the axes of the space."""
    scores: list[float]
    """The objective's best value so far after each epoch, as it is: larger is better only in mode max."""


@dataclass(frozen=True)
class Survival:
    """What a stopping rule did to recorded trials, as means over random orders."""

    orders: int
    best: float
    """Fraction of the orders in which the best trial was trained to its end."""
    one_of_two: float
    """The same for at least one of the best two."""
    loss: float
    """How far the best trial that was trained to its end is from the best of all, in the objective's units."""
    cost: float
    """Fraction of the epochs of as many full trials that were trained."""

    def __str__(self) -> str:
        return (
            f"in {self.orders} random orders of these trials it keeps the best one in {100 * self.best:.0f} %, and "
            f"trains {100 * self.cost:.0f} % of the epochs"
        )


@dataclass(eq=False)
class _Replayed:
    """Stands for Tune's trial: a scheduler reads its id and its point."""

    trial_id: str
    config: dict[str, Scalar]
    scores: list[float]
    epochs: int = 0


def survival(spec: Spec, trials: Sequence[ScoreCurve], orders: int, seed: int = 0) -> Survival:
    """Replay `trials` under the spec's early stopping in so many random orders, `search.concurrent` trials at a time.

    An epoch takes each trial the same time. A trial whose curve ends early, as it was stopped in the sweep itself, ends
    there. The best trials are those with the best last score among the longest. Raises ValueError without a trial.
    """
    longest = max(len(trial.scores) for trial in trials)
    total = longest * len(trials)
    sign = 1 if spec.mode == "max" else -1
    final = {i: sign * trial.scores[-1] for i, trial in enumerate(trials) if len(trial.scores) == longest}
    ranking = sorted(final, key=lambda i: -final[i])
    # equal scores are equally good: to keep one of them is to keep the best
    best = {i for i in ranking if final[i] == final[ranking[0]]}
    best_two = best | set(ranking[:2])
    rng = random.Random(seed)
    kept_best = kept_two = 0
    loss = cost = 0.0
    for _ in range(orders):
        kept, epochs = _replay(spec, trials, rng.sample(range(len(trials)), len(trials)))
        kept &= final.keys()
        kept_best += bool(kept & best)
        kept_two += bool(kept & best_two)
        loss += final[ranking[0]] - max((final[i] for i in kept), default=min(final.values()))
        cost += epochs / total
    return Survival(orders, kept_best / orders, kept_two / orders, loss / orders, cost / orders)


def _replay(spec: Spec, trials: Sequence[ScoreCurve], order: list[int]) -> tuple[set[int], int]:
    """Return which of the trials are trained to the end of their curves, and the number of epochs of all."""
    scheduler = make_scheduler(spec)
    waiting = deque(_Replayed(str(i), trials[i].params, trials[i].scores) for i in order)
    running: deque[_Replayed] = deque()
    kept: set[int] = set()
    epochs = 0
    while waiting or running:
        while waiting and len(running) < spec.search.concurrent:
            scheduler.on_trial_add(cast(Any, None), cast(Trial, waiting[0]))
            running.append(waiting.popleft())
        trial = running.popleft()
        trial.epochs += 1
        epochs += 1
        result = {"epoch": trial.epochs, "training_iteration": trial.epochs, SCORE: trial.scores[trial.epochs - 1]}
        if trial.epochs == len(trial.scores):
            scheduler.on_trial_complete(cast(Any, None), cast(Trial, trial), result)
            kept.add(int(trial.trial_id))
        elif scheduler.on_trial_result(cast(Any, None), cast(Trial, trial), result) == TrialScheduler.STOP:
            scheduler.on_trial_remove(cast(Any, None), cast(Trial, trial))
        else:
            running.append(trial)
    return kept, epochs
