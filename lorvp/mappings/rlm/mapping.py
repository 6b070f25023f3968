"""RLM: a random label mapping."""

from __future__ import annotations

from lorvp.mappings.base import IndexMapping


class RandomMapping(IndexMapping):
    """RLM: drawn once, with the init seed."""
