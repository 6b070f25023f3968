"""Give a CLIP image tower source classes from text embeddings, which `python -m lorvp.clip` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from lorvp.errors import UserError

SCALE = 100.0
"""Factor of the cosine similarities, as published (Radford et al. 2021)."""


class ZeroShot(nn.Module):
    """Map image embeddings (N, d) to logits (N, classes): 100 times the cosine similarity to each class's text."""

    def __init__(self, texts: torch.Tensor) -> None:
        super().__init__()
        self.texts: torch.Tensor
        self.register_buffer("texts", texts)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map image embeddings (N, d) to logits (N, classes)."""
        return SCALE * F.normalize(images, dim=1) @ self.texts.to(images.dtype).T


def add_zero_shot(model: Any, path: Path) -> int:
    """Append the text embeddings of `path` to a timm image tower's projection in place; return the number of classes.

    Raises UserError for a file that `python -m lorvp.clip` did not write, and for embeddings of another width.
    """
    try:
        texts = load_file(path)["texts"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"backbone.zero_shot: {path} is not what `python -m lorvp.clip` writes ({error})") from None
    if texts.shape[1] != model.num_classes:
        width = texts.shape[1]
        raise UserError(
            f"backbone.zero_shot: {path} has texts of width {width}, and the backbone gives {model.num_classes}"
        )
    name = model.pretrained_cfg["classifier"]
    model.set_submodule(name, nn.Sequential(model.get_submodule(name), ZeroShot(texts)))
    return len(texts)
