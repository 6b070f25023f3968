"""ILM-VP's prompt, a frame around the shrunken image: its options."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from lorvp.parts import TrainedPromptConfig


class FrameConfig(TrainedPromptConfig):
    """Shrink the image and learn the frame around it (Chen et al. 2023, OPTML-Group/ILM-VP)."""

    kind: Literal["frame"] = "frame"
    method = "ilm_vp"

    inner: PositiveInt = Field(
        128, description="side of the image within the frame, in pixels at L = 224; scaled to other sizes"
    )

    @property
    def inner_side(self) -> int:
        """Side of the image within the frame, in pixels at L = 224."""
        return self.inner
