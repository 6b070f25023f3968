"""RLM, a random label mapping: its options."""

from __future__ import annotations

from typing import Literal

from lorvp.parts import PickingHeadConfig


class RandomMappingConfig(PickingHeadConfig):
    """Read a source class for each class, drawn once with the init seed."""

    kind: Literal["rlm"] = "rlm"
