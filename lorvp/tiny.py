"""Two backbones for 32 px, pretrained on CIFAR-10 by this file: the quickstart's ResNet, and a vision transformer.

    python -m lorvp.tiny --data CIFAR10_FOLDER                            (train/CLASS/*, test/CLASS/*)
    python -m lorvp.tiny --data CIFAR10_FOLDER --model lorvp_tiny_vit_32 --epochs 10

write `lorvp/weights/*.safetensors`, with the command and the accuracy reached in their metadata. They are registered
with timm as `lorvp_tiny_32.cifar10` and `lorvp_tiny_vit_32.cifar10`, so that nothing else in the package knows that
they are special. They have 0.29 and 0.47 M parameters.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from lorvp.files import replacing

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
    """ByobNet of two basic blocks on a strided 3x3 stem; 10 classes, 128 features, input (N, 3, 32, 32)."""
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
    """Four blocks of width 96 and 3 heads on patches of 8 px; 10 classes, 96 features, input (N, 3, 32, 32)."""
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
    return build_model_with_cfg(VisionTransformer, "lorvp_tiny_vit_32", pretrained, **shape | kwargs)


def read_split(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of `folder`/CLASS/* as (N, 3, 32, 32) uint8, and their class indices as (N,) int64."""
    from lorvp.datasets import image_folder

    images = image_folder(folder, size=32)
    return images.read(range(len(images))), torch.as_tensor(images.labels)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A flip for half of the batch, and one shift of up to 4 px per image; (N, 3, 32, 32) uint8 in and out."""
    n, _, size, _ = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    flip = torch.rand(n, generator=generator) < 0.5
    padded[flip] = padded[flip].flip(-1)
    top, left = torch.randint(0, 9, (2, n), generator=generator)
    rows = top[:, None] + torch.arange(size)
    columns = left[:, None] + torch.arange(size)
    return padded[
        torch.arange(n)[:, None, None, None],
        torch.arange(3)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", type=Path, required=True, help="a folder with train/CLASS/* and test/CLASS/*")
    arguments.add_argument("--model", choices=["lorvp_tiny_32", "lorvp_tiny_vit_32"], default="lorvp_tiny_32")
    arguments.add_argument("--epochs", type=int, default=16)
    options = arguments.parse_args()
    resnet = options.model == "lorvp_tiny_32"
    weights = WEIGHTS if resnet else VIT_WEIGHTS

    batch_size, peak_lr, seed = 256, 0.4 if resnet else 2e-3, 0
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = read_split(options.data / "train")
    test_images, test_labels = read_split(options.data / "test")

    model: Any = timm.create_model(options.model).to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(model.default_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))

    def logits(batch: torch.Tensor) -> torch.Tensor:
        return model(((batch / 255 - mean) / std).contiguous(memory_format=torch.channels_last))

    steps_per_epoch = len(images) // batch_size
    optimizer: torch.optim.Optimizer
    if resnet:
        optimizer = torch.optim.SGD(model.parameters(), lr=peak_lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_lr, total_steps=options.epochs * steps_per_epoch, pct_start=0.2, anneal_strategy="linear"
    )
    for epoch in range(options.epochs):
        start = time.perf_counter()
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps_per_epoch):
            batch = order[step * batch_size : (step + 1) * batch_size]
            loss = F.cross_entropy(logits(augment(images[batch], generator)), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch + 1}/{options.epochs}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )

    # Half precision keeps the file under 1 MB; the accuracy below is that of the weights as they are stored.
    stored = {name: t.half().contiguous() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in stored.items()})
    model.eval()
    with torch.inference_mode():
        hits = sum(
            (logits(x).argmax(1) == y).sum().item()
            for x, y in zip(test_images.split(1000), test_labels.split(1000), strict=True)
        )
    accuracy = 100 * hits / len(test_labels)
    weights.parent.mkdir(exist_ok=True)
    metadata = {
        "command": f"python -m lorvp.tiny --data CIFAR10_FOLDER --model {options.model} --epochs {options.epochs}",
        "cifar10_test_top1": f"{accuracy:.2f}",
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    with replacing(weights) as temporary:
        save_file(stored, temporary, metadata=metadata)
    print(f"CIFAR-10 test top-1 {accuracy:.2f} %, {weights.stat().st_size / 1e6:.2f} MB in {weights}")


if __name__ == "__main__":
    main()
