"""Augment batches of training images, by draws that depend on seed, epoch and position only."""

from __future__ import annotations

import numpy as np
import torch

from lorvp.data.datasets import crop_size
from lorvp.data.resize import resize


def crop_and_flip(images: torch.Tensor, size: int, draws: np.ndarray) -> torch.Tensor:
    """Take a random crop of side `size` from each image and mirror half of them, as published.

    images (n, 3, H, W) uint8 are resized to `crop_size` first; the result is (n, 3, size, size) uint8. `draws` (n, 3)
    from [0, 1) give each crop's row, its column, and whether it is mirrored.
    """
    large = crop_size(size)
    images = resize(images, large)
    places = torch.from_numpy(draws)
    top, left = ((large - size + 1) * places[:, :2]).long().to(images.device).unbind(1)
    along = torch.arange(size, device=images.device)
    columns = torch.where((places[:, 2] < 0.5).to(images.device)[:, None], along, size - 1 - along) + left[:, None]
    rows = along + top[:, None]
    index = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
