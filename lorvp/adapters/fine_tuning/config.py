"""Fine-tuning, the backbone itself is trained: its options."""

from __future__ import annotations

from typing import Literal

from lorvp.parts import AdapterConfig, TrainedByOptimizer


class FineTuningConfig(AdapterConfig, TrainedByOptimizer):
    """Train all of the backbone's weights; with a fitted head it is LP-FT (Kumar et al. 2022)."""

    kind: Literal["fine_tuning"] = "fine_tuning"
    method = "fine_tuning"
    trains_backbone = True
