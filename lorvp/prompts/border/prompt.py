"""A prompt along the border of the image."""

from __future__ import annotations

import torch
from torch import nn

from lorvp.errors import UserError
from lorvp.prompts.base import Prompt, initialise
from lorvp.prompts.border.config import BorderConfig


class BorderPrompt(Prompt):
    """A frame of width p: 12·p·(L - p) parameters, 69,840 at L = 224 and p = 30 (Bahng et al. 2022, padding prompt)."""

    def __init__(self, config: BorderConfig, image_size: int) -> None:
        super().__init__(config, image_size)
        pad = max(1, round(config.pad * image_size / 224))
        inner = image_size - 2 * pad
        if inner < 1:
            raise UserError(f"prompt.pad {config.pad} leaves nothing of the image: it must be below 112")
        top_bottom, left_right = torch.empty(6, pad, image_size), torch.empty(6, inner, pad)
        self.top_bottom = nn.Parameter(initialise(top_bottom, config.init, config.init_std))
        self.left_right = nn.Parameter(initialise(left_right, config.init, config.init_std))

    def pattern(self) -> torch.Tensor:
        """Return the frame, with zeros in the middle: (3, L, L) float32."""
        top, bottom = self.top_bottom.split(3)
        left, right = self.left_right.split(3)
        hole = left.new_zeros(3, left.shape[1], self.image_size - 2 * left.shape[2])
        return torch.cat([top, torch.cat([left, hole, right], dim=2), bottom], dim=1)
