"""Resizing batches of uint8 images, as PIL does it, on whatever device they are.

The published way resizes each image with PIL: bilinear with antialias, first along the rows, then along the columns,
each pass in integers of 22 bits, rounded to uint8. In the same integers a batch on a GPU comes out equal, to the bit.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

PRECISION_BITS = 22
"""Of a weight (Pillow's src/libImaging/Resample.c: 32 bits, without 8 for the pixel and 2 for the sum)."""


def resize(images: torch.Tensor, size: int, exact: bool = False) -> torch.Tensor:
    """(N, C, H, W) uint8 to (N, C, size, size) uint8, aspect squashed.

    On other devices than the CPU square images come out equal to PIL's, bit for bit; of others Pillow may take the
    columns first, which makes 1 level. The CPU takes torch's own kernel, a hundred times faster there, unless `exact`
    is asked for: from 28 and 32 to 224 pixels it is equal, too, else within 2 levels.
    """
    if images.shape[-2:] == (size, size):
        return images
    if images.device.type == "cpu" and not exact:
        return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return _pass(_pass(images, size, dim=-1), size, dim=-2)


def _pass(images: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Resizes one dimension: each output pixel is the weighted sum of a few neighbours, tap by tap."""
    length = images.shape[dim]
    if length == size:
        return images
    first, weights = _taps(length, size, images.device)
    shape = [size if d == images.dim() + dim else 1 for d in range(images.dim())]
    total = torch.full((), 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=images.device)
    for tap, weight in enumerate(weights):
        total = total + images.index_select(dim, (first + tap).clamp(max=length - 1)) * weight.view(shape)
    return (total >> PRECISION_BITS).clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=16)
def _taps(length: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each output pixel the first input pixel, (size,) int64, and the weights from there on, (taps, size) int32."""
    scale = length / size
    support = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), length)
    places = first + np.arange((last - first).max())[:, None]
    # multiplied by the inverse where one would divide, as Pillow does: the last bit of a weight counts
    weights = np.maximum(1 - np.abs((places - centers + 0.5) * (1 / support)), 0) * (places < last)
    fixed = np.floor(weights * (1 / weights.sum(0)) * (1 << PRECISION_BITS) + 0.5).astype(np.int32)
    return torch.from_numpy(first).to(device), torch.from_numpy(fixed).to(device)
