"""TPE, the tree-structured Parzen estimator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sweeps.spec.choices import LearningAlgorithm
from sweeps.spec.model import Spec

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class TPE(LearningAlgorithm):
    """Model good and bad trials apart, and draw where good ones are likelier (Bergstra et al. 2011), by Optuna."""

    def make_sampler(self, spec: Spec, seed: int) -> BaseSampler:
        """Make the sampler, with every option given that decides its path."""
        from optuna.samplers import TPESampler

        startup = self.start_points(spec)
        return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)
