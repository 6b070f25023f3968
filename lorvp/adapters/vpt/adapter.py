"""VPT: prompt tokens within a frozen backbone."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer, window_partition, window_reverse
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from lorvp.adapters.vpt.config import VPTConfig
from lorvp.config import TrialConfig
from lorvp.errors import UserError
from lorvp.methods.base import Method
from lorvp.models.backbone import Backbone, ForwardFeatures


class VPT(Method):
    """Visual prompt tuning (Jia et al. 2022, KMnP/vpt): p tokens beside the image's, at the first layer or at each.

    In a vision transformer they stand after the class token, and with `adapter.deep` those of a layer take the place of
    the layer before's: p x d numbers a layer. In Swin they go with every window, and what the windows make of them is
    averaged. A convolutional net has no tokens: its images are padded by p pixels on each side.
    """

    def __init__(self, config: TrialConfig, backbone: Backbone, classes: int) -> None:
        super().__init__(config, backbone, classes)
        model, options = backbone.model, self.options
        self.project: nn.Linear | None = None
        self.pads = not isinstance(model, VisionTransformer | SwinTransformer)
        if self.pads and (self.prompt is not None or options.project):
            raise UserError(f"adapter vpt: {config.backbone.name} has no tokens, vpt pads its images")
        if options.deep and not isinstance(model, VisionTransformer):
            raise UserError(
                f"adapter vpt: {config.backbone.name} is no plain vision transformer; adapter.deep must be false"
            )
        with self.seeded():
            if self.pads:
                side, p = backbone.image_size, options.count
                self.top_bottom = nn.Parameter(torch.rand(2, 3, p, side + 2 * p))
                self.left_right = nn.Parameter(torch.rand(2, 3, side, p))
                return
            width = model.embed_dim
            if options.project:
                self.project = nn.Linear(options.project, width)
                nn.init.kaiming_normal_(self.project.weight, mode="fan_out")
            start = token_start(model, options.project or width)
            layers = len(model.blocks) if options.deep else 1
            self.tokens = nn.Parameter(
                torch.empty(layers, options.count, options.project or width).uniform_(-start, start)
            )

    @property
    def options(self) -> VPTConfig:
        """The adapter's part of the config."""
        assert isinstance(self.config.adapter, VPTConfig)
        return self.config.adapter

    def is_identity_at_init(self) -> bool:
        """Return False: tokens start at random."""
        return False

    def transform_input(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (N, 3, L, L), padded with what is learned where the backbone has no tokens."""
        images = super().transform_input(images)
        if not self.pads:
            return images
        (top, bottom), (left, right) = (
            (part.expand(images.shape[0], *part.shape) for part in pair) for pair in (self.top_bottom, self.left_right)
        )
        return torch.cat([top, torch.cat([left, images, right], dim=3), bottom], dim=2)

    def backbone_output(
        self, images: torch.Tensor, output: str, forward_features: ForwardFeatures | None = None
    ) -> torch.Tensor:
        """Return the backbone's output with the tokens in its layers, as `Method` does."""
        if not self.pads:
            forward_features = self._in_vit if isinstance(self.backbone.model, VisionTransformer) else self._in_swin
        return super().backbone_output(images, output, forward_features)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return the tokens, or the padding, and what projects them."""
        own = [self.top_bottom, self.left_right] if self.pads else [self.tokens]
        return own + (list(self.project.parameters()) if self.project else [])

    def _layer(self, layer: int, images: int) -> torch.Tensor:
        """Return the tokens of a layer for N images: (N, p, d)."""
        tokens = self.tokens[layer]
        if self.project:
            tokens = self.project(tokens)
        return drop(tokens.expand(images, *tokens.shape), self.options.dropout)

    def _in_vit(self, model: Any, x: torch.Tensor) -> torch.Tensor:
        x = embedded(model, x)
        own, count = model.num_prefix_tokens, self.tokens.shape[1]
        for layer, block in enumerate(model.blocks):
            if layer < len(self.tokens):
                rest = x[:, own + count if layer else own :]
                x = torch.cat([x[:, :own], self._layer(layer, x.shape[0]).to(x.dtype), rest], dim=1)
            x = block(x)
        tokens: torch.Tensor = model.norm(torch.cat([x[:, :own], x[:, own + count :]], dim=1))  # no pooling sees ours
        return tokens

    def _in_swin(self, model: Any, x: torch.Tensor) -> torch.Tensor:
        x = model.patch_embed(x)
        tokens = self._layer(0, x.shape[0]).to(x.dtype)
        for stage in model.layers:
            if not isinstance(stage.downsample, nn.Identity):
                x = stage.downsample(x)
                # as published: a token is merged with itself
                tokens = stage.downsample.reduction(stage.downsample.norm(tokens.repeat(1, 1, 4)))
            for block in stage.blocks:
                x, tokens = _swin_block(block, x, tokens)
        features: torch.Tensor = model.norm(x)
        return features


def token_start(model: Any, width: int) -> float:
    """Return the bound of the uniform start of tokens, as published: Xavier's for a patch of pixels and that width."""
    rows, columns = model.patch_embed.patch_size
    return math.sqrt(6 / (3 * rows * columns + width))


def embedded(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the tokens that the first block takes, from normalised images."""
    tokens: torch.Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    return tokens


def drop(tokens: torch.Tensor, share: float) -> torch.Tensor:
    """Drop tokens where gradients are on: methods have no other switch between training and evaluation."""
    return F.dropout(tokens, share, training=torch.is_grad_enabled())


def _swin_block(block: Any, x: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a block of Swin on (N, H, W, C), with tokens (N, p, C) that take part in the attention of every window."""
    n, height, width, channels = x.shape
    count = tokens.shape[1]
    shifts, (rows, columns) = block.shift_size, block.window_size
    y = block.norm1(x)
    if any(shifts):
        y = y.roll((-shifts[0], -shifts[1]), (1, 2))
    y = F.pad(y, (0, 0, 0, -width % columns, 0, -height % rows))
    padded = y.shape[1:3]
    windows = window_partition(y, block.window_size).view(-1, block.window_area, channels)
    each = windows.shape[0] // n
    beside = block.norm1(tokens).repeat_interleave(each, 0)
    seen = _window_attention(block, torch.cat([beside, windows], dim=1), count)
    tokens = tokens + seen[:, :count].unflatten(0, (n, each)).mean(1)
    y = window_reverse(seen[:, count:].reshape(-1, rows, columns, channels), block.window_size, *padded)
    y = y[:, :height, :width]
    if any(shifts):
        y = y.roll(shifts, (1, 2))
    x = x + y
    return x + block.mlp(block.norm2(x)), tokens + block.mlp(block.norm2(tokens))


def _window_attention(block: Any, x: torch.Tensor, count: int) -> torch.Tensor:
    """Attend within windows (windows of all images, p + area, C); tokens have no place, so no bias and no mask."""
    attention = block.attn
    query, key, value = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    bias = F.pad(attention._get_rel_pos_bias(), (count, 0, count, 0))
    if block.attn_mask is not None:
        mask = F.pad(block.attn_mask, (count, 0, count, 0))[:, None]
        bias = (bias + mask).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
    seen = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
    projected: torch.Tensor = attention.proj(seen.transpose(1, 2).flatten(2))
    return projected
