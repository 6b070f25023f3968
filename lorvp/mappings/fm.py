"""FM: a linear layer on the source logits."""

from __future__ import annotations

import torch
from torch import nn

from lorvp.mappings.base import LabelMapping


class FullMapping(LabelMapping):
    """FM: a linear layer on the source logits."""

    def __init__(self, source_classes: int, features: int, classes: int) -> None:
        super().__init__(source_classes, features, classes)
        self.head = nn.Linear(source_classes, classes)

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes) from source logits (N, source classes), float32."""
        logits: torch.Tensor = self.head(source)
        return logits
