"""What input prompts share: a pattern that is added to an image in [0, 1] space."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lorvp.parts import PromptConfig
from lorvp.utils import plugins


class Prompt(nn.Module):
    """A trainable (3, L, L) pattern, added to every image before normalisation, without clamping.

    A subclass takes `(config, image_size)`, the options of its kind and L. It draws its start from torch's global
    generator, seeded by the caller, and defines `pattern`.
    """

    def __init__(self, config: PromptConfig, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.side = image_size
        """The side of the images that `transform_input` takes; another than L where an image is shrunk."""

    def pattern(self) -> torch.Tensor:
        """Return what is added to an image: (3, L, L) float32, in units of pixels in [0, 1]."""
        raise NotImplementedError

    def is_identity_at_init(self) -> bool:
        """Return whether the image stays as it is before the first step."""
        return not self.pattern().any()

    def transform_input(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (N, 3, L, L), from (N, 3, side, side), before the pattern is added: here as they are."""
        return images


def make_prompt(config: PromptConfig, image_size: int) -> Prompt:
    """Make the prompt of these options for images of that side, at its start. Raises UserError for one too large."""
    kind: type[Prompt] = plugins.load(f"lorvp.prompts.{config.kind}.prompt")
    return kind(config, image_size)


def initialise(tensor: torch.Tensor, init: str, std: float | None = None) -> torch.Tensor:
    """Fill `tensor` (channels, rows, columns) in place, each channel a matrix with fans of its own.

    `init` is zero, normal (deviation `std`), uniform (in [-std, std]), xavier or kaiming (both uniform; fan_in is the
    number of columns, fan_out of rows); only normal and uniform need `std`. torch's own fans of a 3-D tensor would take
    the channels for outputs and the columns for a receptive field. Raises ValueError for another name.
    """
    fill: dict[str, Callable[[torch.Tensor], object]] = {
        "zero": nn.init.zeros_,
        "normal": lambda matrix: nn.init.normal_(matrix, std=std or 0.0),
        "uniform": lambda matrix: nn.init.uniform_(matrix, -(std or 0.0), std or 0.0),
        "xavier": nn.init.xavier_uniform_,
        "kaiming": nn.init.kaiming_uniform_,
    }
    if init not in fill:
        raise ValueError(f"unknown init {init!r}; one of {', '.join(fill)}")
    for matrix in tensor:
        fill[init](matrix)
    return tensor
