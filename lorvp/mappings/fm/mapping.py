"""FM: a linear layer on the source logits."""

from __future__ import annotations

from lorvp.mappings.base import LinearMapping


class FullMapping(LinearMapping):
    """FM: a linear layer on the source logits."""
