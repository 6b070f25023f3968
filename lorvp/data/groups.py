"""Keep images of one group on one side of a split: the frames of a track, the pictures of a patient.

scikit-learn's StratifiedGroupKFold is not used: its folds change with its version and NumPy's, and hold back a whole
number of folds. Here a split is the same everywhere, and holds back the fraction that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np

from lorvp.config import GroupsConfig
from lorvp.data import shuffle
from lorvp.errors import UserError

ROUNDS = 20
"""Largest number of times that each group is tried."""


def group_ids(config: GroupsConfig, names: Sequence[str], title: str, column: Sequence[str] = ()) -> np.ndarray:
    """Return the group of each image, (N,) int64, by its path in the dataset, which `title` names, or by its column.

    Raises UserError if an image has none.
    """
    found = [text or None for text in column] if config.column is not None else [_group(config, name) for name in names]
    missing = [name for name, group in zip(names, found, strict=True) if group is None]
    if missing:
        ((key, value),) = config.model_dump(exclude_none=True).items()
        rest = "no image" if len(missing) == len(names) else f"{len(names) - len(missing):,} of {len(names):,} images"
        what = "matches" if key == "pattern" else "is there for"
        raise UserError(f"dataset.groups.{key}: {value} {what} {rest} of {title}; it is missing for {missing[0]}")
    ids: np.ndarray = np.unique(np.array(found, dtype=str), return_inverse=True)[1].astype(np.int64)
    return ids


def check(ids: np.ndarray, title: str) -> None:
    """Raise UserError if all images of the dataset `title` are one group, or each is one of its own."""
    groups = int(ids.max()) + 1
    if groups == 1:
        raise UserError(f"dataset.groups: all images of {title} are one group; a group is what must stay together")
    if groups == len(ids):
        raise UserError(f"dataset.groups: each image of {title} is a group of its own, so nothing is kept together")


def _group(config: GroupsConfig, name: str) -> str | None:
    """Return the group that a path names; None if it names none."""
    if config.pattern is not None:
        match = re.search(config.pattern, name)
        return None if match is None else "\0".join(text or "" for text in match.groups() or [match[0]])
    assert config.folder is not None  # by GroupsConfig
    parents = PurePath(name).parts[:-1]
    return parents[config.folder - 1] if len(parents) >= config.folder else None


def split(labels: np.ndarray, ids: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold back whole groups, about `fraction` of each class; return sorted (rest, held back).

    The groups are tried in an order that `seed` determines. One is held back, or given back, if that brings the
    classes' numbers nearer to the fraction, relative to the classes' sizes; this is repeated until nothing does. Then
    each class of which nothing is held back gives its smallest group. No group is held back that has the last images of
    a class.
    """
    classes, counts = int(labels.max()) + 1, np.bincount(labels)
    cells, sizes = np.unique(ids * classes + labels, return_counts=True)
    starts = np.searchsorted(cells // classes, np.arange(int(ids.max()) + 2))
    wanted, weight = fraction * counts, 1 / np.maximum(counts, 1) ** 2
    held, kept = np.zeros(classes), counts.astype(float)
    taken = np.zeros(len(starts) - 1, dtype=bool)

    def members(group: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the classes of a group, and how many more images of each are held back once it moves."""
        here = slice(starts[group], starts[group + 1])
        return cells[here] % classes, -sizes[here] if taken[group] else sizes[here]

    def move(group: int) -> None:
        of, number = members(group)
        held[of] += number
        kept[of] -= number
        taken[group] = not taken[group]

    def helps(group: int) -> bool:
        of, number = members(group)
        before, after = held[of] - wanted[of], held[of] + number - wanted[of]
        return bool((kept[of] > number).all() and (weight[of] * (after**2 - before**2)).sum() < 0)

    order = shuffle.permutation(len(taken), seed).tolist()
    for _ in range(ROUNDS):
        before = taken.copy()
        for group in order:
            if helps(group):
                move(group)
        if np.array_equal(taken, before):
            break
    for label in np.flatnonzero((held == 0) & (counts > 0)).tolist():
        groups = cells[cells % classes == label] // classes
        for group in groups[np.argsort(sizes[cells % classes == label], kind="stable")].tolist():
            if not held[label] and (kept[members(group)[0]] > members(group)[1]).all():
                move(group)
    back = taken[ids]
    return np.flatnonzero(~back), np.flatnonzero(back)
