"""A timm model, frozen: from images in [0, 1] to features or source logits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

import lorvp.tiny  # noqa: F401  registers our backbones with timm
from lorvp import clip
from lorvp.config import BackboneConfig, SpeedConfig
from lorvp.errors import UserError
from lorvp.resize import resize
from lorvp.speed import FasterAttention, accelerate

Through = Callable[[nn.Module, torch.Tensor], torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """fp32, bf16 or fp16. `auto` takes bf16 only where the hardware has it: an RTX8000 (sm_75) gets fp16."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if precision == "bf16" and not has_bf16:
            name = torch.cuda.get_device_name(device)
            raise UserError(f"precision bf16: {name} has no bf16; use fp16 or auto")
        return ("bf16" if has_bf16 else "fp16") if precision == "auto" else precision
    if precision == "auto":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
    return precision


class Backbone(nn.Module):
    """The frozen model with its input size and statistics. It stays in eval mode, and nothing in it takes a gradient.

    Raises UserError for an unknown name, weights that can't be had or don't fit, and a model without a classifier.
    """

    def __init__(self, config: BackboneConfig, precision: str, speed: SpeedConfig | None = None) -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        self.model: Any = _create(config)  # a timm model
        self.model.requires_grad_(False)
        self.model.eval()
        known = self.model.pretrained_cfg
        timms = config.pretrained and config.checkpoint is None
        self.licence: str | None = known.get("license") if timms else None
        """Of the weights, as timm names it; None for others than timm's."""
        self.hub_id: str | None = known.get("hf_hub_id") if timms else None
        self.image_size: int = config.image_size or known["input_size"][-1]
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(config.mean or known["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std or known["std"]).view(3, 1, 1))
        self.source_classes: int = self.model.num_classes
        if config.zero_shot is not None:
            self.source_classes = clip.add_zero_shot(self.model, config.zero_shot)
        self.features: int = self.model.head_hidden_size
        if not self.source_classes:
            raise UserError(f"backbone {config.name} has no classifier, so no source classes to map from")
        self.digest = hashlib.sha256(repr(sorted(self.fingerprint().items())).encode()).hexdigest()[:16]
        """Which weights these are: one digest of all of them, as they were loaded."""
        speed = speed or SpeedConfig()
        self._first = accelerate(self.model, speed, self.image_size)
        self._faster_attention = speed.attention_by_products and self.dtype == torch.bfloat16
        self._frozen = self.fingerprint()

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode: BatchNorm statistics never move."""
        return super().train(False)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Images of any size, uint8 or float in [0, 1], as (N, 3, L, L) float32 in [0, 1].

        Resizing is bilinear with antialias, aspect squashed, and on uint8 where the images are, as published.
        """
        if images.dtype == torch.uint8:
            return resize(images, self.image_size).float() / 255
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return images.float()

    def forward(
        self,
        images: torch.Tensor,
        output: str,
        added: torch.Tensor | None = None,
        through: Through | None = None,
    ) -> torch.Tensor:
        """(N, 3, L, L) around [0, 1] to (N, source classes) `logits` or (N, features) `features`, float32.

        `added` (3, L, L), in the same units, is a prompt that all images get. `through` takes the place of the model's
        own way from normalised images to what its head reads.
        """
        if added is not None and self._first is not None:
            self._first.prompt = added / self.std  # the mean stays on the images' side
        elif added is not None:
            images = images + added
        x = (images - self.mean) / self.std
        try:
            with self.arithmetic():
                seen = through(self.model, x) if through else self.model.forward_features(x)
                return self.model.forward_head(seen, pre_logits=output == "features").float()
        finally:
            if self._first is not None:
                self._first.prompt = None

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """In which the model's forward computes in the precision."""
        device = self.mean.device.type
        with ExitStack() as stack:
            if self.dtype != torch.float32:
                stack.enter_context(torch.autocast(device, dtype=self.dtype))
            if self._faster_attention and device == "cpu":
                stack.enter_context(FasterAttention())
            yield

    def fingerprint(self) -> dict[str, str]:
        """A digest of each parameter and buffer, by name."""
        return {
            name: hashlib.blake2b(
                tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), digest_size=8
            ).hexdigest()
            for name, tensor in self.model.state_dict().items()
        }

    def check_unmoved(self) -> None:
        """Raises RuntimeError naming the tensors that are not as they were when the backbone was made."""
        moved = [name for name, digest in self.fingerprint().items() if self._frozen.get(name) != digest]
        if moved:
            raise RuntimeError(f"the frozen backbone moved during training: {', '.join(moved[:5])}")


def _create(config: BackboneConfig) -> Any:
    if not timm.is_model(config.name.split(".")[0]):
        close = timm.list_models(f"*{config.name.split('.')[0].split('_')[0]}*")[:5]
        raise UserError(
            f"backbone.name: timm has no model {config.name!r}" + (f"; near: {', '.join(close)}" if close else "")
        )
    kwargs = dict(config.kwargs)
    if config.checkpoint is not None:
        if not config.checkpoint.is_file():
            raise UserError(f"backbone.checkpoint: no such file {config.checkpoint}")
        kwargs["pretrained_cfg_overlay"] = {"file": str(config.checkpoint)} | kwargs.get("pretrained_cfg_overlay", {})
    known = timm.get_pretrained_cfg(config.name, allow_unregistered=False)
    if known and known.fixed_input_size and config.image_size not in (None, known.input_size[-1]):
        kwargs.setdefault("img_size", config.image_size)  # ViTs build their position embedding for one size
    try:
        return timm.create_model(config.name, pretrained=config.pretrained, **kwargs)
    except Exception as error:  # timm, safetensors, torch and the hub each raise their own kinds
        where = config.checkpoint or "the weights that timm names (set backbone.checkpoint where there is no internet)"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"backbone {config.name}: can't be built from {where}: {reason}") from error
