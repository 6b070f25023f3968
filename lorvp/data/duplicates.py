"""Find validation images of which nearly the same image is trained on, as the frames of one track are.

Images are compared as grey thumbnails of 16 x 16 pixels without their brightness and contrast. Two are near-duplicates
if the thumbnails' correlation is at least 0.995. Most images have that with themselves after they were saved again as a
JPEG, resized, made brighter, or shifted by a pixel of 224. Next to no different images have it, not even digits
(docs/data.md). A difference hash of 64 or 256 bits takes many of MNIST's digits for duplicates, because most of their
pixels are equally black.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from lorvp.config import DatasetConfig
from lorvp.data import datasets, shuffle, store
from lorvp.data.datasets import FolderImages, Images

SIDE = 16
SAME = 0.995
"""Least correlation of the thumbnails of near-duplicates."""
FILE_SIZE = 64
"""Side to which images that are files are resized when they are read."""
MAX_FILES = 4_000
"""Largest number of files to decode, which takes seconds."""
MAX_BYTES = 1 << 30
"""Largest number of bytes of pixels to read from a store."""
NEIGHBOURS = 2
"""Of a sample: training images before and after each validation image, in the order of their names."""
SHARE, LEAST = 0.01, 5
"""Near-duplicates that are no more than a few: this share of the validation images, or fewer than so many of them."""


@dataclass(frozen=True)
class Duplicates:
    """Hold what was compared, and the near-duplicates among it."""

    pairs: list[tuple[str, str]]
    """Names of each validation image with near-duplicates, and of the training image nearest to it."""
    looked_at: tuple[int, int]
    """Number of validation and of training images that were compared."""
    there: tuple[int, int]
    """Number that the split has."""

    def line(self, config: DatasetConfig) -> str | None:
        """Say in a line that there are more than a few; None if there are not."""
        if len(self.pairs) < max(LEAST, SHARE * self.looked_at[0]):
            return None
        (val, train), side = self.pairs[0], "val" if config.holds_back else "test"
        line = f"{len(self.pairs):,} of {self.looked_at[0]:,} {side} images are near-duplicates of training images"
        if self.looked_at != self.there:
            line += f" ({self.looked_at[1]:,} of {self.there[1]:,} were compared)"
        line += f", as {val} of {train}: {side} may not show the gain"
        return line if config.groups else f"{line}; dataset.groups keeps images that belong together on one side"


def find(config: DatasetConfig) -> Duplicates:
    """Compare the validation images of a dataset with its training images; of a large one, a sample of both.

    Raises UserError as `datasets.load` does.
    """
    splits = datasets.load(config.unaugmented, _size(config), decode=False)
    train, val = splits.train, splits.val
    most = MAX_FILES if _is_encoded(train) else MAX_BYTES // (3 * _size(config) ** 2)
    train_rows, val_rows = np.arange(len(train)), np.arange(len(val))
    train_names, val_names = _names(train), _names(val)
    if len(train) + len(val) > most:
        val_rows = np.sort(shuffle.permutation(len(val), 0)[: max(1, most // (2 * NEIGHBOURS + 1))])
        train_rows = _near_by_name(train_names, val_names[val_rows], most - len(val_rows))
    near = _thumbnails(train, train_rows)
    nearest = [(_thumbnails(val, rows) @ near.T).max(1) for rows in np.array_split(val_rows, len(val_rows) // 512 + 1)]
    correlation, place = torch.cat([n.values for n in nearest]), torch.cat([n.indices for n in nearest])
    found = torch.nonzero(correlation >= SAME)[:, 0].tolist()
    pairs = [(val_names[val_rows[i]], train_names[train_rows[place[i]]]) for i in found]
    return Duplicates(pairs, (len(val_rows), len(train_rows)), (len(val), len(train)))


def _size(config: DatasetConfig) -> int:
    """Return the side of the images to read: that of a store, or a small one."""
    if config.name != "store":
        return FILE_SIZE
    return store.Store.open(config.folder).description.image_size or FILE_SIZE


def _is_encoded(images: Images) -> bool:
    return isinstance(images, FolderImages) or (
        isinstance(images, datasets.StoreImages) and images.split.image_size is None
    )


def _names(images: Images) -> np.ndarray:
    """Return the images' names, or their numbers where they have none."""
    return np.arange(len(images)).astype(str).astype(object) if images.names is None else images.names


def _near_by_name(names: np.ndarray, others: np.ndarray, count: int) -> np.ndarray:
    """Return the rows of the names that are next to `others` in the order of names, and others drawn, sorted.

    What belongs together mostly has names that follow each other.
    """
    order = np.argsort(names.astype(str), kind="stable")
    places = np.searchsorted(names[order].astype(str), others.astype(str))
    around = (places[:, None] + np.arange(-NEIGHBOURS, NEIGHBOURS)).ravel()
    beside = order[np.unique(around.clip(0, len(names) - 1))]
    drawn = np.setdiff1d(shuffle.permutation(len(names), 0), beside, assume_unique=True)
    return np.sort(np.concatenate([beside, drawn])[:count])


def _thumbnails(images: Images, rows: np.ndarray) -> torch.Tensor:
    """Return the thumbnails of the images at `rows`, (len(rows), SIDE²), with mean 0 and length 1; flat ones are 0."""
    parts = []
    for batch in np.array_split(rows, len(rows) // 256 + 1):
        grey = images.read(batch).float().mean(1, keepdim=True)
        small = F.interpolate(grey, (SIDE, SIDE), mode="area").flatten(1)
        small = small - small.mean(1, keepdim=True)
        length = small.norm(dim=1, keepdim=True)
        parts.append(torch.where(length > SIDE, small / length, 0.0))  # a deviation of one level
    return torch.cat(parts)
