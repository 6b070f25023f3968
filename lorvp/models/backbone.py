"""A timm model, frozen: from images in [0, 1] to features or source logits."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import timm
import torch
from timm.models._hub import load_model_config_from_path
from torch import nn
from torch.nn import functional as F

import lorvp.models.tiny  # noqa: F401  registers our backbones with timm
from lorvp.config import BackboneConfig, SpeedConfig
from lorvp.data.resize import resize
from lorvp.errors import UserError
from lorvp.models import architectures, state_dict, zero_shot
from lorvp.models.speed import FasterAttention, accelerate, attention_says_the_same
from lorvp.utils import plugins

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
    """The frozen model with its input size and statistics, on `device`.

    It stays in eval mode, and nothing in it takes a gradient.
    A model without a classifier has no source classes, and gives features alone. Raises UserError for an unknown name,
    weights that can't be had or don't fit, and a model that gives no features.
    """

    @torch.inference_mode(False)  # whoever makes it, and wherever: its probe takes a gradient
    def __init__(
        self,
        config: BackboneConfig,
        precision: str,
        speed: SpeedConfig | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        self.model: Any = _create(config)  # a timm model
        self.model.requires_grad_(False)
        self.model.eval()
        known: dict[str, Any] = getattr(self.model, "pretrained_cfg", {})
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
        """0 where there is no classifier."""
        if config.zero_shot is not None:
            self.source_classes = zero_shot.add_zero_shot(self.model, config.zero_shot)
        self.digest = hashlib.sha256(repr(sorted(self.fingerprint().items())).encode()).hexdigest()[:16]
        """Which weights these are: one digest of all of them, as they were loaded."""
        speed = speed or SpeedConfig()
        self.to(device)
        self.features: int = _features(config, self.model, self.image_size)
        self._first = accelerate(self.model, speed, self.image_size)
        self._faster_attention = (
            speed.attention_by_products
            and self.dtype == torch.bfloat16
            and torch.device(device).type == "cpu"
            and attention_says_the_same(self.model, self.image_size)
        )
        self._frozen = self.fingerprint()

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode: BatchNorm statistics never move."""
        return super().train(False)

    def prepare(self, images: torch.Tensor, side: int | None = None) -> torch.Tensor:
        """Images of any size, uint8 or float in [0, 1], as (N, 3, side, side) float32 in [0, 1]; default: L.

        Resizing is bilinear with antialias, aspect squashed, and on uint8 where the images are, as published.
        """
        side = side or self.image_size
        if images.dtype == torch.uint8:
            return resize(images, side).float() / 255
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
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
    if config.module is not None:
        plugins.run_file(config.module)
    known = architectures.from_timm(config.name)
    found = architectures.problem_of(config, known)
    if found is not None:
        key, problem = found
        raise UserError(f"{f'backbone.{key}'.rstrip('.')}: {problem}")
    kwargs = dict(config.kwargs)
    own_overlay = kwargs.pop("pretrained_cfg_overlay", {})

    def build(pretrained: bool, pretrained_cfg_overlay: dict[str, Any] | None = None) -> Any:
        overlay = (pretrained_cfg_overlay or {}) | own_overlay
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mapping deprecated model name")
            return timm.create_model(config.name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **kwargs)

    path = config.checkpoint
    if path is not None and not path.is_file():
        raise UserError(f"backbone.checkpoint: no such file {path}")
    try:
        if config.image_size is not None and _has_other_size(known.current(config.name), config.image_size):
            kwargs.setdefault("img_size", config.image_size)  # ViTs build their position embedding for one size
        if path is None or not config.pretrained:
            return build(config.pretrained)
        if path.suffix == ".npz" or own_overlay.get("custom_load"):  # of which timm makes something else
            return build(True, {"file": str(path), "custom_load": path.suffix == ".npz"})
        return state_dict.load(build, path, kwargs.get("num_classes"))
    except UserError:
        raise
    except Exception as error:  # timm, safetensors, torch and the hub each raise their own kinds
        where = " from the weights that timm names (set backbone.checkpoint where there is no internet)"
        where = f" from {path}" if path else where if config.pretrained else ""
        raise UserError(f"backbone {config.name}: can't be built{where}: {_in_a_line(error)}") from error


def _has_other_size(name: str, size: int) -> bool:
    """Whether a model is built for images of one size, and that is another. Raises what timm raises."""
    source, identifier = timm.models.parse_model_name(name)
    if source == "hf-hub":
        values = timm.models.load_model_config_from_hf(identifier)[0]
    elif source:
        values = load_model_config_from_path(identifier)[0]
    else:
        known = timm.get_pretrained_cfg(name)
        values = known.to_dict() if known else {}
    return bool(values.get("fixed_input_size")) and values.get("input_size", [None])[-1] != size


def _in_a_line(error: Exception) -> str:
    """What an exception says: its first line, and where that only leads on to them, the others."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    text = " ".join(lines[:4]) if lines[0].endswith(":") else lines[0]
    return text if len(text) < 400 else f"{text[:400]} ..."


def _features(config: BackboneConfig, model: Any, size: int) -> int:
    """How many features the head reads, by what the model says of an image. Raises UserError where it gives none."""
    image = torch.zeros(1, 3, size, size).to(next(model.parameters()))
    try:
        with torch.no_grad():
            seen = model.forward_head(model.forward_features(image), pre_logits=True)
        shape = list(seen.shape)
    except Exception as error:  # whatever a model raises that is no classifier of images of this size
        raise UserError(
            f"backbone {config.name}: gives no features of images of {size} px: {_in_a_line(error)}"
        ) from error
    if len(shape) != 2:
        raise UserError(f"backbone {config.name}: gives features of shape {shape} for an image, not [1, d]")
    return shape[1]
