"""Change batches of uint8 images on any device, each image by a strength of its own.

The operations are those of `torchvision.transforms.v2.functional`, which take one strength for a whole batch. A result
depends on the image and its strength alone, whatever the batch that it lies in. All functions take images (n, 3, H, W)
uint8 and strengths (n,) float64, and return new images of the same shape.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F


def shear_x(images: torch.Tensor, slopes: np.ndarray) -> torch.Tensor:
    """Move each row to the left by its distance from the top edge times the slope."""
    one, zero = np.ones_like(slopes), np.zeros_like(slopes)
    return _warp(images, [[one, slopes, slopes * images.shape[-2] / 2], [zero, one, zero]])


def shear_y(images: torch.Tensor, slopes: np.ndarray) -> torch.Tensor:
    """Move each column upwards by its distance from the left edge times the slope."""
    one, zero = np.ones_like(slopes), np.zeros_like(slopes)
    return _warp(images, [[one, zero, zero], [slopes, one, slopes * images.shape[-1] / 2]])


def translate_x(images: torch.Tensor, pixels: np.ndarray) -> torch.Tensor:
    """Move the images to the right by so many pixels, without their fractions."""
    one, zero = np.ones_like(pixels), np.zeros_like(pixels)
    return _warp(images, [[one, zero, -np.trunc(pixels)], [zero, one, zero]])


def translate_y(images: torch.Tensor, pixels: np.ndarray) -> torch.Tensor:
    """Move the images downwards by so many pixels, without their fractions."""
    one, zero = np.ones_like(pixels), np.zeros_like(pixels)
    return _warp(images, [[one, zero, zero], [zero, one, -np.trunc(pixels)]])


def rotate(images: torch.Tensor, degrees: np.ndarray) -> torch.Tensor:
    """Turn the images around their centres, counterclockwise."""
    cos, sin, zero = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees)), np.zeros_like(degrees)
    return _warp(images, [[cos, -sin, zero], [sin, cos, zero]])


def adjust_brightness(images: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    """Multiply the pixels by the factors."""
    return _to_uint8(images * _per_image(factors, images).float())


def adjust_saturation(images: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    """Move the pixels away from their greys, or towards them: 0 gives greys, 1 the images."""
    return _blend(images, _grey(images), factors)


def adjust_contrast(images: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    """Move the pixels away from the image's mean grey, or towards it: 0 gives that grey, 1 the images."""
    # a sum of integers is the same in any order
    mean = _grey(images).sum((1, 2, 3), keepdim=True, dtype=torch.int64).float() / math.prod(images.shape[-2:])
    return _blend(images, mean, factors)


def adjust_sharpness(images: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    """Move the pixels away from their blurred values, or towards them; those at the edge stay as they are.

    The blur is Pillow's `SMOOTH`: 3 x 3 pixels, of which the middle one has the weight 5.
    """
    pixels = images.short()
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    inner = pixels[..., 1:-1, 1:-1]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    blurred = (2 * total + 13) // 26  # the nearest integer to total / 13
    result = images.clone()
    result[..., 1:-1, 1:-1] = _to_uint8(_multiply_add(blurred - inner, _per_image(1 - factors, images), inner))
    return result


def adjust_hue(images: torch.Tensor, turns: np.ndarray) -> torch.Tensor:
    """Turn the hue by so much of a whole circle, by way of HSV, as torchvision and Pillow compute it."""
    pixels = images.float().mul_(1 / 255)
    value, low = pixels.amax(1), pixels.amin(1)
    span, grey = value - low, value == low
    saturation = span / value.masked_fill(grey, 1)
    red, green, blue = ((value[:, None] - pixels) / span.masked_fill(grey, 1)[:, None]).unbind(1)
    is_red, is_green = value == pixels[:, 0], value == pixels[:, 1]
    sixths = torch.where(is_red, blue - green, torch.where(is_green, red + 2 - blue, green + 4 - red))
    hue = (sixths * (1 / 6) + 1).fmod_(1)
    sixths = (hue + _per_image(turns, images)[:, 0].float()).remainder_(1) * 6
    sector = sixths.floor()
    part, white = saturation * (sixths - sector), 1 - saturation
    levels = torch.stack([value, (1 - part) * value, white * value, (part + white) * value], 1)
    # which of the levels red, green and blue have in each sixth of the circle
    table = torch.tensor([[0, 1, 2, 2, 3, 0], [3, 0, 0, 1, 2, 2], [2, 2, 3, 0, 0, 1]], device=images.device)
    chosen = table[:, sector.long() % 6].transpose(0, 1)
    return _to_uint8(levels.gather(1, chosen) * 255.999)


def posterize(images: torch.Tensor, bits: np.ndarray) -> torch.Tensor:
    """Keep the highest bits of the pixels: so many of 8."""
    return images & _per_image(256 - (1 << (8 - bits.astype(np.int64))), images).to(torch.uint8)


def solarize(images: torch.Tensor, thresholds: np.ndarray) -> torch.Tensor:
    """Invert the pixels that are not below the threshold, which is in 0 to 255."""
    return torch.where(images >= _per_image(thresholds, images).float(), ~images, images)


def autocontrast(images: torch.Tensor, _: np.ndarray) -> torch.Tensor:
    """Stretch each colour to the whole range."""
    result: torch.Tensor = F.autocontrast(images)
    return result


def equalize(images: torch.Tensor, _: np.ndarray) -> torch.Tensor:
    """Make the histogram of each colour as flat as it can be."""
    result: torch.Tensor = F.equalize(images)
    return result


def _warp(images: torch.Tensor, matrices: list[list[np.ndarray]]) -> torch.Tensor:
    """Take each pixel from another place, the nearest pixel there, or black outside.

    `matrices` (2, 3, n) lead from a place in the result, (x, y, 1) from the image's centre, to the place in the image.
    """
    height, width = images.shape[-2:]
    x, y = (torch.arange(side, device=images.device) - (side - 1) / 2 for side in (width, height))
    columns, rows = (
        # in float64, and then in float32, so that what lies between two pixels in theory does so on every device
        (by_x * x.double() + (by_y * y.double()[:, None] + shift) + (side - 1) / 2).float().round().long()
        for side, (by_x, by_y, shift) in (
            (side, [_per_image(entry, images)[:, 0] for entry in row])
            for side, row in zip((width, height), matrices, strict=True)
        )
    )
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    index = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[index, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    return (moved * inside[..., None]).permute(0, 3, 1, 2)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Return the grey levels as torchvision has them, rounded down: (n, 1, H, W) float32."""
    red, green, blue = images.split(1, dim=1)
    grey = _multiply_add(green, torch.tensor(0.587), red * 0.2989)
    return _multiply_add(blue, torch.tensor(0.114), grey).floor()


def _blend(images: torch.Tensor, others: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    own = images * _per_image(factors, images).float()
    return _to_uint8(_multiply_add(others, _per_image(1 - factors, images), own))


def _multiply_add(values: torch.Tensor, factors: torch.Tensor, addends: torch.Tensor) -> torch.Tensor:
    """Return values x factors + addends, rounded once to float32.

    So do torchvision's kernels, on a processor with fused multiply-add. What is an integer in theory then stays one.
    """
    return (values.double().mul_(factors.float()) + addends).float()


def _to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.clamp(0, 255).to(torch.uint8)


def _per_image(values: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """Return one value for each image on their device, (n, 1, 1, 1), in the type of `values`."""
    return torch.from_numpy(values).to(images.device)[:, None, None, None]
