"""Corrupt test images as they are read, by four of ImageNet-C's corruptions (Hendrycks & Dietterich 2019).

Strengths 1, 2 and 3 have the parameters of its severities 1, 3 and 5, as its authors' code has them for CIFAR-10-C at
32 px, Tiny-ImageNet-C at 64 px and ImageNet-C at 224 px (`create_c/make_*_c.py` in hendrycks/robustness). Images of
another size use those of the nearest of the three sizes, by ratio; the width of a blur is scaled with the side. Unlike
ImageNet-C's files, the corrupted images are not compressed as JPEG afterwards.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

Parameters = tuple[float, float, float]
"""Parameter of strengths 1, 2 and 3."""
PARAMETERS: dict[int, dict[str, Parameters]] = {
    32: {"blur": (0.4, 0.7, 1), "noise": (0.04, 0.08, 0.1), "jpeg": (80, 58, 40), "contrast": (0.75, 0.4, 0.15)},
    64: {"blur": (0.5, 1, 1.5), "noise": (0.04, 0.12, 0.18), "jpeg": (65, 50, 25), "contrast": (0.4, 0.2, 0.05)},
    224: {"blur": (1, 3, 6), "noise": (0.08, 0.18, 0.38), "jpeg": (25, 15, 7), "contrast": (0.4, 0.2, 0.05)},
}
"""Parameters by the images' side in pixels: the Gaussian's deviation of blur (in pixels) and of noise (for pixels in
[0, 1]), JPEG's quality, and the factor of the contrast."""
KINDS = tuple(PARAMETERS[224])

_workers = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="corrupt")


@dataclass(frozen=True)
class Corruption:
    """Corrupt images by one kind (blur, noise, jpeg or contrast) at one strength."""

    kind: str
    strength: int
    """1, 2 or 3."""

    def __call__(self, images: torch.Tensor, places: Sequence[int], seed: int = 0) -> torch.Tensor:
        """Corrupt images (N, 3, H, W) uint8; the result has the same shape, dtype and device.

        `places` (N,) are the images' positions in the dataset. Together with `seed` they determine each image's noise,
        whatever its batch and the model.
        """
        parameter = self.parameter(images.shape[-1])
        if self.kind == "jpeg":
            return jpeg(images, int(parameter))
        pixels = images.float() / 255
        if self.kind == "blur":
            pixels = blur(pixels, parameter)
        elif self.kind == "noise":
            pixels = pixels + parameter * noise(pixels.shape[1:], places, seed).to(images.device)
        else:
            mean = pixels.mean((2, 3), keepdim=True)
            pixels = mean + parameter * (pixels - mean)
        return (255 * pixels.clamp(0, 1)).round().byte()

    def parameter(self, side: int) -> float:
        """Return the parameter for images of that side in pixels."""
        known = min(PARAMETERS, key=lambda size: abs(math.log(size / side)))
        parameter = PARAMETERS[known][self.kind][self.strength - 1]
        return parameter * side / known if self.kind == "blur" else parameter


CORRUPTIONS = [Corruption(kind, strength) for kind in KINDS for strength in (1, 2, 3)]


def blur(pixels: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur images (N, 3, H, W) float32 by a Gaussian cut off at 4 sigma; edge pixels are repeated outwards."""
    radius = int(4 * sigma + 0.5)
    width = 2 * radius + 1
    padded = F.pad(pixels, [radius] * 4, mode="replicate")  # gaussian_blur itself would mirror them
    rows = gaussian_blur(padded, [width, 1], [sigma, sigma])  # each direction by itself: width steps, not its square
    blurred: torch.Tensor = gaussian_blur(rows, [1, width], [sigma, sigma])
    return blurred[..., radius : radius + pixels.shape[-2], radius : radius + pixels.shape[-1]]


def noise(shape: Sequence[int], places: Sequence[int], seed: int) -> torch.Tensor:
    """Draw standard normal noise for each place by itself: (len(places), *shape) float32."""

    def draw(place: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[seed, place])).standard_normal(shape, dtype=np.float32)

    return torch.from_numpy(np.stack(list(_workers.map(draw, places))))


def jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    """Encode images (N, 3, H, W) uint8 as JPEG of this quality with PIL and decode them again."""

    def encode_and_decode(pixels: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return (
        torch.from_numpy(np.stack(list(_workers.map(encode_and_decode, pixels)))).permute(0, 3, 1, 2).to(images.device)
    )
