"""python -m lorvp.tiny --data CIFAR10_FOLDER: pretrains the two backbones of `lorvp/models/tiny.py` on CIFAR-10.

    python -m lorvp.tiny --data CIFAR10_FOLDER                            (train/CLASS/*, test/CLASS/*)
    python -m lorvp.tiny --data CIFAR10_FOLDER --model lorvp_tiny_vit_32 --epochs 10

write `lorvp/models/weights/*.safetensors`, with the command and the accuracy reached in their metadata.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from lorvp.data.datasets import image_folder
from lorvp.models.tiny import VIT_WEIGHTS, WEIGHTS
from lorvp.utils.files import replacing


def read_split(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read `folder`/CLASS/* as images (N, 3, 32, 32) uint8 and class indices (N,) int64."""
    images = image_folder(folder, size=32)
    return images.read(range(len(images))), torch.as_tensor(images.labels)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip half of the batch and shift each image by up to 4 px; (N, 3, 32, 32) uint8 in and out."""
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
    """Train a backbone as the command line says, and write its weights."""
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
        outputs: torch.Tensor = model(((batch / 255 - mean) / std).contiguous(memory_format=torch.channels_last))
        return outputs

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
            torch.autograd.backward(loss)
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
            for x, y in zip(torch.split(test_images, 1000), torch.split(test_labels, 1000), strict=True)
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
