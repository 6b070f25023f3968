"""ILM-VP's prompt: a frame around the shrunken image."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from lorvp.errors import UserError
from lorvp.parts import FramedPromptConfig
from lorvp.prompts.base import Prompt


class FramePrompt(Prompt):
    """Padding around the shrunken image (Chen et al. 2023, OPTML-Group/ILM-VP).

    It is sigmoid(delta), with delta (3, L, L) zero at the start, which is grey. An image is resized once, to its size
    within the frame; one of that size goes in as it is, as published. All of delta is stored, as published, and
    3 (L² - inner²) of it show: 147,456 around CIFAR's 32 pixels at L = 224.

    Raises UserError for an image that is larger than its frame.
    """

    def __init__(self, config: FramedPromptConfig, image_size: int) -> None:
        super().__init__(config, image_size)
        self.inner = max(1, round(config.inner_side * image_size / 224))
        if self.inner > image_size:
            raise UserError(f"prompt.inner {config.inner_side}: the image inside must not be larger than 224")
        self.side = self.inner
        self.delta = nn.Parameter(torch.zeros(3, image_size, image_size))

    def is_identity_at_init(self) -> bool:
        """Return whether the image fills the whole frame."""
        return self.inner == self.image_size

    def pattern(self) -> torch.Tensor:
        """Return the frame, with zeros where the image lies: (3, L, L) float32."""
        return self.delta.sigmoid() * self.mask(self.inner)

    def transform_input(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (N, 3, L, L) with margins of zeros, from (N, 3, inner, inner)."""
        return F.pad(images, self._margins(self.inner))

    def mask(self, inner: int | torch.Tensor) -> torch.Tensor:
        """Return 1 around an image of that side, 0 where it lies: (L, L)."""
        pixels = torch.arange(self.image_size, device=self.delta.device)
        start = (self.image_size - inner + 1) // 2
        inside = (pixels >= start) & (pixels < start + inner)
        return (~(inside[:, None] & inside)).to(self.delta.dtype)

    def _margins(self, inner: int) -> tuple[int, int, int, int]:
        rest = self.image_size - inner
        return ((rest + 1) // 2, rest // 2, (rest + 1) // 2, rest // 2)
