"""Is a prompt worth it here? A log-evidence score of the frozen features with and without cheap stand-ins for a prompt.

The ratio of the evidences predicts whether a prompt will beat the linear probe (IBM/VP-LLR, with LogME for the
evidence: You et al. 2021). The stand-ins are random low-rank prompts, and one step down the fitted head's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from lorvp import datasets, frozen, pipeline, probe, shuffle
from lorvp.config import TrialConfig
from lorvp.trial import Loaded

IMAGES = 2000
"""Of the training set that are looked at, at most: half of them for the gradient, the others for the evidence."""
SCALES = (0.01, 0.03, 0.1)
"""Mean absolute value of a stand-in, in units of pixels in [0, 1]."""


@dataclass(frozen=True)
class Triage:
    """LogME of the plain features, and under each stand-in, by name; a larger one is better."""

    plain: float
    prompted: dict[str, float]

    @property
    def best(self) -> str:
        return max(self.prompted, key=self.prompted.__getitem__)

    @property
    def log_ratio(self) -> float:
        """Of the evidences, per image: above 0 where the best stand-in makes the classes easier to tell apart."""
        return self.prompted[self.best] - self.plain


def triage(config: TrialConfig, loaded: Loaded) -> Triage:
    """Scores the data of `config` for its backbone. It takes six passes over a thousand images, and the head's fit."""
    splits = loaded.splits
    chosen = shuffle.permutation(len(splits.train), 0)[:IMAGES]
    train = splits.train.subset(np.sort(chosen))
    steered, scored = (train.subset(np.arange(half, len(train), 2)) for half in (0, 1))
    plain = frozen.outputs(loaded.backbone, scored, "features", config.eval_batch_size)
    labels = torch.from_numpy(scored.labels)
    rank = config.prompt.rank
    patterns = {"gradient": low_rank(-_gradient(config, loaded, steered), rank)}
    size = loaded.backbone.image_size
    b, a = torch.randn(2, 3, size, rank, generator=torch.Generator().manual_seed(0))
    patterns["random"] = b @ a.transpose(1, 2)
    prompted = {}
    for kind, pattern in patterns.items():
        for scale in SCALES:
            added = pattern.to(loaded.backbone.mean.device) * (scale / pattern.abs().mean())
            prompted[f"{kind} {scale:g}"] = logme(_features(config, loaded, scored, added), labels)
    return Triage(logme(plain.pixels, labels), prompted)


def logme(features: torch.Tensor, labels: torch.Tensor) -> float:
    """The largest log evidence of a linear model from features (N, d) to each class against the rest, per image.

    Mean over classes. The model has normal weights and errors; of their precisions the errors' has its best value in
    closed form, and the ratio of the two is searched on a grid, where the fixed point of You et al. may take thousands
    of iterations.
    """
    x = features.double().cpu()
    y = F.one_hot(labels).double()
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    z2 = (u.T @ y).square()
    outside = (y.square().sum(0) - z2.sum(0)).clamp(min=0)
    strength = s.square() / (s.square().mean() * torch.logspace(-8, 8, 321, dtype=torch.float64)[:, None])
    errors = (1 / (1 + strength)) @ z2 + outside
    evidence = -(errors * (2 * torch.pi * torch.e / len(x))).log() - strength.log1p().sum(1, keepdim=True) / len(x)
    return (evidence.amax(0) / 2).mean().item()


def low_rank(pattern: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest (3, L, L) of that rank."""
    u, s, v = torch.linalg.svd(pattern.float().cpu(), full_matrices=False)
    return u[..., :rank] * s[:, None, :rank] @ v[:, :rank]


def _gradient(config: TrialConfig, loaded: Loaded, images: datasets.Images) -> torch.Tensor:
    """Of the loss with respect to what is added to all images, at zero, under a head that is fitted a little."""
    backbone, size = loaded.backbone, config.eval_batch_size
    said = frozen.outputs(backbone, images, "features", size)
    device = backbone.mean.device
    head = probe.head(said, said, 1e-2, device)
    added = torch.zeros(3, backbone.image_size, backbone.image_size, device=device, requires_grad=True)
    for pixels, labels in pipeline.batches(images, config.batch_size, device=device):
        features = backbone(backbone.prepare(pixels), "features", added)
        F.cross_entropy(F.linear(features, *head), labels, reduction="sum").backward()
    assert added.grad is not None
    return added.grad


def _features(config: TrialConfig, loaded: Loaded, images: datasets.Images, added: torch.Tensor) -> torch.Tensor:
    backbone = loaded.backbone
    with torch.inference_mode():
        batches = pipeline.batches(images, config.eval_batch_size, device=added.device)
        return torch.cat([backbone(backbone.prepare(pixels), "features", added).cpu() for pixels, _ in batches])
