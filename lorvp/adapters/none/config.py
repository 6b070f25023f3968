"""No adapter: the backbone stays as it is."""

from __future__ import annotations

from typing import Literal

from lorvp.parts import AdapterConfig


class NoAdapterConfig(AdapterConfig):
    """Train nothing within the backbone."""

    kind: Literal["none"] = "none"
    trained = False
