from __future__ import annotations

from lorvp.methods import Method


class LinearProbe(Method):
    """No prompt, only a head: the control that a prompt's gain is measured against."""
