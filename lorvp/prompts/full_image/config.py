"""A prompt with a free value for every pixel: its options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from lorvp.parts import Init, OnlyIf, TrainedPromptConfig


class FullImageConfig(TrainedPromptConfig):
    """Add a free value for every pixel."""

    kind: Literal["full_image"] = "full_image"
    method = "full_image"

    init: Init = Field("zero", description="initial values")
    init_std: Annotated[
        PositiveFloat | None,
        OnlyIf(
            lambda part: part.init in ("normal", "uniform"),
            "only normal and uniform initial values have a deviation",
            0.01,
        ),
    ] = Field(None, description="deviation of normal initial values, or half the width of uniform ones; default: 0.01")
