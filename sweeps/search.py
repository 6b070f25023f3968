"""Optuna behind Ray Tune: the space as a define-by-run function, an explicit sampler and seed for each algorithm."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from sweeps.spec import Scalar, Spec, active
from sweeps.tune_trial import SCORE


class Suggestions:
    """The points of the space in the order in which they were suggested, a JSON line each.

    It is what a sweep is resumed from: they are suggested again, and the trials' folders answer for what was done.
    """

    def __init__(self, sweep: Path) -> None:
        self.path = sweep / "suggestions.jsonl"

    def read(self) -> list[dict[str, Scalar]]:
        if not self.path.exists():
            return []
        text = self.path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def append(self, params: dict[str, Scalar]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(params) + "\n")


class SpecSearch(OptunaSearch):
    """OptunaSearch over the spec's space, by its algorithm; the points `again` are suggested first."""

    def __init__(self, spec: Spec, again: Sequence[dict[str, Scalar]] = ()) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # a sampler that starts over would suggest its first points a second time
            sampler = make_sampler(spec, spec.search.seed + len(again))
        super().__init__(partial(suggest, spec), SCORE, spec.mode, points_to_evaluate=list(again), sampler=sampler)


class RecordingSearch(SpecSearch):
    """Writes down what it suggests, before anything comes of it."""

    def __init__(self, spec: Spec, suggestions: Suggestions) -> None:
        again = suggestions.read()
        self._suggestions = suggestions
        self._to_repeat = len(again)
        super().__init__(spec, again)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        params = super().suggest(trial_id)
        if self._to_repeat:
            self._to_repeat -= 1
        elif params is not None:
            self._suggestions.append(params)
        return params


class CellSampler(BaseSampler):
    """Trial number n gets cell n of a grid, conditions respected, which Optuna's own GridSampler can't do."""

    def __init__(self, cells: list[dict[str, Scalar]]) -> None:
        self.cells = cells

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.cells[trial.number][param_name]


def make_sampler(spec: Spec, seed: int) -> BaseSampler:
    """The sampler of the spec's algorithm; every option that decides its path is given, whatever Optuna's defaults."""
    match spec.search.algorithm:
        case "grid":
            return CellSampler(spec.cells())
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
        case "tpe":
            startup = min(10, max(2, spec.number_of_trials() // 4))
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True
            )
        case "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed)


def suggest(spec: Spec, trial: Trial) -> dict[str, Scalar]:
    """One point of the space, axes whose condition is not met left out."""
    params: dict[str, Scalar] = {}
    for name, axis in spec.ordered_axes().items():
        if not active(axis, params):
            continue
        if axis.choice is not None:
            params[name] = trial.suggest_categorical(name, axis.choice)
        elif axis.integers is not None:
            low, high, *step = axis.integers
            params[name] = trial.suggest_int(name, low, high, step=step[0] if step else 1)
        else:
            low, high = axis.uniform or axis.log_uniform
            params[name] = trial.suggest_float(name, low, high, log=axis.log_uniform is not None)
    return params


def make_scheduler(spec: Spec) -> TrialScheduler:
    """Tune's early stopping by epochs, on the score."""
    rule = spec.early_stopping
    if rule.rule == "asha":
        return ASHAScheduler(
            time_attr="epoch",
            metric=SCORE,
            mode=spec.mode,
            max_t=spec.max_epochs(),
            grace_period=rule.grace_epochs,
            reduction_factor=rule.reduction_factor,
        )
    if rule.rule == "median":
        return MedianStoppingRule(time_attr="epoch", metric=SCORE, mode=spec.mode, grace_period=rule.grace_epochs)
    return FIFOScheduler()
