"""GaLore: fine-tuning by gradients of low rank."""

from __future__ import annotations

import torch
from torch import nn

from lorvp.adapters.fine_tuning.adapter import FineTuning
from lorvp.adapters.galore.config import GaLoreConfig
from lorvp.optim import galore


class GaLore(FineTuning):
    """Fine-tuning with GaLore (`lorvp/optim/galore.py`) for the backbone, and the head's own optimizer for the head."""

    def make_optimizer(self, part: str, parameters: list[nn.Parameter], precision: str) -> torch.optim.Optimizer:
        """Make GaLore for the backbone, and another part's optimizer as its options say."""
        if part != "adapter":
            return super().make_optimizer(part, parameters, precision)
        options = self.config.adapter
        assert isinstance(options, GaLoreConfig)
        own = options.model_dump(include={"rank", "update_gap", "scale", "bits", "per_layer"})
        return galore.GaLore(parameters, self.learning_rate(options), options.weight_decay, **own)
