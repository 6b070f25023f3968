"""Augment batches of training images, by draws that depend on seed, epoch and position only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lorvp.config import DatasetConfig
from lorvp.data import image_ops, shuffle
from lorvp.data.datasets import crop_size
from lorvp.data.resize import resize

TRIVIAL_AUGMENT, COLOR_JITTER = 1, 2
"""Seeds after the others, so that each augmentation has draws of its own; those of crops have none."""
STRENGTHS = 31
"""Number of strengths that TrivialAugment draws from."""

Operation = Callable[[torch.Tensor, np.ndarray], torch.Tensor]
"""Function from images (n, 3, H, W) uint8 and their strengths (n,) float64 to images."""


def augment(images: torch.Tensor, size: int, config: DatasetConfig, places: np.ndarray, *seeds: int) -> torch.Tensor:
    """Augment images (n, 3, H, W) uint8 as `config` says: crop and flip, then TrivialAugment, then colour jitter.

    Where anything is on, the result is (n, 3, size, size) uint8; otherwise it is the images. `places` (n,) are the
    images' places in the epoch. They and `seeds` determine each image's draws, whatever the batch that it lies in.
    """
    if not config.augments:
        return images
    if config.crop_flip:
        images = crop_and_flip(images, size, shuffle.uniform(places, 3, *seeds))
    images = resize(images, size)
    if config.trivial_augment:
        images = trivial_augment(images, shuffle.uniform(places, 3, *seeds, TRIVIAL_AUGMENT))
    if config.color_jitter is not None:
        images = color_jitter(images, config.color_jitter, shuffle.uniform(places, 8, *seeds, COLOR_JITTER))
    return images


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


def _linspace(first: float, last: float) -> np.ndarray:
    """Return the strengths between two, (STRENGTHS,) float64, rounded to float32 as torchvision has them."""
    return torch.linspace(first, last, STRENGTHS).double().numpy()


TRIVIAL_AUGMENTS: dict[str, tuple[Operation, np.ndarray, bool]] = {
    "Identity": (lambda images, _: images, np.zeros(STRENGTHS), False),
    "ShearX": (image_ops.shear_x, _linspace(0, 0.99), True),
    "ShearY": (image_ops.shear_y, _linspace(0, 0.99), True),
    "TranslateX": (image_ops.translate_x, _linspace(0, 32), True),
    "TranslateY": (image_ops.translate_y, _linspace(0, 32), True),
    "Rotate": (image_ops.rotate, _linspace(0, 135), True),
    "Brightness": (lambda images, by: image_ops.adjust_brightness(images, 1 + by), _linspace(0, 0.99), True),
    "Color": (lambda images, by: image_ops.adjust_saturation(images, 1 + by), _linspace(0, 0.99), True),
    "Contrast": (lambda images, by: image_ops.adjust_contrast(images, 1 + by), _linspace(0, 0.99), True),
    "Sharpness": (lambda images, by: image_ops.adjust_sharpness(images, 1 + by), _linspace(0, 0.99), True),
    "Posterize": (image_ops.posterize, (8 - np.arange(STRENGTHS) / 5).round(), False),
    "Solarize": (lambda images, share: image_ops.solarize(images, 255 * share), _linspace(1, 0), False),
    "AutoContrast": (image_ops.autocontrast, np.zeros(STRENGTHS), False),
    "Equalize": (image_ops.equalize, np.zeros(STRENGTHS), False),
}
"""TrivialAugment's operations, with their strengths and whether their sign is drawn.

They are the wide ones (Müller & Hutter 2021, Table 1), as `torchvision.transforms.v2.TrivialAugmentWide` has them.
Slopes, pixels, degrees, changes of factors, bits and shares of the brightest level.
"""


def trivial_augment(images: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """Apply one of TrivialAugment's operations at one of its strengths to each image (n, 3, H, W) uint8.

    `draws` (n, 3) from [0, 1) give the operation, the strength and the sign.
    """
    operations = (len(TRIVIAL_AUGMENTS) * draws[:, 0]).astype(np.int64)
    levels = (STRENGTHS * draws[:, 1]).astype(np.int64)
    images = images.clone(memory_format=torch.contiguous_format)  # most operations are twice as fast then, on a CPU
    for number, (operation, strengths, signed) in enumerate(TRIVIAL_AUGMENTS.values()):
        values = strengths[levels]
        if signed:
            values = np.where(draws[:, 2] < 0.5, -values, values)
        _change(images, operations == number, operation, values)
    return images


def color_jitter(images: torch.Tensor, strength: float, draws: np.ndarray) -> torch.Tensor:
    """Change brightness, contrast, saturation and hue of images (n, 3, H, W) uint8, each image in its own order.

    The first three change by factors from [1 - strength, 1 + strength], and hue by up to strength / 4 of a circle:
    the proportions of SimCLR (Chen et al. 2020, Appendix A; `color_jitter` in google-research/simclr, whose strength 1
    is 0.8 here). `draws` (n, 8) from [0, 1) give the four changes, and four numbers whose order is that of the changes.
    `torchvision.transforms.v2.ColorJitter` draws the same.
    """
    operations = (
        image_ops.adjust_brightness,
        image_ops.adjust_contrast,
        image_ops.adjust_saturation,
        image_ops.adjust_hue,
    )
    values = np.array([1, 1, 1, 0]) + strength * np.array([1, 1, 1, 0.25]) * (2 * draws[:, :4] - 1)
    order = np.argsort(draws[:, 4:], axis=1, kind="stable")
    images = images.clone(memory_format=torch.contiguous_format)  # most operations are twice as fast then, on a CPU
    for turn in order.T:
        for number, operation in enumerate(operations):
            _change(images, turn == number, operation, values[:, number])
    return images


def _change(images: torch.Tensor, which: np.ndarray, operation: Operation, strengths: np.ndarray) -> None:
    """Apply an operation in place to some of the images, at their own strengths; `which` (n,) says to which."""
    if which.any():
        places = torch.from_numpy(np.flatnonzero(which)).to(images.device)
        images[places] = operation(images.index_select(0, places), strengths[which])
