"""Make a trial's optimizers."""

from __future__ import annotations

import torch

from lorvp.config import TrialConfig
from lorvp.optim.galore import GaLore


def make_optimizer(
    group: str, parameters: list[torch.nn.Parameter], config: TrialConfig, precision: str
) -> torch.optim.Optimizer:
    """Make the optimizer of one parameter group (prompt, tokens, head or backbone) of a trial in that precision."""
    options = config.optimizer
    lr, weight_decay = getattr(options, f"{group}_lr"), getattr(options, f"{group}_weight_decay")
    if options.scale_lr:
        lr *= config.batch_size / 256
    if group == "backbone" and "galore" in config.methods:
        return GaLore(parameters, lr, weight_decay, **options.galore.model_dump())
    kind = options.prompt_name if group == "prompt" else options.name
    fused = parameters[0].is_cuda  # fused steps read GradScaler's verdict on the device
    if kind == "sgd":
        # a fused first step that GradScaler skips leaves the momentum as it was allocated, with whatever lay there
        fused = fused and precision != "fp16"
        return torch.optim.SGD(parameters, lr, options.momentum, weight_decay=weight_decay, fused=fused)
    adam_class: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    return adam_class(parameters, lr, weight_decay=weight_decay, fused=fused)
