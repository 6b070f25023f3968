"""A prompt along the border of the image: its options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from lorvp.parts import Init, OnlyIf, TrainedPromptConfig


class BorderConfig(TrainedPromptConfig):
    """Add a frame along the border of the image (Bahng et al. 2022, padding prompt)."""

    kind: Literal["border"] = "border"
    method = "border"

    pad: PositiveInt = Field(30, description="width in pixels at L = 224; scaled to other sizes")
    init: Init = Field("zero", description="initial values")
    init_std: Annotated[
        PositiveFloat | None,
        OnlyIf(
            lambda part: part.init in ("normal", "uniform"),
            "only normal and uniform initial values have a deviation",
            0.01,
        ),
    ] = Field(None, description="deviation of normal initial values, or half the width of uniform ones; default: 0.01")
