"""Make a trial's optimizers and compute its learning-rate schedule."""

from __future__ import annotations

import math

import torch

from lorvp.config import ScheduleConfig, TrialConfig
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


def lr_factor(schedule: ScheduleConfig, step: float, total: int, steps_per_epoch: int) -> float:
    """Return the factor of the learning rate at `step` (from 0) of `total`; it is above 0 at the first warm-up step."""
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (total - warmup)
    if schedule.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule.name == "steps":
        return 0.1 ** sum(done >= milestone for milestone in schedule.milestones)
    return 1 - done if schedule.name == "linear" else 1.0
