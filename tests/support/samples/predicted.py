"""What trials of a made-up sweep say of each image, as their jobs leave it."""

from __future__ import annotations

import numpy as np

from cluster.trial_folder import TrialFolder
from lorvp.bundle import predictions


def predicted(trial: TrialFolder, **wrong: list[int]) -> None:
    """Record that the trial gets each of 100 images of a split right but those at these places."""
    splits = {}
    for split, places in wrong.items():
        labels = np.arange(100) % 10
        splits[split] = predictions.Predictions(labels, np.where(np.isin(np.arange(100), places), labels + 1, labels))
    predictions.write(trial.newest().predictions, splits)
