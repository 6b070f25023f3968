"""Measure how long an epoch of a trial takes on this machine, from a few of its steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from lorvp.config import TrialConfig
from lorvp.data.datasets import Splits
from lorvp.features import cache as feature_cache
from lorvp.training.loop import train
from lorvp.training.shared import load

STEPS = 20
MAX_SECONDS = 20.0
"""Seconds that the measured steps may take; for a large backbone on a CPU fewer than STEPS steps are measured."""


@dataclass(frozen=True)
class Calibration:
    """Hold the measured time of an epoch, in seconds."""

    epoch_seconds: float
    load_seconds: float
    """Time to load the backbone and the data, before a job's first step."""
    steps: int
    device: str


def calibrate(config: TrialConfig, threads: int) -> Calibration:
    """Train on 20 batches with `threads` CPU threads, evaluate the same fraction of the validation images, extrapolate.

    The data is read and split as for the trial. Two single steps run before and aren't counted: the first warms up, the
    second shows whether 20 would take too long, in which case there are fewer. The pass of a label mapping before the
    first epoch is counted in every epoch. The test set, read once at a trial's end, and checkpoints are not counted.
    With several GPUs one is measured.

    Raises what `lorvp.training.shared.load` and `lorvp.training.loop.train` raise.
    """
    torch.set_num_threads(threads)
    start = time.perf_counter()
    loaded = load(config)
    load_seconds = time.perf_counter() - start
    splits = loaded.splits
    all_images = (splits.train, splits.val, splits.test)

    def seconds(steps: int) -> tuple[float, float]:
        """Time so many steps and their part of the validation; return the seconds and the fraction of the epoch."""
        count = min(steps * config.batch_size, len(splits.train))
        fraction = count / len(splits.train)
        parts = (images.subset(np.arange(max(1, round(fraction * len(images))))) for images in all_images)
        result = next(train(config, shared=replace(loaded, splits=Splits(*parts))))
        return result.seconds, fraction

    with feature_cache.temporary_cache():
        seconds(1)
        one, _ = seconds(1)
        steps = max(1, min(STEPS, int(MAX_SECONDS / one), math.ceil(len(splits.train) / config.batch_size)))
        measured_seconds, fraction = seconds(steps)
    device = loaded.backbone.mean.device
    name = f"GPU {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "CPU"
    return Calibration(measured_seconds / fraction, load_seconds, steps, name)
