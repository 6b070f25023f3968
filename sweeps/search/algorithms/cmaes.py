"""CMA-ES, an evolution strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sweeps.spec.choices import Algorithm
from sweeps.spec.model import Spec

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class CMAES(Algorithm):
    """Adapt the covariance of a normal distribution (Hansen and Ostermeier 2001), by Optuna."""

    takes_choices = False
    takes_conditions = False

    def make_sampler(self, spec: Spec, seed: int) -> BaseSampler:
        """Make the sampler, with every option given that decides its path."""
        from optuna.samplers import CmaEsSampler

        return CmaEsSampler(seed=seed)
