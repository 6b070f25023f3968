"""The median rule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sweeps.spec.choices import StoppingRule
from sweeps.spec.model import Spec

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler


class MedianRule(StoppingRule):
    """End a trial whose best is worse than the median of the others' means (Golovin et al. 2017)."""

    epochs_in_a_second = 10_000  # each decision takes time by the number of trials

    def make_scheduler(self, spec: Spec) -> TrialScheduler:
        """Make Tune's scheduler, by the spec's `early_stopping`."""
        from ray.tune.schedulers import MedianStoppingRule

        from sweeps.search.tune_trial import SCORE

        return MedianStoppingRule(
            time_attr="epoch",
            metric=SCORE,
            mode=spec.mode,
            grace_period=spec.early_stopping.first_decision(spec.max_epochs()),
            min_time_slice=math.inf,  # type: ignore[arg-type]  # else it pauses a trial for one that waits, which takes a checkpoint of Tune's
        )
