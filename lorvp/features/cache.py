"""What the frozen backbone says of images as they are, without a prompt: computed once, for all trials of all sweeps.

A file for each split and output lies in the cache's folder (LORVP_CACHE, by default ~/.cache/lorvp), named by a digest
of the weights, the images and the way between them: what is there is right, and may be deleted at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch

from lorvp.data import loader
from lorvp.data.datasets import ArrayImages, Images
from lorvp.models.backbone import Backbone
from lorvp.utils import files
from lorvp.utils.device import MicroBatches
from lorvp.utils.files import replacing

Output = Literal["features", "logits", "top"]
"""(N, features) or (N, source classes) float32, or (N,) int64: the source class of the largest logit."""


_elsewhere: Path | None = None


def cache_folder() -> Path:
    return _elsewhere or files.cache_folder()


@contextmanager
def forgotten() -> Iterator[None]:
    """What is computed meanwhile is not kept: of images that nobody will ask for again."""
    global _elsewhere
    with TemporaryDirectory(prefix="lorvp-") as folder:
        _elsewhere = Path(folder)
        try:
            yield
        finally:
            _elsewhere = None


def key(*parts: object) -> str:
    """A name for what is made of `parts` and of nothing else."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


@contextmanager
def once(path: Path) -> Iterator[bool]:
    """Whether `path` is missing: of several processes that need it the first is told so, the others find it made."""
    if path.exists():
        yield False
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        with suppress(OSError):  # a disk without locks: then it is made more than once, each time whole
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield not path.exists()


def outputs(
    backbone: Backbone, images: Images, output: Output, batch_size: int, check: Callable[[], None] = lambda: None
) -> ArrayImages:
    """`images` with what `backbone` says in place of the pixels, mapped from the cache, where it is put if missing.

    `check` is called before every batch, and may raise what ends the computation; the next call goes on there.
    """
    statistics = (backbone.mean.flatten().tolist(), backbone.std.flatten().tolist())
    name = key(output, backbone.digest, backbone.image_size, statistics, str(backbone.dtype), images.digest)
    path = cache_folder() / f"{output}-{name}.npy"
    with once(path) as missing:
        if missing:
            _compute(path, backbone, images, output, batch_size, check)
    said = torch.from_numpy(np.load(path, mmap_mode="c"))
    return ArrayImages(said, images.labels, images.class_names, name)


def _compute(
    path: Path, backbone: Backbone, images: Images, output: Output, batch_size: int, check: Callable[[], None]
) -> None:
    width = {"features": (backbone.features,), "logits": (backbone.source_classes,), "top": ()}[output]
    kind = np.dtype(np.int64 if output == "top" else np.float32)
    header = {"descr": kind.str, "fortran_order": False, "shape": (len(images), *width)}
    begun = path.with_name(f".{path.name}.begun")  # the rows up to where an earlier call was ended
    micro_batches = MicroBatches(batch_size)

    def rows(pixels: torch.Tensor) -> torch.Tensor:
        said = backbone(backbone.prepare(pixels), "features" if output == "features" else "logits")
        return said.argmax(1) if output == "top" else said

    with replacing(path) as temporary:
        if begun.exists():
            os.replace(begun, temporary)
        # not through a memory map: on a full disk that would kill the process
        with open(temporary, "ab") as file, torch.inference_mode():
            if not file.tell():
                np.lib.format.write_array_header_1_0(file, header)
                file.flush()
            start = file.tell()
            bytes_a_row = kind.itemsize * math.prod(width)
            done = (start - _header_bytes(temporary)) // bytes_a_row
            given = loader.batches(images, batch_size, np.arange(done, len(images)), backbone.mean.device)
            for pixels, _ in given:
                try:
                    check()
                except BaseException:
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(temporary, begun)
                    raise
                file.write(torch.cat(micro_batches.run(rows, pixels)).cpu().numpy().astype(kind).data)


def _header_bytes(path: Path) -> int:
    """How many bytes a NumPy file has before its first row."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return file.tell()
