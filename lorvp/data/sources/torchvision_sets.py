"""Read datasets of the peers' papers in the layout of torchvision's download.

torchvision lists the files, labels and splits; it decodes nothing here. If it has a train and a val split, both become
train, because the trial splits off its validation images (as VTAB does). UCF101 is missing, as torchvision reads its
videos only; its middle frames, as CoOp provides them, are an image_folder.
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

LabelledPaths = tuple[list[str], list[tuple[Any, int]]]
"""Class names, and the path and label of each image."""


def _by_loader(kind: str, split: str | None, root: Path) -> LabelledPaths:
    """Read a dataset that takes a loader, with `str` as the loader, which leaves the path as it is."""
    from torchvision import datasets

    options = {} if split is None else {"split": split}
    dataset = getattr(datasets, kind)(root, loader=str, **options)
    return list(dataset.classes), [dataset[i] for i in range(len(dataset))]


def _pets(split: str, root: Path) -> LabelledPaths:
    from torchvision.datasets import OxfordIIITPet

    dataset = OxfordIIITPet(root, split)
    # any other access would decode the images
    return dataset.classes, list(zip(dataset._images, dataset._labels, strict=True))


def _gtsrb(split: str, root: Path) -> LabelledPaths:
    from torchvision.datasets import GTSRB

    samples = GTSRB(root, split)._samples  # as above
    return [str(i) for i in range(43)], samples


def _files(read: Callable[[str, Path], LabelledPaths], splits: dict[str, list[str]], root: Path) -> Source:
    class_names: list[str] = []
    rows = {}
    for split, parts in splits.items():
        images: list[tuple[Any, int]] = []
        for part in parts:
            class_names, labelled_paths = read(part, root)
            images += labelled_paths
        labels = np.array([label for _, label in images], dtype=np.int64)
        rows[split] = Rows(labels, [os.path.relpath(path, root) for path, _ in images], root)
    return Source(class_names, rows)


def _svhn(root: Path) -> Source:
    """Read SVHN from MATLAB files: 32 px, digit 0 is class 0."""
    from torchvision.datasets import SVHN

    rows = {}
    for split in ("train", "test"):
        dataset = SVHN(root, split)
        names = [f"{split}/{i}" for i in range(len(dataset.labels))]
        rows[split] = Rows(np.asarray(dataset.labels, dtype=np.int64), names, pixels=dataset.data.transpose(0, 2, 3, 1))
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
    """Have torchvision download a dataset into `root` and check it. Raises UserError if it can't."""
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
