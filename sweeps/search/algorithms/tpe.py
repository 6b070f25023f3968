"""TPE, the tree-structured Parzen estimator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sweeps.spec.choices import Algorithm
from sweeps.spec.model import Spec

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class TPE(Algorithm):
    """Model good and bad trials apart, and draw where good ones are likelier (Bergstra et al. 2011), by Optuna."""

    def start_points(self, spec: Spec) -> int:
        """Return with how many points it starts before it learns from trials."""
        return min(10, max(2, spec.number_of_trials() // 4))

    def make_sampler(self, spec: Spec, seed: int) -> BaseSampler:
        """Make the sampler, with every option given that decides its path."""
        from optuna.samplers import TPESampler

        startup = self.start_points(spec)
        return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)
