"""What search algorithms and stopping rules share; each is a file in `sweeps/search`, found by its name.

Their files import Optuna and Ray where they make a sampler or a scheduler, as specs are checked without these.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, ClassVar

from lorvp.utils import plugins
from sweeps.spec.model import ALGORITHMS, RULES, EarlyStopping, SearchConfig, Spec

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from ray.tune.schedulers import TrialScheduler


class Algorithm:
    """One way to choose configs. A subclass is the only public class of a file in `sweeps/search/algorithms`."""

    takes_every_cell: ClassVar[bool] = False
    """Whether it takes every cell of the space, so that each axis must be a list and the space says how many trials."""
    takes_choices: ClassVar[bool] = True
    """Whether an axis may be a choice."""
    takes_conditions: ClassVar[bool] = True
    """Whether an axis may exist under a condition."""

    def start_points(self, spec: Spec) -> int:
        """Return with how many points it starts before it learns from trials; these are spread over the space."""
        return 0

    def make_sampler(self, spec: Spec, seed: int) -> BaseSampler:
        """Make Optuna's sampler, with every option given that decides its path."""
        raise NotImplementedError


class LearningAlgorithm(Algorithm):
    """An algorithm that models what trials came to, once it has some."""

    def start_points(self, spec: Spec) -> int:
        """Return with how many points it starts before it learns from trials."""
        return min(10, max(2, spec.number_of_trials() // 4))


class StoppingRule:
    """One rule by which trials are given up, by epochs and on the score.

    A subclass is the only public class of a file in `sweeps/search/stopping_rules`.
    """

    stops: ClassVar[bool] = True
    """Whether it ever ends a trial."""
    epochs_in_a_second: ClassVar[int] = 100_000
    """About so many epochs of recorded trials are replayed under it in a second or two."""

    def make_scheduler(self, spec: Spec) -> TrialScheduler:
        """Make Tune's scheduler, by the spec's `early_stopping`."""
        raise NotImplementedError

    def decision_epochs(self, options: EarlyStopping, epochs: int) -> set[int]:
        """Return the epochs, of that many, after which it decides; none for a rule that decides after each."""
        return set()


def algorithm(search: SearchConfig) -> Algorithm:
    """Return the algorithm of that name."""
    found: Algorithm = plugins.load(f"{ALGORITHMS}.{search.algorithm}")()
    return found


def stopping_rule(options: EarlyStopping) -> StoppingRule:
    """Return the rule of that name."""
    found: StoppingRule = plugins.load(f"{RULES}.{options.rule}")()
    return found


def milestones(spec: Spec) -> list[int]:
    """Return the epochs after which a trial may be given up for the others' sake, or goes on at another rung."""
    options = spec.early_stopping
    rungs = set(itertools.accumulate(rung.epochs for rung in spec.trial_config(spec.example()).rungs))
    return sorted(rungs | stopping_rule(options).decision_epochs(options, spec.max_epochs()))
