"""ACAVP's prompt, an affine transformation and a change of colours before what is added: its options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from lorvp.parts import OnlyIf, TrainedPromptConfig, Trial


def _of_affine(default: float) -> OnlyIf:
    return OnlyIf(lambda part: part.affine, "it belongs to affine: true", default)


class AffineColorConfig(TrainedPromptConfig):
    """Move the image, scale its pixel values, and add a prompt (Enomoto 2025, arXiv 2510.07823, s-enmt/ACAVP)."""

    kind: Literal["acavp"] = "acavp"
    method = "acavp"

    affine: bool = Field(True, description="learn scale, rotation, shear and shift of the image")
    color: bool = Field(True, description="learn a factor for each value of the image")
    additive: Literal["padding", "low_rank"] = Field(
        "padding",
        description="what is added. padding: a free value for every pixel that the affine transformation leaves empty, "
        "as published; low_rank: B·A of LoR-VP on the whole image",
    )
    rank: Annotated[
        PositiveInt | None,
        OnlyIf(lambda part: part.additive == "low_rank", "it belongs to additive: low_rank", 4),
    ] = Field(None, description="rank r of B·A; default: 4")
    scale: Annotated[PositiveFloat | None, _of_affine(0.73)] = Field(
        None, description="initial scale of the image, about its upper left corner; default: 0.73"
    )
    max_scale: Annotated[PositiveFloat | None, _of_affine(1.0)] = Field(
        None, description="upper limit of the scale, which is not reached; default: 1"
    )
    max_angle: Annotated[PositiveFloat | None, _of_affine(0.1)] = Field(
        None, description="largest rotation, in radians; default: 0.1"
    )
    max_shear: Annotated[PositiveFloat | None, _of_affine(0.1)] = Field(
        None, description="largest angle of the shear along each axis, in radians; default: 0.1"
    )
    max_shift: Annotated[PositiveFloat | None, _of_affine(0.05)] = Field(
        None, description="largest shift along each axis, as a share of L; default: 0.05"
    )
    max_gain: Annotated[
        Annotated[float, Field(gt=1)] | None, OnlyIf(lambda part: part.color, "it belongs to color: true", 6.0)
    ] = Field(None, description="upper limit of the factors, which start at 1; default: 6")

    def check(self, trial: Trial) -> None:
        """Raise ValueError for a scale that can't be reached, and for transformations without an effect."""
        super().check(trial)
        if self.additive == "padding" and not self.affine:
            raise ValueError(
                "prompt.additive padding fills what the affine transformation leaves empty: prompt.affine must be "
                "true, or prompt.additive low_rank"
            )
        if not self.affine and not self.color:
            raise ValueError("prompt.affine and prompt.color are both false: prompt.kind must be low_rank")
        if self.scale is not None and self.max_scale is not None and self.scale >= self.max_scale:
            raise ValueError(f"prompt.scale ({self.scale:g}) must be below prompt.max_scale ({self.max_scale:g})")
