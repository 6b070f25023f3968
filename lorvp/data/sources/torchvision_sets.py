"""The datasets of the method's peers that torchvision carries, in the layout that its own download leaves.

torchvision knows the files, their labels and their splits; nothing is decoded by it here. Where it has a train and a
val split, train is both: `prepare`'s stores have their validation images split off by the trial (VTAB does the same).
UCF101 is not among them: torchvision reads its videos only. Its middle frames, as CoOp gives them, are an image_folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lorvp.data.sources.base import Rows, Source
from lorvp.errors import UserError

Loaded = tuple[list[str], list[tuple[Any, int]]]
"""Class names; the path and label of each image."""


def _by_loader(kind: str, split: str | None, root: Path) -> Loaded:
    """Of the sets that take a loader: one that leaves the path as it is."""
    from torchvision import datasets

    options = {} if split is None else {"split": split}
    found = getattr(datasets, kind)(root, loader=str, **options)
    return list(found.classes), [found[i] for i in range(len(found))]


def _pets(split: str, root: Path) -> Loaded:
    from torchvision.datasets import OxfordIIITPet

    found = OxfordIIITPet(root, split)
    return found.classes, list(zip(found._images, found._labels, strict=True))  # it decodes on every other way


def _gtsrb(split: str, root: Path) -> Loaded:
    from torchvision.datasets import GTSRB

    found = GTSRB(root, split)._samples  # as above
    return [str(i) for i in range(43)], found


def _files(read: Callable[[str, Path], Loaded], splits: dict[str, list[str]], root: Path) -> Source:
    class_names: list[str] = []
    rows = {}
    for split, parts in splits.items():
        images: list[tuple[Any, int]] = []
        for part in parts:
            class_names, found = read(part, root)
            images += found
        labels = np.array([label for _, label in images], dtype=np.int64)
        rows[split] = Rows(labels, [os.path.relpath(path, root) for path, _ in images], root)
    return Source(class_names, rows)


def _svhn(root: Path) -> Source:
    """32 px, in MATLAB's files; digit 0 is class 0."""
    from torchvision.datasets import SVHN

    rows = {}
    for split in ("train", "test"):
        found = SVHN(root, split)
        names = [f"{split}/{i}" for i in range(len(found.labels))]
        rows[split] = Rows(np.asarray(found.labels, dtype=np.int64), names, pixels=found.data.transpose(0, 2, 3, 1))
    return Source([str(i) for i in range(10)], rows, 32)


def _read(make: Callable[[Path], Source], root: Path) -> Source:
    try:
        return make(root)
    except (RuntimeError, OSError, KeyError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{root}: not as torchvision's download leaves it; --download fetches it ({reason})") from None


TRAIN_TEST = {"train": ["train"], "test": ["test"]}
TRAIN_VAL_TEST = {"train": ["train", "val"], "test": ["test"]}
_MAKERS: dict[str, Callable[[Path], Source]] = {
    "dtd": partial(_files, partial(_by_loader, "DTD"), TRAIN_VAL_TEST),
    "eurosat": partial(_files, lambda split, root: _by_loader("EuroSAT", None, root), {"train": ["all"]}),
    "flowers102": partial(_files, partial(_by_loader, "Flowers102"), TRAIN_VAL_TEST),
    "food101": partial(_files, partial(_by_loader, "Food101"), TRAIN_TEST),
    "gtsrb": partial(_files, _gtsrb, TRAIN_TEST),
    "pets": partial(_files, _pets, {"train": ["trainval"], "test": ["test"]}),
    "svhn": _svhn,
}
SOURCES: dict[str, Callable[[Path], Source]] = {name: partial(_read, make) for name, make in _MAKERS.items()}
EXPECTED: dict[str, dict[str, int]] = {
    "dtd": {"classes": 47, "train": 3_760, "test": 1_880},
    "eurosat": {"classes": 10, "train": 27_000},
    "flowers102": {"classes": 102, "train": 2_040, "test": 6_149},
    "food101": {"classes": 101, "train": 75_750, "test": 25_250},
    "gtsrb": {"classes": 43, "train": 26_640, "test": 12_630},
    "pets": {"classes": 37, "train": 3_680, "test": 3_669},
    "svhn": {"classes": 10, "train": 73_257, "test": 26_032},
}
_DOWNLOADS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "cifar10": ("CIFAR10", [{}]),
    "cifar100": ("CIFAR100", [{}]),
    "dtd": ("DTD", [{}]),
    "eurosat": ("EuroSAT", [{}]),
    "flowers102": ("Flowers102", [{}]),
    "food101": ("Food101", [{}]),
    "gtsrb": ("GTSRB", [{"split": "train"}, {"split": "test"}]),
    "pets": ("OxfordIIITPet", [{}]),
    "svhn": ("SVHN", [{"split": "train"}, {"split": "test"}]),
}


def download(name: str, root: Path) -> None:
    """Has torchvision fetch a dataset into `root`, and check it. Raises UserError."""
    from torchvision import datasets

    if name not in _DOWNLOADS:
        raise UserError(f"--download: {name} is not one of {', '.join(_DOWNLOADS)}; get it from its authors")
    kind, calls = _DOWNLOADS[name]
    try:
        root.mkdir(parents=True, exist_ok=True)
        for options in calls:
            getattr(datasets, kind)(root, download=True, **options)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{root}: no {name}, and its download failed ({error})") from None
