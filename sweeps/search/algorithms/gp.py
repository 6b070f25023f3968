"""Gaussian processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sweeps.spec.choices import Algorithm
from sweeps.spec.model import Spec

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class GaussianProcess(Algorithm):
    """Model the objective by a Gaussian process, by Optuna."""

    def start_points(self, spec: Spec) -> int:
        """Return with how many points it starts before it learns from trials."""
        return min(10, max(2, spec.number_of_trials() // 4))

    def make_sampler(self, spec: Spec, seed: int) -> BaseSampler:
        """Make the sampler, with every option given that decides its path."""
        from optuna.samplers import GPSampler

        return GPSampler(seed=seed, n_startup_trials=self.start_points(spec))
