"""Represent a dataset before it is stored: its undecoded images with their labels."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np


class Cells(Protocol):
    """Give access to encoded images that lie in tables, not in files of their own."""

    def __getitem__(self, row: int) -> bytes: ...

    def sizes(self) -> np.ndarray:
        """Return the bytes of each image, (N,) int64."""


@dataclass(frozen=True)
class Rows:
    """Hold the images of one split: files under `root`, or `cells`, or pixels (N, H, W, 3) uint8.

    `labels` are (N,) int64. `names` are, for files, their paths in `root`.
    """

    labels: np.ndarray
    names: list[str]
    root: Path | None = None
    pixels: np.ndarray | None = None
    cells: Cells | None = None
    first: int = 0
    """Row of `cells` where these rows begin."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of other entries beside the images, by kind."""

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, row: int) -> bytes:
        """Read an encoded image. Raises OSError if its file can't be read."""
        if self.cells is not None:
            return self.cells[self.first + row]
        return Path(self.root or "", self.names[row]).read_bytes()

    def part(self, start: int, stop: int) -> Rows:
        """Return the rows from `start` to `stop`, to be sent to another process."""
        here = slice(start, stop)
        pixels = None if self.pixels is None else self.pixels[here]
        return replace(self, labels=self.labels[here], names=self.names[here], pixels=pixels, first=self.first + start)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of each image in the source, (N,) int64."""
        if self.pixels is not None:
            return np.full(len(self), self.pixels[0].nbytes)
        if self.cells is not None:
            return self.cells.sizes()
        return np.array([_size(os.path.join(self.root or "", name)) for name in self.names])


def _size(path: str) -> int:
    """Return the bytes of a file, links followed; 0 if it can't be read, which is reported when it is decoded."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


KINDS = 8
"""Largest number of kinds of left-out entries that are named."""


@dataclass(frozen=True)
class Source:
    """Hold a dataset as it comes: classes, splits, and remarks on what was read."""

    class_names: list[str]
    splits: dict[str, Rows]
    native_size: int | None = None
    """Side of the images in pixels if all have the same, so that they need not be resized."""
    notes: tuple[str, ...] = ()
    """Notes for the user, one line each."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of entries that are in no split, by kind."""
    expected: dict[str, int] | None = None
    """Expected number of classes and of images of each split, if it depends on the layout."""

    def remarks(self, root: Path) -> list[str]:
        """Return the lines to print about a source in `root`: its notes, and what was left out."""
        left_out = sum((rows.left_out for rows in self.splits.values()), self.left_out)
        kinds = [f"{count:,} x {kind}" for kind, count in left_out.most_common(KINDS)]
        more = [f"{len(left_out) - KINDS} kinds more"] if len(left_out) > KINDS else []
        return [*self.notes, *([f"{root}: left out: {', '.join(kinds + more)}"] if kinds else [])]
