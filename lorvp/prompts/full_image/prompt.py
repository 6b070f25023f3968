"""A prompt with a free value for every pixel."""

from __future__ import annotations

import torch
from torch import nn

from lorvp.prompts.base import Prompt, initialise
from lorvp.prompts.full_image.config import FullImageConfig


class FullImagePrompt(Prompt):
    """A free value for every pixel: 3·L·L parameters, the full-rank prompt that LoR-VP is compared with."""

    def __init__(self, config: FullImageConfig, image_size: int) -> None:
        super().__init__(config, image_size)
        self.delta = nn.Parameter(initialise(torch.empty(3, image_size, image_size), config.init, config.init_std))

    def pattern(self) -> torch.Tensor:
        """Return the values themselves: (3, L, L) float32."""
        return self.delta
