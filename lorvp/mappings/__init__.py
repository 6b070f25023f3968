"""Label mappings: a file each, found by name (`label_mapping`)."""

from __future__ import annotations

from lorvp.mappings.base import LabelMapping
from lorvp.utils import plugins


def load(name: str) -> type[LabelMapping]:
    """Give the label mapping of that name: rlm, flm, ilm, fm or lp."""
    return plugins.load("mappings", name)
