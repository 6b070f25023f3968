"""MobileNetV1 x0.25, which timm builds and has no name for."""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.efficientnet import EfficientNet, _gen_mobilenet_v1


@register_model
def mobilenetv1_025(pretrained: bool = False, **options: Any) -> EfficientNet:
    """Return the network as its TensorFlow weights, with the batch norm folded in, want it."""
    return _gen_mobilenet_v1("mobilenetv1_100", channel_multiplier=0.25, pad_type="same", bn_eps=1e-3, **options)
