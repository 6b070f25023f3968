"""Two trials on the same images: the difference of their accuracies, the images behind it, and what it shows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster.trial_folder import TrialFolder
from lorvp.bundle import predictions

NORMAL_95 = 1.959964
SHOWN = "a gain is shown: its 95 % interval is above zero"
MAY_BE_NONE = "the gain may be none: its 95 % interval includes zero"
WORSE = "no gain, it is worse: its 95 % interval is below zero"
SPLITS = ("val", "test")


def in_words(low: float, high: float) -> str:
    """Say what a gain shows, by the ends of its interval."""
    return SHOWN if low > 0 else WORSE if high < 0 else MAY_BE_NONE


@dataclass(frozen=True)
class Gain:
    """The best's accuracy less the control's, in points."""

    split: str
    """Of the images that it was measured on: test, or val where one of the two has not read the test set."""
    points: float
    low: float | None = None
    high: float | None = None
    """Of its 95 % interval: None where it can't be told."""
    images: int | None = None
    """None where the trials have not recorded them."""

    def in_words(self) -> str | None:
        """Say what it shows; None without an interval."""
        return None if self.low is None or self.high is None else in_words(self.low, self.high)


@dataclass(frozen=True)
class Paired:
    """Two models on the same images, counted by which of them is right."""

    images: int
    both: int
    ours: int
    """Images that ours alone gets right."""
    theirs: int
    """Images that the other alone gets right."""

    @classmethod
    def of(cls, ours: np.ndarray, theirs: np.ndarray) -> Paired:
        """Count by which images each model gets right: (N,) bool, in the same order."""
        alone = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        return cls(len(ours), int((ours & theirs).sum()), *alone)

    @property
    def points(self) -> float:
        """The difference of the accuracies."""
        return 100 * (self.ours - self.theirs) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval, in points: Wald's, with half an image added to each of the four cells.

        Only images on which the two disagree widen it. Source: Agresti and Min, Simple improved confidence intervals
        for comparing matched proportions, Statistics in Medicine 24 (2005), where it is called Wald+2. The ends are
        cut at 100 points, as in Agresti's own code.
        """
        ours, theirs, images = self.ours + 0.5, self.theirs + 0.5, self.images + 2
        centre = (ours - theirs) / images
        half = NORMAL_95 * math.sqrt((ours + theirs) - (ours - theirs) ** 2 / images) / images
        return max(-100.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.points:+z.2f} [{low:+z.2f}, {high:+z.2f}]"


def compare(ours: TrialFolder, theirs: TrialFolder) -> dict[str, Paired] | None:
    """Compare two trials on each split that both have read and that has the same images in both.

    None where one of them has recorded nothing: a trial of an earlier version.
    """
    first, second = recorded(ours), recorded(theirs)
    if not first or not second:
        return None
    # where an axis changes how val is drawn, two draws may have the same labels
    datasets = [trial.config.dataset.unaugmented for trial in (ours, theirs)]
    splits = SPLITS if datasets[0] == datasets[1] else ("test",)
    return {
        split: Paired.of(first[split].right, second[split].right)
        for split in splits
        if split in first and split in second and np.array_equal(first[split].labels, second[split].labels)
    }


def recorded(trial: TrialFolder) -> dict[str, predictions.Predictions]:
    """Return which class the trial's bundle gives each image, by split; none where that was not recorded."""
    attempt = trial.newest()
    return predictions.read(attempt.predictions) if attempt else {}
