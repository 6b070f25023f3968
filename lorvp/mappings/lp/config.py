"""LP, a linear probe, a new head on the features: its options."""

from __future__ import annotations

from typing import Literal

from lorvp.parts import LearnedHeadConfig


class LinearProbeConfig(LearnedHeadConfig):
    """Learn a linear layer on the features."""

    kind: Literal["lp"] = "lp"
    input = "features"
