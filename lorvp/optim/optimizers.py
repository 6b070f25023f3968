"""The optimizers of a trial, and how its learning rates fall."""

from __future__ import annotations

import math

import torch

from lorvp.config import ScheduleConfig, TrialConfig
from lorvp.optim.galore import GaLore


def make_optimizer(
    group: str, parameters: list[torch.nn.Parameter], config: TrialConfig, precision: str
) -> torch.optim.Optimizer:
    """Make the optimizer of one group (prompt, tokens, head or backbone) of a trial in that precision."""
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
    made = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    return made(parameters, lr, weight_decay=weight_decay, fused=fused)


def lr_factor(schedule: ScheduleConfig, step: float, total: int, steps_per_epoch: int) -> float:
    """Share of the learning rate at `step` (from 0) of `total`: the first warm-up step has a share above 0."""
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (total - warmup)
    if schedule.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule.name == "steps":
        return 0.1 ** sum(done >= share for share in schedule.milestones)
    return 1 - done if schedule.name == "linear" else 1.0
