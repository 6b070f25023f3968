"""No adapter: the backbone stays as it is."""

from __future__ import annotations

from lorvp.methods.base import Method


class NoAdapter(Method):
    """Train a prompt and a head, or a head alone."""
