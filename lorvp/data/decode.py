"""Decode image files to pixels as published: RGB, bilinear with antialias, aspect ratio ignored, no crop."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from lorvp.errors import UserError

DEEP = {"I", "I;16", "I;16B", "I;16L", "I;16N"}
"""Modes of 16-bit grey images, which PIL's conversion to RGB would clip to white."""


def transform(size: int) -> str:
    """Describe what `decode` does, with PIL's version, on which its result depends; stores keep this text."""
    return f"PIL {PIL.__version__} bilinear with antialias to {size}x{size}, aspect squashed, uint8"


def decode(file: Path | bytes, size: int, resize: bool = True, name: str = "") -> np.ndarray:
    """Decode an image to (size, size, 3) uint8 RGB: an animation's first frame, EXIF rotation not applied.

    Without `resize` the image must have that size. Raises UserError naming the file, or `name`, if it can't be read.
    """
    try:
        with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as opened:
            image: Image.Image = opened
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 0):
                raise ValueError(f"{image.width} x {image.height} pixels: a decompression bomb")
            if not resize and image.size != (size, size):
                raise ValueError(f"{image.width} x {image.height} pixels, not {size} x {size}")
            if image.mode in DEEP:
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode != "RGB":  # which would only copy it
                image = image.convert("RGB")
            return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR) if resize else image)
    except Exception as error:  # PIL's formats each raise their own kinds
        raise UserError(f"{name or str(file)!r}: not a readable image ({error})") from None


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize pixels (H, W, 3) uint8 to (size, size, 3) as `decode` does."""
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
