"""VQT: query tokens that read every layer of a frozen vision transformer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn
from torch.nn import functional as F

from lorvp.adapters.vpt.adapter import drop, embedded, token_start
from lorvp.adapters.vqt.config import VQTConfig
from lorvp.config import TrialConfig
from lorvp.errors import UserError
from lorvp.methods.base import Method
from lorvp.models.backbone import Backbone, ForwardFeatures
from lorvp.models.speed import ClassTokenBlock

CHOOSING = 1
"""The stage whose head chooses the features."""


class VQT(Method):
    """Visual query tuning (Tu et al. 2023, andytu28/VQT): every layer has queries of its own.

    Queries attend to the keys and values that the layer has anyway and go on through its MLP; nothing of the image
    attends to them, so the backbone's own output stays as it was. It has no gradient, and keeps nothing for one.
    The head reads the class token and each layer's q answers as one vector, each of these of length 1 as in the public
    code: d + layers x q x d features.

    `adapter.keep` selects among them in three stages, as there: VQT; with its queries frozen a new head under a
    penalty; a new head on the features whose weights that left largest.
    """

    def __init__(self, config: TrialConfig, backbone: Backbone, classes: int) -> None:
        model = backbone.model
        if type(model) is not VisionTransformer or not all(
            isinstance(block, ClassTokenBlock) or (type(block) is Block and type(block.attn) is Attention)
            for block in model.blocks
        ):
            raise UserError(f"adapter vqt: {config.backbone.name} is no plain vision transformer")
        super().__init__(config, backbone, classes)
        with self.seeded():
            start = token_start(model, model.embed_dim)
            shape = (len(model.blocks), self.options.count, model.embed_dim)
            self.tokens = nn.Parameter(torch.empty(shape).uniform_(-start, start))
        self.kept: torch.Tensor
        self.register_buffer("kept", torch.ones(self.features()))

    @property
    def options(self) -> VQTConfig:
        """The adapter's part of the config."""
        assert isinstance(self.config.adapter, VQTConfig)
        return self.config.adapter

    def features(self) -> int:
        """Return d + layers x q x d, the number of features that the head reads."""
        model = self.backbone.model
        own, width = super().features(), int(model.embed_dim)
        return own + len(model.blocks) * self.options.count * width

    def backbone_output(
        self, images: torch.Tensor, output: str, forward_features: ForwardFeatures | None = None
    ) -> torch.Tensor:
        """Return the class token and the queries' answers of every layer, each of length 1: (N, features) float32."""
        answers: list[torch.Tensor] = []
        stream = torch.no_grad if self.input_prompt() is None else nullcontext

        def asked(model: Any, x: torch.Tensor) -> torch.Tensor:
            with stream():
                x = embedded(model, x)
            for layer, block in enumerate(model.blocks):
                answers.append(self._answer(layer, block, x))
                with stream():
                    x = block(x)
            tokens: torch.Tensor = model.norm(x)
            return tokens

        own = super().backbone_output(images, output, asked)
        together = [answer.float().flatten(1) for answer in answers]
        return torch.cat([F.normalize(part) for part in (own, *together)], dim=1) * self.kept

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return the queries."""
        return [self.tokens]

    def penalty(self) -> torch.Tensor | None:
        """Return the group lasso on the head's weights, in the stage that chooses features."""
        if self.stage != CHOOSING:
            return None
        assert self.options.group_lasso is not None  # or there were no stages
        norms: torch.Tensor = self.mapping.head.weight.norm(dim=0)
        return self.options.group_lasso * norms.sum()

    def head_input(self, source: torch.Tensor) -> torch.Tensor:
        """Return class tokens (N, d), scaled to length 1."""
        return F.normalize(source)

    def load_head(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Put in a head fitted to the class tokens; its weights for the queries' answers are zero."""
        super().load_head(F.pad(weight, (0, self.features() - weight.shape[1])), bias)

    def start_stage(self, before: Method) -> None:
        """Take the trained queries; after the stage that chooses, keep the features of the largest weights."""
        super().start_stage(before)
        if before.stage == CHOOSING:
            norms = before.mapping.head.weight.detach().norm(dim=0)
            assert self.options.keep is not None  # or there were no stages
            count = max(1, int(self.options.keep * len(norms)))
            self.kept.zero_()[norms.topk(count).indices] = 1

    def _answer(self, layer: int, block: Any, x: torch.Tensor) -> torch.Tensor:
        """Return a layer's answers to its queries, (N, q, d); x (N, tokens, d) is the layer's input."""
        block = block.block if isinstance(block, ClassTokenBlock) else block
        attention = block.attn
        width, heads = attention.attn_dim, (attention.num_heads, attention.head_dim)
        weights = attention.qkv.weight.split([width, 2 * width])
        biases = (None, None) if attention.qkv.bias is None else attention.qkv.bias.split([width, 2 * width])
        key, value = F.linear(block.norm1(x), weights[1], biases[1]).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)
        tokens = drop(self.tokens[layer].expand(x.shape[0], -1, -1), self.options.dropout)
        query = F.linear(block.norm1(tokens), weights[0], biases[0]).unflatten(2, heads).transpose(1, 2)
        seen = F.scaled_dot_product_attention(attention.q_norm(query), attention.k_norm(key), value)
        tokens = tokens + block.ls1(attention.proj(attention.norm(seen.transpose(1, 2).flatten(2))))
        answers: torch.Tensor = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return answers
