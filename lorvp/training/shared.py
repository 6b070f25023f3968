"""What trials of one job share: the backbone on its device, and the data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lorvp.config import TrialConfig
from lorvp.data import datasets, loader
from lorvp.models.backbone import Backbone
from lorvp.models.speed import keep_memory
from lorvp.training import precision
from lorvp.utils import device as devices


@dataclass(frozen=True)
class SharedResources:
    """Backbone, data and precision, for all trials with the same ones (`TrialConfig.shares_with`)."""

    backbone: Backbone
    splits: datasets.Splits
    precision: str
    """fp32, bf16 or fp16."""

    @property
    def device(self) -> torch.device:
        """The device that the backbone is on."""
        return self.backbone.mean.device

    def describe(self) -> str:
        """Return device, driver and precision in words, for a job's log."""
        driver = devices.driver(self.device)
        return ", ".join([devices.name(self.device), *([f"driver {driver}"] if driver else []), self.precision])

    def in_precision(self, precision: str, config: TrialConfig) -> SharedResources:
        """Return the same resources with the backbone in fp32, bf16 or fp16."""
        if precision == self.precision:
            return self
        backbone = Backbone(config.backbone, precision, config.backbone_speed, self.device)
        return replace(self, backbone=backbone, precision=precision)


def load(config: TrialConfig, kept_precision: str | None = None) -> SharedResources:
    """Build the backbone on the device, and read the data.

    `kept_precision` is what other trials of the sweep train in; `precision: auto` takes it.

    Raises UserError where the backbone or the data can't be had.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and config.speed.keep_memory:
        keep_memory(True)
    chosen = precision.choose(config, device, kept_precision)
    backbone = Backbone(config.backbone, chosen, config.backbone_speed, device)
    splits = datasets.load(config.dataset, backbone.image_size)
    return SharedResources(backbone, loader.cache_on_device(splits, device), chosen)
