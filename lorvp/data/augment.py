"""Augmentation: batches of training images changed at random, by draws that are functions of seed, epoch and place."""

from __future__ import annotations

import numpy as np
import torch

from lorvp.data.datasets import crop_size
from lorvp.data.resize import resize


def crop_and_flip(images: torch.Tensor, size: int, draws: np.ndarray) -> torch.Tensor:
    """Random crops of side `size`, half of them mirrored, as published: resized to `crop_size` first.

    images (n, 3, H, W) uint8 to (n, 3, size, size). `draws` (n, 3) from [0, 1) say where, and whether mirrored.
    """
    large = crop_size(size)
    images = resize(images, large)
    places = torch.from_numpy(draws)
    top, left = ((large - size + 1) * places[:, :2]).long().to(images.device).unbind(1)
    along = torch.arange(size, device=images.device)
    columns = torch.where((places[:, 2] < 0.5).to(images.device)[:, None], along, size - 1 - along) + left[:, None]
    rows = along + top[:, None]
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
