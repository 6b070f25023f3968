"""Every cell of a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sweeps.spec.choices import Algorithm
from sweeps.spec.model import Spec

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class Grid(Algorithm):
    """Take every cell of the space once, in a fixed order, conditions respected."""

    takes_every_cell = True

    def make_sampler(self, spec: Spec, seed: int) -> BaseSampler:
        """Make the sampler, with every option given that decides its path."""
        from sweeps.search.cell_sampler import CellSampler

        return CellSampler(spec.cells())
