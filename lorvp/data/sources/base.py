"""What a dataset is before it is stored: its images, not yet decoded, with their labels."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np


class Cells(Protocol):
    """Encoded images that lie in tables, not in files of their own."""

    def __getitem__(self, row: int) -> bytes: ...

    def sizes(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Rows:
    """The images of one split: files under `root`, or `cells`, or pixels (N, H, W, 3) uint8.

    labels (N,) int64; names, of files their paths in `root`.
    """

    labels: np.ndarray
    names: list[str]
    root: Path | None = None
    pixels: np.ndarray | None = None
    cells: Cells | None = None
    first: int = 0
    """Where in `cells` these rows begin."""
    left_out: Counter[str] = field(default_factory=Counter)
    """What lies beside them and is none of them, by kind."""

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, row: int) -> bytes:
        """An encoded image. Raises OSError where its file can't be read."""
        if self.cells is not None:
            return self.cells[self.first + row]
        return Path(self.root or "", self.names[row]).read_bytes()

    def part(self, start: int, stop: int) -> Rows:
        """Some of them, to be sent to another process."""
        here = slice(start, stop)
        pixels = None if self.pixels is None else self.pixels[here]
        return replace(self, labels=self.labels[here], names=self.names[here], pixels=pixels, first=self.first + start)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of each image, (N,) int64, as it lies in the source."""
        if self.pixels is not None:
            return np.full(len(self), self.pixels[0].nbytes)
        if self.cells is not None:
            return self.cells.sizes()
        return np.array([_size(os.path.join(self.root or "", name)) for name in self.names])


def _size(path: str) -> int:
    """Of the file, also where `path` is a link to it; 0 where that can't be read, which is told when it is decoded."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


KINDS = 8
"""How many kinds of what was left out are named."""


@dataclass(frozen=True)
class Source:
    class_names: list[str]
    splits: dict[str, Rows]
    native_size: int | None = None
    """Side of the images where all have the same, so that they need not be resized."""
    notes: tuple[str, ...] = ()
    """What whoever asks for it should know, a line each."""
    left_out: Counter[str] = field(default_factory=Counter)
    """What lies beside the splits and is in none, by kind."""
    expected: dict[str, int] | None = None
    """How many classes and images of each split it should have, where that is not the same of all its layouts."""

    def remarks(self, root: Path) -> list[str]:
        """What to say of a source in `root` that was read: its notes, and what was left out."""
        left_out = sum((rows.left_out for rows in self.splits.values()), self.left_out)
        kinds = [f"{count:,} x {kind}" for kind, count in left_out.most_common(KINDS)]
        more = [f"{len(left_out) - KINDS} kinds more"] if len(left_out) > KINDS else []
        return [*self.notes, *([f"{root}: left out: {', '.join(kinds + more)}"] if kinds else [])]
