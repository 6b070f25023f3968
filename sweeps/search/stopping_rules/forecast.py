"""A forecast of where a trial will end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sweeps.spec.choices import StoppingRule
from sweeps.spec.model import Spec

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler


class ForecastRule(StoppingRule):
    """End a trial that can't become the best, even if it improves as much as any trial did from its epoch on.

    Trials that trained to their end say how far the error fell from each epoch to the last. The one whose error fell
    furthest gives the forecast. So a trial that starts slowly goes on where one like it has caught up before.
    """

    def make_scheduler(self, spec: Spec) -> TrialScheduler:
        """Make a scheduler for Tune, by the spec's `early_stopping`."""
        from sweeps.search.forecast import ForecastScheduler

        return ForecastScheduler(
            first_decision=spec.early_stopping.first_decision(spec.max_epochs()),
            epochs=spec.max_epochs(),
            mode=spec.mode,
        )
