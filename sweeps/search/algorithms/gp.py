"""Gaussian processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sweeps.spec.choices import LearningAlgorithm
from sweeps.spec.model import Spec

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class GaussianProcess(LearningAlgorithm):
    """Model the objective by a Gaussian process, by Optuna."""

    def make_sampler(self, spec: Spec, seed: int) -> BaseSampler:
        """Make the sampler, with every option given that decides its path."""
        from optuna.samplers import GPSampler

        return GPSampler(seed=seed, n_startup_trials=self.start_points(spec))
