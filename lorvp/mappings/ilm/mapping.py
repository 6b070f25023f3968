"""ILM: a label mapping by frequency, made anew before each epoch."""

from __future__ import annotations

from lorvp.mappings.base import IndexMapping
from lorvp.mappings.ilm.config import IterativeMappingConfig


class IterativeMapping(IndexMapping):
    """ILM: FLM again before every epoch, with the current prompt (Chen et al. 2023, ILM-VP)."""

    update = "epoch"

    def __init__(self, config: IterativeMappingConfig, source_classes: int, features: int, classes: int) -> None:
        super().__init__(config, source_classes, features, classes)
        self.streamed = config.counting == "streamed"
