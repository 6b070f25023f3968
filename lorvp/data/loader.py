"""From images to batches on the device: their order, the way there, and random crops.

Batches travel as uint8, read while the one before is used, and on a GPU copied there meanwhile, too. What fits is kept
on the device whole. The order of a run is a function of its seed and the epoch, and of nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from lorvp.data import shuffle
from lorvp.data.datasets import ArrayImages, Images, Splits
from lorvp.utils.device import suppress_out_of_memory

DEVICE_SHARE = 0.25
"""Of the GPU's free memory, what a dataset may take to be kept there."""
CPU = torch.device("cpu")

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""(n, 3, H, W) uint8 and (n,) int64 at a time, on the device."""


def epoch_order(length: int, order_seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, so that any epoch can be done again."""
    return shuffle.permutation(length, order_seed, epoch)


def batches(
    images: Images,
    batch_size: int,
    order: np.ndarray | None = None,
    device: torch.device = CPU,
    share: tuple[int, int] = (0, 1),
) -> Batches:
    """The images in `order` on `device`, the last batch shorter.

    Of n processes the i-th, `share` = (i, n), gets every n-th image of each batch: together they see each image once.
    """
    order = np.arange(len(images)) if order is None else order
    if not len(order):
        return
    starts = [*range(0, len(order), batch_size), len(order)]
    chunks = [order[start:stop][share[0] :: share[1]] for start, stop in pairwise(starts)]
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(chunk: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]:
        labels = torch.from_numpy(images.labels[chunk])
        if copies is None:
            return images.read(chunk), labels, None
        read = images.read(chunk, pin=True)
        with suppress_out_of_memory(), torch.cuda.stream(copies):
            # torch keeps pinned memory from being used again before such a copy of it is through
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
                pixels.record_stream(now)  # or their memory would be the next copy's while this step still reads it
                labels.record_stream(now)
            yield pixels.to(device), labels.to(device)


def kept_on_device(splits: Splits, device: torch.device, share: float = DEVICE_SHARE) -> Splits:
    """The same images, on the GPU already if they take no more than `share` of what is free there."""
    if device.type != "cuda":
        return splits  # a store's pages lie in the CPU's memory anyway
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    free, _ = torch.cuda.mem_get_info(device)
    if sum(len(images) * math.prod(images.read(np.arange(1)).shape) for images in parts.values()) > share * free:
        return splits
    with suppress_out_of_memory():
        return replace(splits, **{name: on_device(images, device) for name, images in parts.items()})
    return splits  # another process has taken the memory meanwhile


def on_device(images: Images, device: torch.device, at_once: int = 512) -> ArrayImages:
    """All of `images`, in one tensor on `device`."""
    first = images.read(np.arange(1))
    # in the order of memory that they are read in: pixel by pixel, or colour by colour
    order = torch.contiguous_format if first.is_contiguous() else torch.channels_last
    shape = (len(images), *first.shape[1:])
    pixels = torch.empty(shape, dtype=first.dtype, device=device, memory_format=order)
    for chunk in np.array_split(np.arange(len(images)), max(1, len(images) // at_once)):
        pixels[chunk[0] : chunk[-1] + 1] = images.read(chunk).to(device)
    return ArrayImages(pixels, images.labels, images.class_names, images.digest)
