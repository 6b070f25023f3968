"""Compute permutations and draws from seeds alone, the same on every machine and with every version of NumPy.

NumPy's generators may change from one version to the next; a mixing function of 64-bit integers does not.
"""

from __future__ import annotations

import numpy as np


def permutation(length: int, *seeds: int) -> np.ndarray:
    """Permute the numbers 0 to length - 1 in an order that `seeds` determine: (length,) int64."""
    return np.argsort(hashes(np.arange(length), *seeds), kind="stable")


def uniform(numbers: np.ndarray, width: int, *seeds: int) -> np.ndarray:
    """Draw `width` numbers from [0, 1) for each of `numbers`: (len(numbers), width) float64."""
    cells = numbers[:, None] * width + np.arange(width)
    return (hashes(cells.ravel(), *seeds) >> np.uint64(11)).reshape(cells.shape) * 2.0**-53


def hashes(numbers: np.ndarray, *seeds: int) -> np.ndarray:
    """Hash each of `numbers` with `seeds` to a uniform uint64 (Steele et al. 2014, splitmix64)."""
    state = np.zeros(len(numbers), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for value in (*seeds, numbers):
            state = (state ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return state
