"""ILM: a label mapping by frequency, made anew before each epoch."""

from __future__ import annotations

from lorvp.mappings.base import IndexMapping


class IterativeMapping(IndexMapping):
    """ILM: FLM again before every epoch, with the current prompt (Chen et al. 2023, ILM-VP)."""

    update = "epoch"
