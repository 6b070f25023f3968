"""Resize batches of uint8 images on any device, as PIL does.

The published code resizes each image with PIL: bilinear with antialias, first along the rows, then along the columns,
each pass in fixed point with 22 bits, rounded to uint8. The same arithmetic on a GPU gives the same bits.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

PRECISION_BITS = 22
"""Fraction bits of a weight (Pillow's src/libImaging/Resample.c: 32 bits less 8 for the pixel and 2 for the sum)."""


def resize(images: torch.Tensor, size: int, exact: bool = False) -> torch.Tensor:
    """Resize images (N, C, H, W) uint8 to (N, C, size, size) uint8, ignoring the aspect ratio.

    On GPUs the result for square images equals PIL's bit for bit; for others Pillow may resize the columns first, which
    changes values by 1 level. On the CPU torch's own kernel is used, which is a hundred times faster there: it equals
    PIL's result from 28 and 32 to 224 pixels, and is within 2 levels otherwise. `exact` avoids it.
    """
    if images.shape[-2:] == (size, size):
        return images
    if images.device.type == "cpu" and not exact:
        return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return _pass(_pass(images, size, dim=-1), size, dim=-2)


def _pass(images: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Resize one dimension: each output pixel is the weighted sum of a few neighbours, one tap at a time."""
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
    """Return each output pixel's first input pixel, (size,) int64, and its weights from there, (taps, size) int32."""
    scale = length / size
    support = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), length)
    places = first + np.arange((last - first).max())[:, None]
    # Pillow multiplies by the inverse in place of dividing; the last bit of a weight depends on it
    weights = np.maximum(1 - np.abs((places - centers + 0.5) * (1 / support)), 0) * (places < last)
    fixed = np.floor(weights * (1 / weights.sum(0)) * (1 << PRECISION_BITS) + 0.5).astype(np.int32)
    return torch.from_numpy(first).to(device), torch.from_numpy(fixed).to(device)
