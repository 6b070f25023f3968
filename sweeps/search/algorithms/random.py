"""Random search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sweeps.spec.choices import Algorithm
from sweeps.spec.model import Spec

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class RandomSearch(Algorithm):
    """Draw each config by itself (Bergstra and Bengio 2012)."""

    def make_sampler(self, spec: Spec, seed: int) -> BaseSampler:
        """Make the sampler, with every option given that decides its path."""
        from optuna.samplers import RandomSampler

        return RandomSampler(seed=seed)
