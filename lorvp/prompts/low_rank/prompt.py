"""The low-rank prompt B·A."""

from __future__ import annotations

import torch
from torch import nn

from lorvp.prompts.base import Prompt, initialise
from lorvp.prompts.low_rank.config import LowRankConfig


class LowRankPrompt(Prompt):
    """B·A with B (3, L, r) and A (3, r, L): 6·L·r parameters, 5,376 at L = 224 and r = 4 (LoR-VP, section 3)."""

    def __init__(self, config: LowRankConfig, image_size: int) -> None:
        super().__init__(config, image_size)
        self.B = nn.Parameter(initialise(torch.empty(3, image_size, config.rank), config.init_b, config.init_std))
        self.A = nn.Parameter(initialise(torch.empty(3, config.rank, image_size), config.init_a, config.init_std))

    def pattern(self) -> torch.Tensor:
        """Return B·A: (3, L, L) float32."""
        return self.B @ self.A
