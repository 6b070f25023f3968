"""Datasets as uint8 images: read, limited, split into train, validation and test, and handed out in batches.

Images stay uint8 until they are on the device. Small sets (CIFAR, digits) keep their native size and are resized in
batch by the method; image folders are resized once, when they are read or when a store is made of them.

    python -m lorvp.data prepare NAME --source DIR --out DIR      makes a store; `list`, `info` and `verify` look at it
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lorvp import store
from lorvp.config import DatasetConfig
from lorvp.errors import UserError
from lorvp.images import decode
from lorvp.sources import class_folders

TEST_FRACTION = 0.2
"""Share held back for testing, stratified and always the same, where a dataset has no test split of its own."""
IN_MEMORY_BYTES = 4 << 30
"""Folders that decode to at most this much are decoded once and kept; larger ones are decoded batch by batch."""
_JPEG_END, _PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"

_decoders = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="decode")


@dataclass(frozen=True)
class ArrayImages:
    """Images that lie in memory: pixels (N, 3, H, W) uint8, labels (N,) int64."""

    pixels: torch.Tensor
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The images at `indices` as (len(indices), 3, H, W) uint8."""
        return self.pixels[torch.as_tensor(indices)]

    def subset(self, indices: np.ndarray) -> ArrayImages:
        return ArrayImages(self.pixels[torch.as_tensor(indices)], self.labels[indices], self.class_names)


@dataclass(frozen=True)
class FolderImages:
    """Image files, decoded and resized to (size, size) when they are read; labels (N,) int64."""

    paths: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    size: int

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The images at `indices` as (len(indices), 3, size, size) uint8. Raises UserError for an unreadable file."""
        pixels = list(_decoders.map(lambda i: decode(self.paths[i], self.size), indices))
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    def subset(self, indices: np.ndarray) -> FolderImages:
        return FolderImages(self.paths[indices], self.labels[indices], self.class_names, self.size)


@dataclass(frozen=True)
class StoreImages:
    """Rows of a prepared store, read from the disk's cache when they are needed; labels (N,) int64."""

    split: store.Split
    rows: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The images at `indices` as (len(indices), 3, H, W) uint8, in the order of memory that they are stored in."""
        return torch.from_numpy(self.split.read(self.rows[indices])).permute(0, 3, 1, 2)

    def subset(self, indices: np.ndarray) -> StoreImages:
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])


Images = ArrayImages | FolderImages | StoreImages
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""(n, 3, H, W) uint8 and (n,) int64 at a time."""


@dataclass(frozen=True)
class Splits:
    """The three parts of a dataset; `val` is split off the training images, stratified and seeded."""

    train: Images
    val: Images
    test: Images

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names


def image_folder(folder: Path, size: int) -> FolderImages:
    """The images of `folder`/CLASS/*, classes in sorted order. Raises UserError for a missing or an empty folder."""
    class_names, rows = class_folders(folder)
    return FolderImages(np.array(rows.paths, dtype=object), rows.labels, tuple(class_names), size)


def load(config: DatasetConfig, image_size: int) -> Splits:
    """The dataset that `config` names, ready to train on; image folders at `image_size`, others at their own size.

    Raises UserError when it isn't there, is too small, or holds images that can't be read and may not be skipped.
    """
    train, test = LOADERS[config.name](config, image_size)
    train = _limit(train, config)
    test = _limit(test, config) if test is not None else None
    if isinstance(train, FolderImages):
        train = _readable(train, config.skip_unreadable)
    if isinstance(test, FolderImages):
        test = _readable(test, config.skip_unreadable)
    if test is None:
        rest, held_back = stratified_split(train.labels, TEST_FRACTION, seed=0)
        train, test = train.subset(rest), train.subset(held_back)
    if test.class_names != train.class_names:
        odd = sorted(set(test.class_names) ^ set(train.class_names))
        raise UserError(f"{config.root}: train and test differ in their classes: {', '.join(odd[:5])}")
    kept, val = stratified_split(train.labels, config.val_fraction, seed=config.split_seed)
    if not len(val):
        raise UserError(f"dataset {config.name}: no class has the two images that a validation split needs")
    return Splits(train.subset(kept), train.subset(val), test)


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (rest, held back), both sorted: `fraction` of each class, at least one where a class has two."""
    random = np.random.default_rng(seed)
    held_back = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_back.append(random.permutation(members)[:count])
    held = np.sort(np.concatenate(held_back))
    return np.setdiff1d(np.arange(len(labels)), held), held


def epoch_order(length: int, order_seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, a function of the seed and the epoch alone, so that any epoch can be done again."""
    return np.random.default_rng([order_seed, epoch]).permutation(length)


def batches(images: Images, batch_size: int, order: np.ndarray | None = None) -> Batches:
    """The images in `order`, the last batch shorter, each batch read while the one before is used."""
    order = np.arange(len(images)) if order is None else order
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
        ahead = reader.submit(images.read, chunks[0])
        for i, chunk in enumerate(chunks):
            pixels = ahead.result()
            if i + 1 < len(chunks):
                ahead = reader.submit(images.read, chunks[i + 1])
            yield pixels, torch.from_numpy(images.labels[chunk])


def _limit(images: Images, config: DatasetConfig) -> Images:
    """The first `max_classes` classes and the first `max_per_class` images of each."""
    if config.max_classes is None and config.max_per_class is None:
        return images
    classes = len(images.class_names) if config.max_classes is None else config.max_classes
    keep = np.concatenate([np.flatnonzero(images.labels == c)[: config.max_per_class] for c in range(classes)])
    return replace(images.subset(np.sort(keep)), class_names=images.class_names[:classes])


def _readable(folder: FolderImages, skip_unreadable: bool) -> Images:
    """`folder` without the files that can't be read, decoded into memory where it fits.

    A folder too large to keep is checked by each file's header and end marker: that finds what is empty, truncated
    or no image, without decoding it all before every trial.
    """
    fits = len(folder) * 3 * folder.size**2 <= IN_MEMORY_BYTES
    pixels = torch.empty(len(folder), 3, folder.size, folder.size, dtype=torch.uint8) if fits else None

    def problem(i: int) -> str | None:
        try:
            if pixels is not None:
                pixels[i] = torch.from_numpy(decode(folder.paths[i], folder.size).copy()).permute(2, 0, 1)
            else:
                _check_header(folder.paths[i])
        except UserError as error:
            return str(error)
        return None

    problems = list(_decoders.map(problem, range(len(folder))))
    found = [p for p in problems if p]
    good = np.array([i for i, p in enumerate(problems) if not p], dtype=np.int64)
    if found:
        listing = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
        if not skip_unreadable:
            raise UserError(f"{len(found)} unreadable images: {listing}. Set dataset.skip_unreadable: true to go on")
        print(f"skipping {len(found)} unreadable images: {listing}", flush=True)
        if len(np.unique(folder.labels[good])) < len(folder.class_names):
            raise UserError(f"a class has no readable image left: {listing}")
    images = folder if pixels is None else ArrayImages(pixels, folder.labels, folder.class_names)
    return images.subset(good) if found else images


def _check_header(path: Path) -> None:
    try:
        with Image.open(path) as image:
            kind = image.format
        with open(path, "rb") as file:
            file.seek(-min(64, path.stat().st_size), os.SEEK_END)
            tail = file.read()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error})") from None
    if (kind == "JPEG" and _JPEG_END not in tail) or (kind == "PNG" and _PNG_END not in tail):
        raise UserError(f"{path}: not a readable image (truncated)")


def _image_folder(config: DatasetConfig, image_size: int) -> tuple[Images, Images | None]:
    """`root`/train and `root`/test or, as in ImageNet's layout, `root`/val as the test set; or `root` undivided."""
    root = config.root
    if not (root / "train").is_dir():
        return image_folder(root, image_size), None
    test = root / "test" if (root / "test").is_dir() else root / "val"
    return image_folder(root / "train", image_size), image_folder(test, image_size) if test.is_dir() else None


def _digits(config: DatasetConfig, image_size: int) -> tuple[Images, Images | None]:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey levels 0..16; it has no test split of its own."""
    # read beside the package: importing scikit-learn would take longer than the quickstart's first epoch
    package = Path(importlib.util.find_spec("sklearn").origin).parent
    table = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    grey = torch.from_numpy(np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8))
    pixels = grey[:, None].repeat(1, 3, 1, 1)
    return ArrayImages(pixels, table[:, -1].astype(np.int64), tuple(str(d) for d in range(10))), None


def _store(config: DatasetConfig, image_size: int) -> tuple[Images, Images | None]:
    """A store that `python -m lorvp.data prepare` has made; of images resized then only at that size."""
    opened = store.Store.open(config.root)
    check_size(opened, image_size)
    if "train" not in opened.splits:
        raise UserError(f"{config.root}: {opened.description.dataset} has no images to train on, only to evaluate on")
    return stored(opened, "train"), stored(opened, "test") if "test" in opened.splits else None


def check_size(opened: store.Store, image_size: int) -> None:
    """Raises UserError for images that were resized to another size than the backbone's."""
    description = opened.description
    if description.transform and description.image_size != image_size:
        folder = opened.folder.with_name(f"{description.dataset}-{image_size}")
        raise UserError(
            f"{opened.folder}: stored at {description.image_size} px, and the backbone takes {image_size}: "
            f"{store.how_to_make(folder)}"
        )


def stored(opened: store.Store, split: str) -> StoreImages:
    """All images of one split of a store."""
    rows = opened.splits[split]
    return StoreImages(rows, np.arange(len(rows)), rows.labels, opened.description.class_names)


LOADERS = {"store": _store, "image_folder": _image_folder, "digits": _digits}
"""name -> (config, image size) -> (train, test or None). A dataset is a function here and a name in DatasetConfig."""


if __name__ == "__main__":
    from lorvp import cli
    from lorvp.prepare import app

    cli.run(app)
