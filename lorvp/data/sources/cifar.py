"""CIFAR-10 and CIFAR-100 from their official python archives, which are pickles, without running what they may hold."""

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
    """The python version's archive, cifar-10-python.tar.gz, or the folder in it."""
    batches = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    return _cifar(root, "cifar-10-python.tar.gz", "cifar-10-batches-py", "batches.meta", batches, "label")


def cifar100(root: Path) -> Source:
    """The python version's archive, cifar-100-python.tar.gz, or the folder in it; the 100 fine labels."""
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
    """Builds numbers, texts, lists, dictionaries and arrays; nothing in a file can have it run anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("._core", ".core"), name) not in PLAIN:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return super().find_class(module, name)


def _plain_pickle(data: bytes, name: str) -> dict[str, Any]:
    """CIFAR's own format, which is a pickle, read without running what it may hold."""
    try:
        values = _Plain(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{name}: not a batch of CIFAR ({error})") from None
    return values
