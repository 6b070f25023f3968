"""What label mappings share: each makes downstream logits from a frozen backbone's output.

RLM, FLM and ILM pick one source class for each downstream class; FM and LP learn a linear layer, on the source logits
and on the features. Each is a folder here, found by name (`head.kind`).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import nn

from lorvp.errors import UserError
from lorvp.parts import HeadConfig
from lorvp.utils import plugins


class LabelMapping(nn.Module):
    """Map the backbone's output to downstream logits."""

    update: Literal["never", "once", "epoch"] = "never"
    """When the map is made anew. once: before the first epoch, without the prompt; epoch: before each, with it."""
    streamed = False
    """Whether the counts for the next epoch's map are those of the batches of the epoch under way."""
    index: torch.Tensor
    """The source class of each class, (classes,) int64; of mappings that pick source classes."""
    head: nn.Linear
    """The layer of a mapping that learns."""

    def __init__(self, config: HeadConfig, source_classes: int, features: int, classes: int) -> None:
        super().__init__()
        self.config = config

    @property
    def input(self) -> Literal["logits", "features"]:
        """The output of the backbone that it takes."""
        return self.config.input

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes) from source logits (N, source classes) or features (N, d), all float32."""
        raise NotImplementedError


class IndexMapping(LabelMapping):
    """Read source class `index[j]` for downstream class j; no source class is read twice."""

    def __init__(self, config: HeadConfig, source_classes: int, features: int, classes: int) -> None:
        super().__init__(config, source_classes, features, classes)
        if source_classes < classes:
            raise UserError(
                f"a one-to-one label mapping needs a source class for each of the {classes} classes, and the backbone "
                f"has {source_classes}: head.kind must be lp or fm"
            )
        self.register_buffer("index", torch.randperm(source_classes)[:classes])

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """Return the source logits (N, source classes) of the picked classes: (N, classes)."""
        return source[:, self.index]


class LinearMapping(LabelMapping):
    """Learn a linear layer, `head`, on the source logits or the features."""

    def __init__(self, config: HeadConfig, source_classes: int, features: int, classes: int) -> None:
        super().__init__(config, source_classes, features, classes)
        self.head = nn.Linear(features if self.input == "features" else source_classes, classes)

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes) from source logits (N, source classes) or features (N, d), all float32."""
        logits: torch.Tensor = self.head(source)
        return logits


def make_mapping(config: HeadConfig, source_classes: int, features: int, classes: int) -> LabelMapping:
    """Make the label mapping of a head's options, at its start; random values come from torch's global generator.

    Raises UserError for more classes than source classes where the mapping picks one for each.
    """
    kind: type[LabelMapping] = plugins.load(f"lorvp.mappings.{config.kind}.mapping")
    return kind(config, source_classes, features, classes)


def count(counts: torch.Tensor, top: torch.Tensor, labels: torch.Tensor) -> None:
    """Add images to a count matrix, in place.

    `counts` is (source classes, classes) int32; `top` (n,) is the source class that the backbone predicts for each
    image, `labels` (n,) its class.
    """
    cells = top * counts.shape[1] + labels
    counts.view(-1).scatter_add_(0, cells, torch.ones_like(cells, dtype=counts.dtype))


def greedy_matching(counts: torch.Tensor) -> torch.Tensor:
    """Return the source class of each class, (classes,) int64 on the CPU, from counts (source classes, classes).

    The published algorithm (OPTML-Group/ILM-VP): take the largest count, the first in row-major order on ties, bind
    its row and column, strike both, repeat. Here the counts are sorted once; what has no count is filled in order.
    """
    source_classes, classes = counts.shape
    if source_classes < classes:
        raise ValueError(f"{source_classes} source classes can't be matched one to one with {classes} classes")
    cells = counts.flatten().nonzero().flatten()
    values = counts.flatten()[cells]
    # stable: equal counts stay in row-major order
    in_order = cells[torch.sort(values, descending=True, stable=True).indices].cpu().numpy()
    rows, columns = np.divmod(in_order, classes)
    index = np.full(classes, -1, dtype=np.int64)
    row_free = np.ones(source_classes, dtype=bool)
    step = 4096
    for start in range(0, len(in_order), step):
        r, c = rows[start : start + step], columns[start : start + step]
        open_pairs = row_free[r] & (index[c] < 0)
        for row, column in zip(r[open_pairs].tolist(), c[open_pairs].tolist(), strict=True):
            if row_free[row] and index[column] < 0:
                index[column] = row
                row_free[row] = False
        if (index >= 0).all():
            break
    unbound = np.flatnonzero(index < 0)
    index[unbound] = np.flatnonzero(row_free)[: len(unbound)]
    return torch.from_numpy(index)
