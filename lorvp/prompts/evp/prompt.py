"""EVP's prompt: an added frame around the shrunken image."""

from __future__ import annotations

import torch

from lorvp.prompts.frame.prompt import FramePrompt


class EnhancedPrompt(FramePrompt):
    """Free values around the shrunken image, zero at the start (Wu et al. 2022, arXiv 2212.10556, UCSC-VLAA/EVP).

    No pixel of the image is covered. In ILM-VP's frame the values are those of a sigmoid, grey at the start; here they
    are delta itself, without a limit. All of delta (3, L, L) is stored, as published, and 3 (L² - inner²) of it show:
    69,840 at L = 224 and inner 164. EVP's normalised gradient is `prompt.normalize_grad`.
    """

    def pattern(self) -> torch.Tensor:
        """Return the frame, with zeros where the image lies: (3, L, L) float32."""
        return self.delta * self.mask(self.inner)
