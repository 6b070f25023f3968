"""FLM: a label mapping by frequency."""

from __future__ import annotations

from lorvp.mappings.base import IndexMapping


class FrequentMapping(IndexMapping):
    """FLM: by how often the unprompted backbone takes images of a class for each source class."""

    update = "once"
