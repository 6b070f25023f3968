"""Reimplement the public code's trial from its description, as a baseline for benchmarks.

PIL resizes each image, worker processes feed the loop, loss and accuracy are read in every step, one SGD optimizes all
parameters, the backbone is timm's own, and ILM makes a separate pass before every epoch. The greedy matching is ours,
which is faster than the published one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from lorvp.mappings.base import count, greedy_matching, make_mapping
from lorvp.models.backbone import Backbone
from lorvp.parts import HeadConfig, kinds

Loader = DataLoader[tuple[torch.Tensor, int]]
"""Batches of images (n, 3, L, L) float32 and labels (n,) int64."""


class Photos(Dataset[tuple[torch.Tensor, int]]):
    """Hold images, each (H, W, 3) uint8 or a file, and labels (N,); PIL resizes them one at a time to (size, size)."""

    def __init__(self, images: Sequence[np.ndarray | Path] | np.ndarray, labels: np.ndarray, size: int) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        source = self.images[i]
        image = Image.open(source).convert("RGB") if isinstance(source, Path) else Image.fromarray(source)
        return self.transform(image), int(self.labels[i])


class Trial:
    """Hold a prompt and a label mapping on a backbone without the optimizations of `lorvp/models/speed.py`."""

    def __init__(self, backbone: Backbone, classes: int, mapping: str, rank: int, prompt_lr: float, lr: float) -> None:
        self.model, self.mean, self.std, self.dtype = backbone.model, backbone.mean, backbone.std, backbone.dtype
        self.classes, self.source_classes = classes, backbone.source_classes
        device, size = self.mean.device, backbone.image_size
        self.b = torch.zeros(3, size, rank, device=device, requires_grad=True)
        self.a = torch.randn(3, rank, size, device=device).mul_(0.01).requires_grad_()
        options = kinds("head")[mapping](kind=mapping)
        assert isinstance(options, HeadConfig)  # by the folder's rule
        self.mapping = make_mapping(options, backbone.source_classes, backbone.features, classes).to(device)
        prompt: dict[str, Any] = {"params": [self.b, self.a], "lr": prompt_lr}
        groups = [prompt, {"params": list(self.mapping.parameters())}]
        self.optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=lr, momentum=0.9, weight_decay=1e-4)
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def outputs(self, images: torch.Tensor, prompted: bool = True) -> torch.Tensor:
        """Return the logits (N, source classes) or features (N, d), whichever the mapping reads."""
        x = ((images + self.b @ self.a if prompted else images) - self.mean) / self.std
        if self.mapping.input == "logits":
            logits: torch.Tensor = self.model(x)
            return logits
        features: torch.Tensor = self.model.forward_head(self.model.forward_features(x), pre_logits=True)
        return features

    def epoch(self, loader: Loader, lr_factor: float = 1.0) -> None:
        """Train for one pass, with the learning rates multiplied by `lr_factor`."""
        device = self.mean.device
        for group, base in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = base * lr_factor
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                output = self.mapping(self.outputs(images))
                loss = F.cross_entropy(output.log_softmax(1), labels)
            self.optimizer.zero_grad()
            torch.autograd.backward(self.scaler.scale(loss))
            self.scaler.step(self.optimizer)
            self.scaler.update()
            loss.item(), (output.argmax(1) == labels).float().mean().item()

    @torch.no_grad()
    def map_labels(self, loader: Loader, prompted: bool) -> None:
        """Compute FLM's mapping, or ILM's for this epoch, by a pass over the images."""
        counts = torch.zeros(self.source_classes, self.classes, dtype=torch.int32, device=self.mean.device)
        for images, labels in loader:
            top = self.outputs(images.to(self.mean.device), prompted).argmax(1)
            count(counts, top, labels.to(self.mean.device))
        self.mapping.index.copy_(greedy_matching(counts))

    @torch.no_grad()
    def accuracy(self, loader: Loader) -> float:
        """Return the top-1 accuracy in percent."""
        hits = total = 0
        for images, labels in loader:
            hits += (self.mapping(self.outputs(images.to(self.mean.device))).argmax(1).cpu() == labels).sum().item()
            total += len(labels)
        return 100 * hits / total
