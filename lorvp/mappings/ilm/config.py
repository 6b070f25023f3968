"""ILM, a label mapping by frequency that is made anew before each epoch: its options."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorvp.parts import PickingHeadConfig


class IterativeMappingConfig(PickingHeadConfig):
    """Choose source classes by frequency as flm does, again before each epoch (Chen et al. 2023, ILM-VP)."""

    kind: Literal["ilm"] = "ilm"

    counting: Literal["pass", "streamed"] = Field(
        "pass", description="count in a pass over the data before each epoch, or streamed, during the epoch before"
    )
