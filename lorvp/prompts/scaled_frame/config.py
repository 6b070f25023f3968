"""AutoVP's prompt, a frame around an image of learned scale: its options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from lorvp.parts import FramedPromptConfig


class ScaledFrameConfig(FramedPromptConfig):
    """Scale the image and learn the frame around it, and the scale (Tsao et al. 2024, IBM/AutoVP, section 3)."""

    kind: Literal["scaled_frame"] = "scaled_frame"
    method = "autovp"

    inner: PositiveInt = Field(
        128, description="side of the image at scale 1, in pixels at L = 224; scaled to other sizes"
    )
    scale: Annotated[float, Field(ge=0.1, le=5)] = Field(1.0, description="initial scale of the image")
    learn_scale: bool = Field(True, description="learn that scale")

    @property
    def inner_side(self) -> int:
        """Side that an image is shrunk to once, in pixels at L = 224; a learned scale is applied in every step."""
        return min(224, round(self.inner * (1.0 if self.learn_scale else self.scale)))
