"""Wrap a frozen timm model that maps images in [0, 1] to features or source logits."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
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
from lorvp.models.speed import FasterAttention, accelerate, attention_matches
from lorvp.utils import plugins

ForwardFeatures = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""Function of a timm model and normalised images (N, 3, L, L) that returns what the model's head reads."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve a config's precision to fp32, bf16 or fp16.

    `auto` is bf16 on GPUs that support it, and fp16 on others such as the RTX8000 (sm_75). On CPUs it is bf16 with
    AVX512-BF16 or AMX, else fp32. Raises UserError for bf16 on a GPU without it.
    """
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
    """Hold a frozen timm model with its input size and statistics, on `device`.

    The model stays in eval mode, and its parameters have no gradient. A model without a classifier has no source
    classes and returns features only. Raises UserError for an unknown name, for weights that can't be loaded or don't
    fit, and for a model that returns no features.
    """

    @torch.inference_mode(False)  # also within a caller's inference mode: the speed probe needs gradients
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
        weights_from_timm = config.pretrained and config.checkpoint is None
        self.licence: str | None = known.get("license") if weights_from_timm else None
        """Licence of timm's weights, as timm names it; None for other weights."""
        self.hub_id: str | None = known.get("hf_hub_id") if weights_from_timm else None
        self.image_size: int = config.image_size or known["input_size"][-1]
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(config.mean or known["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std or known["std"]).view(3, 1, 1))
        self.source_classes: int = self.model.num_classes
        """Number of source classes; 0 without a classifier."""
        if config.zero_shot is not None:
            self.source_classes = zero_shot.add_zero_shot(self.model, config.zero_shot)
        self.digest = hashlib.sha256(repr(sorted(self.fingerprint().items())).encode()).hexdigest()[:16]
        """Digest of all weights as they were loaded."""
        speed = speed or SpeedConfig()
        self.to(device)
        self.features: int = _count_features(config, self.model, self.image_size)
        self._split_conv = accelerate(self.model, speed, self.image_size)
        self._faster_attention = (
            speed.attention_by_products
            and self.dtype == torch.bfloat16
            and torch.device(device).type == "cpu"
            and attention_matches(self.model, self.image_size)
        )
        self._frozen = self.fingerprint()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode whatever `mode` is, so that BatchNorm statistics never change."""
        return super().train(False)

    def prepare(self, images: torch.Tensor, side: int | None = None) -> torch.Tensor:
        """Resize images (N, 3, H, W), uint8 or float in [0, 1], to (N, 3, side, side) float32 in [0, 1]; default: L.

        Resizing is bilinear with antialias and ignores the aspect ratio. It works on uint8 if the images are uint8, as
        published.
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
        input_prompt: torch.Tensor | None = None,
        forward_features_fn: ForwardFeatures | None = None,
    ) -> torch.Tensor:
        """Map images (N, 3, L, L) around [0, 1] to source `logits` (N, source classes) or `features` (N, d), float32.

        `input_prompt` (3, L, L), in the same units, is added to every image. `forward_features_fn` replaces the model's
        own `forward_features`.
        """
        if input_prompt is not None and self._split_conv is not None:
            self._split_conv.prompt = input_prompt / self.std  # the mean is subtracted from the images
        elif input_prompt is not None:
            images = images + input_prompt
        x = (images - self.mean) / self.std
        try:
            with self.autocast():
                hidden = forward_features_fn(self.model, x) if forward_features_fn else self.model.forward_features(x)
                outputs: torch.Tensor = self.model.forward_head(hidden, pre_logits=output == "features")
                return outputs.float()
        finally:
            if self._split_conv is not None:
                self._split_conv.prompt = None

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Run the block in the backbone's precision, and with the faster attention where it applies."""
        device = self.mean.device.type
        with ExitStack() as stack:
            if self.dtype != torch.float32:
                stack.enter_context(torch.autocast(device, dtype=self.dtype))
            if self._faster_attention and device == "cpu":
                stack.enter_context(FasterAttention())
            yield

    def fingerprint(self) -> dict[str, str]:
        """Return a digest of each parameter and buffer by name."""
        return {
            name: hashlib.blake2b(
                tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), digest_size=8
            ).hexdigest()
            for name, tensor in self.model.state_dict().items()
        }

    def check_unmoved(self) -> None:
        """Raise RuntimeError naming the tensors that have changed since the backbone was made."""
        moved = [name for name, digest in self.fingerprint().items() if self._frozen.get(name) != digest]
        if moved:
            raise RuntimeError(f"the frozen backbone moved during training: {', '.join(moved[:5])}")


def _create(config: BackboneConfig) -> Any:
    if config.module is not None:
        plugins.run_file(config.module)
    registry = architectures.from_timm(config.name)
    problem = architectures.find_backbone_problem(config, registry)
    if problem is not None:
        key, reason = problem
        raise UserError(f"{f'backbone.{key}'.rstrip('.')}: {reason}")
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
        if config.image_size is not None and _has_other_size(registry.current(config.name), config.image_size):
            kwargs.setdefault("img_size", config.image_size)  # ViTs build their position embedding for one size
        if path is None or not config.pretrained:
            return build(config.pretrained)
        if path.suffix == ".npz" or own_overlay.get("custom_load"):  # timm converts these itself
            return build(True, {"file": str(path), "custom_load": path.suffix == ".npz"})
        return state_dict.load(build, path, kwargs.get("num_classes"))
    except UserError:
        raise
    except Exception as error:  # timm, safetensors, torch and the hub each raise their own kinds
        where = " from the weights that timm names (set backbone.checkpoint where there is no internet)"
        where = f" from {path}" if path else where if config.pretrained else ""
        raise UserError(f"backbone {config.name}: can't be built{where}: {_one_line(error)}") from error


def _has_other_size(name: str, size: int) -> bool:
    """Tell whether a model is built for one image size that is not `size`. Raises what timm raises."""
    source, identifier = timm.models.parse_model_name(name)
    if source == "hf-hub":
        values = timm.models.load_model_config_from_hf(identifier)[0]
    elif source:
        values = load_model_config_from_path(identifier)[0]
    else:
        pretrained_cfg = timm.get_pretrained_cfg(name)
        values = (
            {key: value for key, value in asdict(pretrained_cfg).items() if value is not None} if pretrained_cfg else {}
        )
    return bool(values.get("fixed_input_size")) and values.get("input_size", [None])[-1] != size


def _one_line(error: Exception) -> str:
    """Return the first line of an exception's message, or the first four if the first ends with a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    text = " ".join(lines[:4]) if lines[0].endswith(":") else lines[0]
    return text if len(text) < 400 else f"{text[:400]} ..."


def _count_features(config: BackboneConfig, model: Any, size: int) -> int:
    """Return the number of features that the head reads, by running one image. Raises UserError if there are none."""
    image = torch.zeros(1, 3, size, size).to(next(model.parameters()))
    try:
        with torch.no_grad():
            features = model.forward_head(model.forward_features(image), pre_logits=True)
        shape = [int(length) for length in features.shape]
    except Exception as error:  # a model that can't classify images of this size may raise anything
        raise UserError(
            f"backbone {config.name}: gives no features of images of {size} px: {_one_line(error)}"
        ) from error
    if len(shape) != 2:
        raise UserError(f"backbone {config.name}: gives features of shape {shape} for an image, not [1, d]")
    return shape[1]
