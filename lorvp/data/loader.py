"""Load batches of images on the device, in an order that depends on the seed and the epoch only.

Batches are transferred as uint8. Each is read, and copied to a GPU, while the one before is used. Datasets that fit are
kept on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import cast

import numpy as np
import torch

from lorvp.data import shuffle
from lorvp.data.datasets import ArrayImages, Images, Splits
from lorvp.utils.device import suppress_out_of_memory

DEVICE_FRACTION = 0.25
"""Largest fraction of the GPU's free memory that a dataset kept there may take."""
CPU = torch.device("cpu")

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Iterator of batches on the device: images (n, 3, H, W) uint8 and labels (n,) int64."""


def epoch_order(length: int, order_seed: int, epoch: int) -> np.ndarray:
    """Return the order of one epoch, (length,) int64; it is the same each time it is asked for."""
    return shuffle.permutation(length, order_seed, epoch)


def batches(
    images: Images,
    batch_size: int,
    order: np.ndarray | None = None,
    device: torch.device = CPU,
    share: tuple[int, int] = (0, 1),
) -> Batches:
    """Yield batches of the images in `order` on `device`; the last one may be shorter.

    With `share` = (rank, world size) a process gets every world-size-th image of each batch, so that all processes
    together see each image once.
    """
    order = np.arange(len(images)) if order is None else order
    if not len(order):
        return
    starts = [*range(0, len(order), batch_size), len(order)]
    chunks = [order[start:stop][share[0] :: share[1]] for start, stop in pairwise(starts)]
    copies = (
        cast(Callable[[torch.device], torch.cuda.Stream], torch.cuda.Stream)(device) if device.type == "cuda" else None
    )

    def fetch(chunk: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]:
        labels = torch.from_numpy(images.labels[chunk])
        if copies is None:
            return images.read(chunk), labels, None
        read = images.read(chunk, pin=True)
        with suppress_out_of_memory(), torch.cuda.stream(copies):
            # torch does not reuse pinned memory before such a copy has ended
            pixels = read.to(device, non_blocking=True)
            return pixels, labels.pin_memory().to(device, non_blocking=True), copies.record_event()
        return read, labels, None  # there is room for one batch at a time

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
        ahead = reader.submit(fetch, chunks[0])
        for i in range(len(chunks)):
            pixels, labels, copied = ahead.result()
            if i + 1 < len(chunks):
                ahead = reader.submit(fetch, chunks[i + 1])
            if copied is not None:
                now = torch.cuda.current_stream(device)
                now.wait_event(copied)
                pixels.record_stream(now)  # or the next copy would overwrite them while this step reads them
                labels.record_stream(now)
            yield pixels.to(device), labels.to(device)


def cache_on_device(splits: Splits, device: torch.device, fraction: float = DEVICE_FRACTION) -> Splits:
    """Copy the splits to a GPU if they take at most `fraction` of its free memory; else return them as they are."""
    if device.type != "cuda":
        return splits  # a store's pages lie in the CPU's memory anyway
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    free, _ = torch.cuda.mem_get_info(device)
    if sum(len(images) * math.prod(images.read(np.arange(1)).shape) for images in parts.values()) > fraction * free:
        return splits
    with suppress_out_of_memory():
        return replace(splits, **{name: copy_to_device(images, device) for name, images in parts.items()})
    return splits  # another process has taken the memory meanwhile


def copy_to_device(images: Images, device: torch.device, at_once: int = 512) -> ArrayImages:
    """Copy all of `images` into one tensor on `device`, `at_once` images at a time."""
    first = images.read(np.arange(1))
    # keeps the memory format that the images are read in
    order = torch.contiguous_format if first.is_contiguous() else torch.channels_last
    shape = (len(images), *first.shape[1:])
    pixels = torch.empty(shape, dtype=first.dtype, device=device, memory_format=order)
    for chunk in np.array_split(np.arange(len(images)), max(1, len(images) // at_once)):
        pixels[chunk[0] : chunk[-1] + 1] = images.read(chunk).to(device)
    return ArrayImages(pixels, images.labels, images.class_names, images.digest)
