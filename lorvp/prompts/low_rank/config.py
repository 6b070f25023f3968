"""The low-rank prompt B·A of LoR-VP: its options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from lorvp.parts import Init, OnlyIf, TrainedPromptConfig


class LowRankConfig(TrainedPromptConfig):
    """Add B·A, with B (3, L, rank) and A (3, rank, L) (LoR-VP, section 3)."""

    kind: Literal["low_rank"] = "low_rank"
    method = "lorvp"

    rank: PositiveInt = Field(4, description="rank r of B·A")
    init_b: Init = Field("zero", description="initial values of B")
    init_a: Init = Field("normal", description="initial values of A")
    init_std: Annotated[
        PositiveFloat | None,
        OnlyIf(
            lambda part: {"normal", "uniform"} & {part.init_a, part.init_b},
            "only normal and uniform initial values have a deviation",
            0.01,
        ),
    ] = Field(None, description="deviation of normal initial values, or half the width of uniform ones; default: 0.01")
