"""LP: a linear probe, a new head on the features."""

from __future__ import annotations

from lorvp.mappings.base import LinearMapping


class LinearProbing(LinearMapping):
    """LP: a new head on the features."""
