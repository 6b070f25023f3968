"""A prompt along the border of the image: its options."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from lorvp.parts import OneTensorPromptConfig


class BorderConfig(OneTensorPromptConfig):
    """Add a frame along the border of the image (Bahng et al. 2022, padding prompt)."""

    kind: Literal["border"] = "border"
    method = "border"

    pad: PositiveInt = Field(30, description="width in pixels at L = 224; scaled to other sizes")
