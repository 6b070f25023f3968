"""Cache the frozen backbone's outputs on unprompted images, computed once for all trials of all sweeps.

The cache's folder (LORVP_CACHE, by default ~/.cache/lorvp) holds a file for each split and output. Its name is a digest
of the weights, the images and the computation, so that a file is never out of date. Files may be deleted at any time.
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
"""Kind of output: features (N, d) float32, logits (N, source classes) float32, or top: the argmax class, (N,) int64."""


_temporary_folder: Path | None = None


def cache_folder() -> Path:
    """Return the folder of the cache, or the temporary one within `temporary_cache`."""
    return _temporary_folder or files.cache_folder()


@contextmanager
def temporary_cache() -> Iterator[None]:
    """Use an empty cache that is deleted when the block ends, for images that nobody will ask for again."""
    global _temporary_folder
    with TemporaryDirectory(prefix="lorvp-") as folder:
        _temporary_folder = Path(folder)
        try:
            yield
        finally:
            _temporary_folder = None


def key(*parts: object) -> str:
    """Return a file name for a result that depends on `parts` and on nothing else."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


@contextmanager
def compute_once(path: Path) -> Iterator[bool]:
    """Yield whether `path` must be made: true in the first process that needs it; the others wait for it."""
    if path.exists():
        yield False
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        with suppress(OSError):  # a disk without locks: the file is made more than once, each time complete
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield not path.exists()


def get(
    backbone: Backbone, images: Images, output: Output, batch_size: int, check: Callable[[], None] = lambda: None
) -> ArrayImages:
    """Return `images` with the backbone's outputs in place of the pixels, computed if the cache does not hold them.

    The outputs are memory-mapped, with the shapes of `Output`. `check` is called before every batch and may raise an
    exception to end the computation; the next call resumes it there.
    """
    statistics = (backbone.mean.flatten().tolist(), backbone.std.flatten().tolist())
    name = key(output, backbone.digest, backbone.image_size, statistics, str(backbone.dtype), images.digest)
    path = cache_folder() / f"{output}-{name}.npy"
    with compute_once(path) as missing:
        if missing:
            _compute(path, backbone, images, output, batch_size, check)
    outputs = torch.from_numpy(np.load(path, mmap_mode="c"))
    return ArrayImages(outputs, images.labels, images.class_names, name)


def _compute(
    path: Path, backbone: Backbone, images: Images, output: Output, batch_size: int, check: Callable[[], None]
) -> None:
    width = {"features": (backbone.features,), "logits": (backbone.source_classes,), "top": ()}[output]
    kind = np.dtype(np.int64 if output == "top" else np.float32)
    header = {"descr": kind.str, "fortran_order": False, "shape": (len(images), *width)}
    partial_path = path.with_name(f".{path.name}.begun")  # the rows that an interrupted call has computed
    micro_batches = MicroBatches(batch_size)

    def rows(pixels: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = backbone(backbone.prepare(pixels), "features" if output == "features" else "logits")
        return outputs.argmax(1) if output == "top" else outputs

    with replacing(path) as temporary:
        if partial_path.exists():
            os.replace(partial_path, temporary)
        # not through a memory map: on a full disk that would kill the process
        with open(temporary, "ab") as file, torch.inference_mode():
            if not file.tell():
                np.lib.format.write_array_header_1_0(file, header)
                file.flush()
            start = file.tell()
            bytes_a_row = kind.itemsize * math.prod(width)
            done = (start - _header_bytes(temporary)) // bytes_a_row
            batches = loader.batches(images, batch_size, np.arange(done, len(images)), backbone.mean.device)
            for pixels, _ in batches:
                try:
                    check()
                except BaseException:
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(temporary, partial_path)
                    raise
                file.write(torch.cat(micro_batches.run(rows, pixels)).cpu().numpy().astype(kind).data)


def _header_bytes(path: Path) -> int:
    """Return the number of bytes of a NumPy file before its first row."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return file.tell()
