"""FLM, a label mapping by frequency: its options."""

from __future__ import annotations

from typing import Literal

from lorvp.parts import PickingHeadConfig


class FrequentMappingConfig(PickingHeadConfig):
    """Read for each class the source class that the unprompted backbone most often takes its images for."""

    kind: Literal["flm"] = "flm"
