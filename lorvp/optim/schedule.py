"""The learning-rate schedule: a warm-up, then cosine, linear, constant or in steps."""

from __future__ import annotations

import math

from lorvp.config import ScheduleConfig


def lr_factor(schedule: ScheduleConfig, step: float, total: int, steps_per_epoch: int) -> float:
    """Return the factor of the learning rate at `step` (from 0) of `total`; it is above 0 at the first warm-up step."""
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (total - warmup)
    if schedule.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule.milestones is not None:
        return float(0.1 ** sum(done >= milestone for milestone in schedule.milestones))
    return 1 - done if schedule.name == "linear" else 1.0
