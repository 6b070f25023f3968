"""Register a ResNet and a vision transformer for 32 px with timm, pretrained on CIFAR-10 by `python -m lorvp.tiny`.

timm knows them as `lorvp_tiny_32.cifar10` and `lorvp_tiny_vit_32.cifar10`, so that the rest of the package treats them
like any other backbone. They have 0.29 and 0.47 M parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.vision_transformer import VisionTransformer

WEIGHTS = Path(__file__).parent / "weights" / "tiny.safetensors"
VIT_WEIGHTS = WEIGHTS.with_stem("tiny_vit")

ARCHITECTURE = ByoModelCfg(
    blocks=(
        ByoBlockCfg(type="basic", d=1, c=64, s=2, gs=0),
        ByoBlockCfg(type="basic", d=1, c=128, s=2, gs=0),
    ),
    stem_type="3x3",
    stem_pool="",
    stem_chs=32,
)

CIFAR10 = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "license": "apache-2.0",
}
default_cfgs = generate_default_cfgs(
    {
        "lorvp_tiny_32.cifar10": CIFAR10
        | {"file": str(WEIGHTS), "pool_size": (4, 4), "first_conv": "stem.conv", "classifier": "head.fc"},
        "lorvp_tiny_vit_32.cifar10": CIFAR10
        | {"file": str(VIT_WEIGHTS), "first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True},
    }
)


@register_model
def lorvp_tiny_32(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """Build a ByobNet of two basic blocks on a strided 3x3 stem: 10 classes, 128 features, input (N, 3, 32, 32)."""
    return build_model_with_cfg(
        ByobNet,
        "lorvp_tiny_32",
        pretrained,
        model_cfg=ARCHITECTURE,
        feature_cfg=dict(flatten_sequential=True),
        **kwargs,
    )


@register_model
def lorvp_tiny_vit_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build a ViT of 4 blocks, width 96, 3 heads and 8 px patches: 10 classes, 96 features, input (N, 3, 32, 32)."""
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
    return build_model_with_cfg(VisionTransformer, "lorvp_tiny_vit_32", pretrained, **shape | kwargs)
