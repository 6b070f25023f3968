"""ASHA, successive halving without waiting."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from sweeps.spec.choices import StoppingRule
from sweeps.spec.model import EarlyStopping, Spec

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler


class ASHA(StoppingRule):
    """Let one trial in `reduction_factor` go on at each rung (Li et al. 2020)."""

    def make_scheduler(self, spec: Spec) -> TrialScheduler:
        """Make Tune's scheduler, by the spec's `early_stopping`."""
        from ray.tune.schedulers import ASHAScheduler

        from sweeps.search.tune_trial import SCORE

        return ASHAScheduler(
            time_attr="epoch",
            metric=SCORE,
            mode=spec.mode,
            max_t=spec.max_epochs(),
            grace_period=spec.early_stopping.first_decision(spec.max_epochs()),
            reduction_factor=spec.early_stopping.reduction_factor,
        )

    def decision_epochs(self, options: EarlyStopping, epochs: int) -> set[int]:
        """Return the epochs of its rungs."""
        rungs = (options.first_decision(epochs) * options.reduction_factor**k for k in itertools.count())
        return set(itertools.takewhile(lambda epoch: epoch < epochs, rungs))
