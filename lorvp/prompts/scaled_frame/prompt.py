"""AutoVP's prompt: a frame around an image of learned scale."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from lorvp.prompts.frame.prompt import FramePrompt
from lorvp.prompts.scaled_frame.config import ScaledFrameConfig

SMALLEST, LARGEST = 0.1, 5.0


class ScaledFramePrompt(FramePrompt):
    """ILM-VP's frame around an image whose scale is learned, too (Tsao et al. 2024, IBM/AutoVP, section 3).

    What leaves the frame's sides is cut off. The frame follows the image's size in whole pixels, and has no gradient to
    the scale. Without `learn_scale` the image is resized to its scale once, and keeps it.
    """

    def __init__(self, config: ScaledFrameConfig, image_size: int) -> None:
        super().__init__(config, image_size)
        self.scale = nn.Parameter(torch.tensor(config.scale)) if config.learn_scale else None

    def is_identity_at_init(self) -> bool:
        """Return whether the image keeps its place and size: it has no learned scale, and fills the frame."""
        return super().is_identity_at_init() and self.scale is None

    def pattern(self) -> torch.Tensor:
        """Return the frame around the image at its present scale: (3, L, L) float32."""
        if self.scale is None:
            return super().pattern()
        side = (self.inner * self._scale().detach()).long().clamp(max=self.image_size)
        return self.delta.sigmoid() * self.mask(side)

    def transform_input(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (N, 3, L, L) at the present scale, from (N, 3, side, side)."""
        placed = super().transform_input(images)
        if self.scale is None:
            return placed
        one, none = torch.ones_like(self.scale), torch.zeros_like(self.scale)
        shrink = one / self._scale()  # the grid says where each pixel is taken from
        theta = torch.stack([shrink, none, none, none, shrink, none]).view(1, 2, 3)
        grid = F.affine_grid(theta.expand(placed.shape[0], 2, 3), list(placed.shape), align_corners=True)
        return F.grid_sample(placed, grid, align_corners=True)

    def _scale(self) -> torch.Tensor:
        assert self.scale is not None
        return self.scale.clamp(SMALLEST, LARGEST)
