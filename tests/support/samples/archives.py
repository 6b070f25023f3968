"""Datasets as their publishers pack them, made small."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np


def cifar_archive(folder: Path, name: str) -> None:
    """The official python archive's layout, with 20 images a batch."""
    random = np.random.default_rng(0)
    inner = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    (folder / inner).mkdir(parents=True)
    key, classes = {"cifar10": ("label", 10), "cifar100": ("fine_label", 100)}[name]
    train = [f"data_batch_{i}" for i in range(1, 6)] if name == "cifar10" else ["train"]
    for batch in [*train, "test_batch" if name == "cifar10" else "test"]:
        values = {
            "data": random.integers(0, 256, (20, 3072), dtype=np.uint8),
            f"{key}s": random.integers(0, classes, 20).tolist() if name == "cifar100" else [i % 10 for i in range(20)],
            "filenames": [f"{batch}_{i}.png" for i in range(20)],
        }
        if name == "cifar100":
            values["fine_labels"] = [i % 100 for i in range(20)]
        (folder / inner / batch).write_bytes(pickle.dumps(values, protocol=2))
    meta = {f"{key}_names": [f"class {i}" for i in range(10 if name == "cifar10" else 20)]}
    (folder / inner / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(pickle.dumps(meta, protocol=2))
