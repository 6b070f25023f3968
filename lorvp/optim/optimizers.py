"""Make a trial's optimizers."""

from __future__ import annotations

import torch

from lorvp.parts import TrainedByOptimizer


def make_optimizer(
    options: TrainedByOptimizer, lr: float, parameters: list[torch.nn.Parameter], precision: str
) -> torch.optim.Optimizer:
    """Make the optimizer of one part of a trial (prompt, adapter or head) in that precision."""
    fused = parameters[0].is_cuda  # fused steps read GradScaler's verdict on the device
    if options.optimizer == "sgd":
        # a fused first step that GradScaler skips leaves the momentum as it was allocated, with whatever lay there
        fused = fused and precision != "fp16"
        momentum = options.momentum or 0.0
        return torch.optim.SGD(parameters, lr, momentum, weight_decay=options.weight_decay, fused=fused)
    adam_class: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer]
    return adam_class(parameters, lr, weight_decay=options.weight_decay, fused=fused)
