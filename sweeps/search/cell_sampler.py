"""A sampler for Optuna that takes the cells of a grid one after another."""

from __future__ import annotations

from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from sweeps.spec.model import Scalar


class CellSampler(BaseSampler):
    """Trial number n gets cell n of a grid, conditions respected, which Optuna's own GridSampler can't do."""

    def __init__(self, cells: list[dict[str, Scalar]]) -> None:
        self.cells = cells

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return no parameters: all are sampled independently."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return no values: all are sampled independently."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the parameter's value in the trial's cell."""
        return self.cells[trial.number][param_name.partition(" [")[0]]  # without the number of a range
