"""ACAVP's prompt: an affine transformation and a change of colours before what is added."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from lorvp.prompts.acavp.config import AffineColorConfig
from lorvp.prompts.base import Prompt
from lorvp.prompts.low_rank.config import LowRankConfig
from lorvp.prompts.low_rank.prompt import LowRankPrompt


class AffineColorPrompt(Prompt):
    """The image moved, each of its values multiplied, and a prompt added (Enomoto 2025, s-enmt/ACAVP).

    Order, limits and initial values are those of the public code. A point p of the image, in shares of L from the upper
    left corner, goes to R·S·H·p + t: shear H, scale S, rotation R, shift t. Its values are taken bilinearly, and are
    zero beyond its sides. Each value is multiplied by a factor of its own, between 0 and a limit. The padding has a
    value for each as well: 6·L·L + 7 parameters, 301,063 at L = 224.

    What is stored of scale, rotation, shear, shift and factors are deviations from the start, before tanh or sigmoid.
    All are zero at the start, so weight decay leads back to it; the public code stores the values themselves, and has
    no weight decay.

    Two things are ours. `additive: low_rank` adds LoR-VP's B·A to the whole image. And the padding lies where the
    transformation takes nothing from the image; in the public code it lies where all images of the batch are black.
    """

    def __init__(self, config: AffineColorConfig, image_size: int) -> None:
        super().__init__(config, image_size)
        self.config = config
        if config.affine:
            self.scale = nn.Parameter(torch.zeros(2))  # along x and y, as each of these pairs
            self.angle = nn.Parameter(torch.zeros(()))
            self.shear = nn.Parameter(torch.zeros(2))
            self.shift = nn.Parameter(torch.zeros(2))
        self.gain = nn.Parameter(torch.zeros(3, image_size, image_size)) if config.color else None
        self.padding: nn.Parameter | None = None
        self.low_rank: LowRankPrompt | None = None
        if config.rank is None:
            self.padding = nn.Parameter(torch.zeros(3, image_size, image_size))
        else:
            self.low_rank = LowRankPrompt(LowRankConfig(rank=config.rank), image_size)

    def is_identity_at_init(self) -> bool:
        """Return whether the image stays in its place at the start, within the rounding of float32."""
        return self.config.scale in (None, 1.0) and super().is_identity_at_init()

    def pattern(self) -> torch.Tensor:
        """Return what is added, for padding at the image's present place: (3, L, L) float32."""
        if self.low_rank is not None:
            return self.low_rank.pattern()
        assert self.padding is not None
        with torch.no_grad():
            image = self._moved(torch.ones_like(self.padding[None, :1]))
        return self.padding * (image[0] == 0)

    def transform_input(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (N, 3, L, L) moved and with other colours, from (N, 3, L, L)."""
        if self.config.affine:
            images = self._moved(images)
        if self.gain is not None:
            images = images * _limited(self.gain, 1.0, self.config.max_gain)
        return images

    def _moved(self, images: torch.Tensor) -> torch.Tensor:
        grid = F.affine_grid(self._inverse()[None], [1, 1, self.image_size, self.image_size], align_corners=False)
        return F.grid_sample(images, grid.expand(images.shape[0], -1, -1, -1), align_corners=False)

    def _inverse(self) -> torch.Tensor:
        """Return where each point's value is taken from: (2, 3), for coordinates in [-1, 1]."""
        config, size = self.config, self.image_size
        assert config.max_angle is not None  # with affine: true, as the next two
        assert config.max_shear is not None
        assert config.max_shift is not None
        angle = self.angle.tanh() * config.max_angle
        along_x, along_y = (self.shear.tanh() * config.max_shear).tan()
        # the public code's shift in pixels is by kornia 0.8 that of an image of L - 1 pixels
        shift = self.shift.tanh() * (2 * config.max_shift * size / (size - 1))
        one = torch.ones_like(angle)
        unsheared = torch.stack([one + along_x * along_y, along_x, along_y, one]).view(2, 2)
        turned_back = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
        matrix = unsheared / _limited(self.scale, config.scale, config.max_scale) @ turned_back
        return torch.cat([matrix, (matrix @ (1 - shift) - 1)[:, None]], dim=1)


def _limited(deviation: torch.Tensor, start: float | None, limit: float | None) -> torch.Tensor:
    """Return values between 0 and the limit, by a sigmoid that gives the start where the deviation is 0."""
    assert start is not None  # with affine or color: true, as the limit
    assert limit is not None
    return limit * (deviation + math.log(start / (limit - start))).sigmoid()
