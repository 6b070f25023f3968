"""Read CIFAR-10 and CIFAR-100 from their official Python archives without running code in their pickles."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from lorvp.data.sources.base import Rows, Source
from lorvp.errors import UserError


def cifar10(root: Path) -> Source:
    """Read cifar-10-python.tar.gz in `root`, or its unpacked folder. Raises UserError if it is missing or damaged."""
    batches = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    return _cifar(root, "cifar-10-python.tar.gz", "cifar-10-batches-py", "batches.meta", batches, "label")


def cifar100(root: Path) -> Source:
    """Read cifar-100-python.tar.gz in `root`, or its unpacked folder, with the 100 fine labels. Raises UserError."""
    batches = {"train": ["train"], "test": ["test"]}
    return _cifar(root, "cifar-100-python.tar.gz", "cifar-100-python", "meta", batches, "fine_label")


def _cifar(root: Path, archive: str, folder: str, meta: str, batches: dict[str, list[str]], key: str) -> Source:
    if (root / folder).is_dir():

        def member(name: str) -> bytes:
            try:
                return (root / folder / name).read_bytes()
            except FileNotFoundError:
                raise UserError(f"{root / folder / name}: missing") from None
    elif (root / archive).is_file():

        def member(name: str) -> bytes:
            try:
                with tarfile.open(root / archive) as tar:
                    file = tar.extractfile(f"{folder}/{name}")
                    if file is None:
                        raise KeyError("not a file")
                    return file.read()
            except (KeyError, tarfile.TarError, EOFError, OSError) as error:
                raise UserError(f"{root / archive}: {folder}/{name} can't be read ({error})") from None
    else:
        raise UserError(f"{root}: holds neither {archive} nor {folder}; they are the official python version")
    class_names = [str(name) for name in _plain_pickle(member(meta), meta)[f"{key}_names"]]
    splits = {}
    for split, files in batches.items():
        read = [_plain_pickle(member(name), name) for name in files]
        pixels = np.concatenate([np.asarray(batch["data"], dtype=np.uint8) for batch in read])
        labels = np.concatenate([np.asarray(batch[f"{key}s"], dtype=np.int64) for batch in read])
        if pixels.shape != (len(labels), 3072) or not ((labels >= 0) & (labels < len(class_names))).all():
            raise UserError(f"{root}: {split} has pixels {pixels.shape} and {len(labels)} labels, not 3,072 each")
        names = [str(name) for batch in read for name in batch["filenames"]]
        splits[split] = Rows(labels, names, pixels=pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Source(class_names, splits, 32)


PLAIN = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Plain(pickle.Unpickler):
    """Unpickle numbers, texts, lists, dictionaries and arrays only; a file can't make it run anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the PLAIN classes. Raises UnpicklingError for any other."""
        if (module.replace("._core", ".core"), name) not in PLAIN:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return super().find_class(module, name)


def _plain_pickle(data: bytes, name: str) -> dict[str, Any]:
    """Read one of CIFAR's pickles without running code in it. Raises UserError."""
    try:
        values: dict[str, Any] = _Plain(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{name}: not a batch of CIFAR ({error})") from None
    return values
