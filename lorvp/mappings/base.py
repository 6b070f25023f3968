"""What label mappings share: each makes downstream logits from a frozen backbone's output.

RLM, FLM and ILM pick a source class for each downstream class, or several; FM and LP learn a linear layer, on the
source logits and on the features. Each is a folder here, found by name (`head.kind`).
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
    """The source class of each class, (classes,) int64, or its k classes, (classes, k), of mappings that pick some."""
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
    """Read source class `index[j]` for downstream class j, or the mean of several; no source class is read twice.

    The mean of k logits is AutoVP's (Tsao et al. 2024, IBM/AutoVP, `num_source_to_map`). Raises UserError for fewer
    than k source classes for each class.
    """

    def __init__(self, config: HeadConfig, source_classes: int, features: int, classes: int) -> None:
        super().__init__(config, source_classes, features, classes)
        if source_classes < classes:
            raise UserError(
                f"a one-to-one label mapping needs a source class for each of the {classes} classes, and the backbone "
                f"has {source_classes}: head.kind must be lp or fm"
            )
        if source_classes < classes * config.picks:
            raise UserError(
                f"head.sources_per_class {config.picks} needs {classes * config.picks} source classes for the "
                f"{classes} classes, and the backbone has {source_classes}: it must be at most "
                f"{source_classes // classes}"
            )
        drawn = torch.randperm(source_classes)[: classes * config.picks]
        self.register_buffer("index", drawn if config.picks == 1 else drawn.view(classes, config.picks))

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """Return the source logits (N, source classes) of the picked classes, or their means: (N, classes)."""
        picked = source[:, self.index]
        return picked if self.index.dim() == 1 else picked.mean(2)


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


def greedy_matching(counts: torch.Tensor, per_class: int = 1) -> torch.Tensor:
    """Return the source classes of each class, int64 on the CPU, from counts (source classes, classes).

    The published algorithm (OPTML-Group/ILM-VP): take the largest count, the first in row-major order on ties, bind
    its row and column, strike both, repeat. Here the counts are sorted once; what has no count is filled in order. With
    `per_class` above 1 a column is struck when it is bound to so many rows (IBM/AutoVP, `Frequency_mapping_define`).

    The result is (classes,), or (classes, per_class) above 1, with the most frequent first. Raises ValueError for too
    few source classes.
    """
    source_classes, classes = counts.shape
    if source_classes < classes * per_class:
        to = "one to one" if per_class == 1 else f"{per_class} to one"
        raise ValueError(f"{source_classes} source classes can't be matched {to} with {classes} classes")
    cells = counts.flatten().nonzero().flatten()
    values = counts.flatten()[cells]
    # stable: equal counts stay in row-major order
    in_order = cells[torch.sort(values, descending=True, stable=True).indices].cpu().numpy()
    rows, columns = np.divmod(in_order, classes)
    index = np.full((classes, per_class), -1, dtype=np.int64)
    bound = np.zeros(classes, dtype=np.int64)
    row_free = np.ones(source_classes, dtype=bool)
    step = 4096
    for start in range(0, len(in_order), step):
        r, c = rows[start : start + step], columns[start : start + step]
        open_pairs = row_free[r] & (bound[c] < per_class)
        for row, column in zip(r[open_pairs].tolist(), c[open_pairs].tolist(), strict=True):
            if row_free[row] and bound[column] < per_class:
                index[column, bound[column]] = row
                bound[column] += 1
                row_free[row] = False
        if (bound == per_class).all():
            break
    unbound = index < 0
    index[unbound] = np.flatnonzero(row_free)[: unbound.sum()]  # class by class
    return torch.from_numpy(index[:, 0] if per_class == 1 else index)
