"""FM, a linear layer on the source logits: its options."""

from __future__ import annotations

from typing import Literal

from lorvp.parts import LearnedHeadConfig


class FullMappingConfig(LearnedHeadConfig):
    """Learn a linear layer on the source logits."""

    kind: Literal["fm"] = "fm"
