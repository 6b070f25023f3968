"""LP: a linear probe, a new head on the features."""

from __future__ import annotations

import torch
from torch import nn

from lorvp.mappings.base import LabelMapping


class LinearProbing(LabelMapping):
    """LP: a new head on the features."""

    input = "features"

    def __init__(self, source_classes: int, features: int, classes: int) -> None:
        super().__init__(source_classes, features, classes)
        self.head = nn.Linear(features, classes)

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes) from features (N, d), float32."""
        logits: torch.Tensor = self.head(source)
        return logits
