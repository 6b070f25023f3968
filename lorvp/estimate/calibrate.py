"""How long an epoch of a trial takes on this machine, from a few steps of it."""

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
LONGEST = 20.0
"""Seconds that the steps may take: those of a large backbone on a CPU are long, and fewer of them must do."""


@dataclass(frozen=True)
class Calibration:
    epoch_seconds: float
    load_seconds: float
    """For the backbone and the data, which a job loads before its first step."""
    steps: int
    device: str


def calibrate(config: TrialConfig, threads: int) -> Calibration:
    """Trains on 20 batches with `threads` of the CPU, evaluates the same share of the validation images, extrapolates.

    The data is read and split as for the trial. Two single steps go before, which aren't counted: the first warms up,
    the second shows whether 20 would take too long; then there are fewer. What a label mapping counts before the first
    epoch is taken to be in each. The test set, read once at a trial's end, and checkpoints are left out. Of several
    GPUs one is measured.

    Raises what `load` and `train` raise.
    """
    torch.set_num_threads(threads)
    start = time.perf_counter()
    loaded = load(config)
    load_seconds = time.perf_counter() - start
    splits = loaded.splits
    all_images = (splits.train, splits.val, splits.test)

    def seconds(steps: int) -> tuple[float, float]:
        """How long so many steps and their share of the validation take, and what share of the epoch they are."""
        count = min(steps * config.batch_size, len(splits.train))
        share = count / len(splits.train)
        parts = (images.subset(np.arange(max(1, round(share * len(images))))) for images in all_images)
        result = next(train(config, shared=replace(loaded, splits=Splits(*parts))))
        return result.seconds, share

    with feature_cache.forgotten():
        seconds(1)
        one, _ = seconds(1)
        steps = max(1, min(STEPS, int(LONGEST / one), math.ceil(len(splits.train) / config.batch_size)))
        taken, share = seconds(steps)
    device = loaded.backbone.mean.device
    name = f"GPU {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "CPU"
    return Calibration(taken / share, load_seconds, steps, name)
