"""No early stopping."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sweeps.spec.choices import StoppingRule
from sweeps.spec.model import Spec

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler


class NoStopping(StoppingRule):
    """Let every trial train to its end."""

    stops = False

    def make_scheduler(self, spec: Spec) -> TrialScheduler:
        """Make Tune's scheduler, by the spec's `early_stopping`."""
        from ray.tune.schedulers import FIFOScheduler

        return FIFOScheduler()  # type: ignore[no-untyped-call]  # of Ray
