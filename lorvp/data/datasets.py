"""Read datasets as uint8 images, limit them, and split them into train, validation and test.

The splits are stratified and seeded lists of rows, the same on every machine. Small sets (CIFAR, digits) keep their
native size and are resized in batches on the device; others are resized once, when they are read or stored.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lorvp.config import DatasetConfig
from lorvp.data import groups, shuffle, store
from lorvp.data.decode import decode
from lorvp.data.sources import folders
from lorvp.data.sources.base import Rows
from lorvp.errors import UserError

SPLITS = ("train", "val", "test")
TEST_FRACTION = 0.2
"""Fraction held back for testing if a dataset has no test split of its own; stratified and always the same."""
IN_MEMORY_BYTES = 4 << 30
"""Largest decoded size of a folder that is decoded once and kept in memory; larger ones are decoded by batch."""
_JPEG_END, _PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"

_decoders = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="decode")

Indices = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class ArrayImages:
    """Hold images in memory: pixels (N, 3, H, W) uint8, labels (N,) int64.

    In place of pixels it may hold a backbone's outputs, as `lorvp.features.cache.Output` describes them.
    """

    pixels: torch.Tensor
    labels: np.ndarray
    class_names: tuple[str, ...]
    known_digest: str = ""
    names: np.ndarray | None = None
    """Paths in the dataset, (N,) of str, of images that were files."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """Digest of the images that `read` returns, without the labels."""
        return self.known_digest or _digest(self.pixels.shape, self.pixels.cpu().contiguous().numpy().data)

    def read(self, indices: Indices, pin: bool = False) -> torch.Tensor:
        """Read the images at `indices` as (len(indices), 3, H, W) uint8; with `pin`, into pinned memory."""
        if self.pixels.is_cuda:
            return self.pixels[torch.as_tensor(indices)]
        # NumPy, because torch would start threads for the reader, and with more threads than cores OpenMP puts the
        # step's threads to sleep after each operation. docs/benchmarks.md says what that costs.
        chosen = torch.from_numpy(self.pixels.numpy()[indices])
        return chosen.pin_memory() if pin else chosen

    def subset(self, indices: np.ndarray) -> ArrayImages:
        """Return the images at `indices`, in that order."""
        names = None if self.names is None else self.names[indices]
        return ArrayImages(self.pixels[torch.as_tensor(indices)], self.labels[indices], self.class_names, names=names)


@dataclass(frozen=True)
class FolderImages:
    """Hold paths of image files, which are decoded and resized to (size, size) when read; labels (N,) int64."""

    paths: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    size: int
    names: np.ndarray
    """Paths in the split's folder, (N,) of str."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """Digest of the files' names, sizes and modification times."""
        stats = [path.stat() for path in self.paths]
        files = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(self.paths, stats, strict=True)]
        return _digest(self.size, repr(files).encode())

    def read(self, indices: Indices, pin: bool = False) -> torch.Tensor:
        """Read images as `ArrayImages.read` does. Raises UserError for an unreadable file."""
        return _decode_batch((self.paths[i] for i in indices), len(indices), self.size, pin)

    def subset(self, indices: np.ndarray) -> FolderImages:
        """Return the images at `indices`, in that order."""
        return replace(self, paths=self.paths[indices], labels=self.labels[indices], names=self.names[indices])


@dataclass(frozen=True)
class StoreImages:
    """Hold rows of a prepared store at (size, size), which are memory-mapped; labels (N,) int64."""

    split: store.Split
    rows: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    size: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> np.ndarray:
        """Paths in the source, (N,) of str."""
        names: np.ndarray = np.array(self.split.names, dtype=object)[self.rows]
        return names

    @cached_property
    def digest(self) -> str:
        """Digest of the store's checksums and the rows."""
        return _digest((self.size, [part.checksum for part in self.split.files.parts]), self.rows.data)

    def read(self, indices: Indices, pin: bool = False) -> torch.Tensor:
        """Read images as `ArrayImages.read` does, with channels last in memory; encoded images are decoded."""
        rows = self.rows[indices]
        if self.split.image_size is None:
            return _decode_batch(map(self.split.encoded, rows), len(rows), self.size, pin)
        pixels, batch = _empty_batch(len(rows), self.size, pin)
        self.split.read(rows, out=pixels)
        return batch

    def subset(self, indices: np.ndarray) -> StoreImages:
        """Return the images at `indices`, in that order."""
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])


Images = ArrayImages | FolderImages | StoreImages


def _digest(about: object, content: bytes | memoryview) -> str:
    digest = hashlib.blake2b(repr(about).encode(), digest_size=16)
    digest.update(content)
    return digest.hexdigest()


def _empty_batch(length: int, size: int, pin: bool) -> tuple[np.ndarray, torch.Tensor]:
    """Allocate a batch; return it as (length, size, size, 3) to be filled, and as (length, 3, size, size)."""
    buffer = torch.empty((length, size, size, 3), dtype=torch.uint8, pin_memory=pin)
    return buffer.numpy(), buffer.permute(0, 3, 1, 2)


def _decode_batch(files: Iterable[Path | bytes], length: int, size: int, pin: bool) -> torch.Tensor:
    """Decode a batch of encoded images in parallel."""
    pixels, batch = _empty_batch(length, size, pin)
    for place, image in enumerate(_decoders.map(lambda file: decode(file, size), files)):
        pixels[place] = image
    return batch


@dataclass(frozen=True)
class Splits:
    """Hold the three splits of a dataset.

    `val` is the dataset's own validation set, or a stratified and seeded part of the training images. With
    `val_fraction: 0` nothing is split off, and `val` is the test set. Under `train_on_val` the images of `val` are also
    the last ones of `train`. With random crops, `train` has images of the size that the crops are taken from.
    """

    train: Images
    val: Images
    test: Images

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        return self.train.class_names


@dataclass(frozen=True)
class Parts:
    """Hold the splits that a dataset comes with; it may have no validation or test images of its own."""

    train: Images
    val: Images | None = None
    test: Images | None = None

    def map(self, change: Callable[[Images], Images]) -> Parts:
        """Apply `change` to every split that exists."""
        return Parts(change(self.train), self.val and change(self.val), self.test and change(self.test))


def image_folder(folder: Path, size: int) -> FolderImages:
    """Read `folder`/CLASS/*, with the classes in sorted order. Raises UserError for a missing or an empty folder."""
    return _files(*folders.class_folders(folder), size)


def _files(class_names: Sequence[str], rows: Rows, size: int) -> FolderImages:
    paths = np.array([Path(rows.root or "", name) for name in rows.names], dtype=object)
    return FolderImages(paths, rows.labels, tuple(class_names), size, np.array(rows.names, dtype=object))


def load(config: DatasetConfig, image_size: int, decode: bool = True) -> Splits:
    """Load the dataset that `config` names: image folders at `image_size`, other datasets at their own size.

    Without `decode`, the files of a folder are neither checked nor decoded before they are read. Raises UserError if it
    is missing, too small, or holds unreadable images that may not be skipped.
    """
    parts = _read(config, image_size, decode)
    train, test = parts.train, parts.test
    assert test is not None  # by _read
    if not config.holds_back:
        kept = np.arange(len(train))
        if config.train_images is not None:
            kept = stratified_sample(train.labels, config.train_images, config.split_seed)[1]
        trained_on = _crop_source(config, image_size, train) if config.crop_flip else train
        return Splits(trained_on.subset(kept), test, test)
    source = train if parts.val is None else parts.val
    ids = _group_ids(config, train) if config.groups and parts.val is None else None
    kept, held_back = _split_indices(config, train.labels, None if parts.val is None else parts.val.labels, ids)
    val = source.subset(held_back)
    if not len(val):
        least = "two images" if ids is None else "two groups"
        raise UserError(f"dataset {config.name}: no class has the {least} that a validation split needs")
    if config.train_on_val:
        if parts.val is not None:
            raise UserError(f"dataset.train_on_val: {config.root} has validation images apart; put them into train")
        kept = np.concatenate([kept, held_back])
    trained_on = _crop_source(config, image_size, train) if config.crop_flip else train
    return Splits(trained_on.subset(kept), val, test)


def _split_indices(
    config: DatasetConfig, labels: np.ndarray, own: np.ndarray | None, ids: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the images to train on and of those to validate on.

    The latter index the `own` labels of a validation set if there is one, else `labels`. Images with the same of `ids`
    stay together. Raises UserError if there are too few images.
    """
    every, seed = np.arange(len(labels)), config.split_seed
    if config.val_from is not None:
        assert config.train_images is not None  # by _has_root
        assert config.val_images is not None
        first, last = config.val_from, config.val_from + config.val_images
        if last > len(labels if own is None else own) or config.train_images > (
            len(labels) if own is not None else first
        ):
            raise UserError(
                f"dataset.val_from: the first {config.train_images:,} images and those from {first:,} to {last - 1:,} "
                f"must be there, and not the same: {config.title} has {len(labels):,} to train on"
                + (f" and {len(own):,} to choose by" if own is not None else "")
            )
        return every[: config.train_images], np.arange(first, last)
    if own is not None:
        val = np.arange(len(own)) if config.val_images is None else stratified_sample(own, config.val_images, seed)[1]
        kept = every
    elif ids is not None:
        fraction = config.val_fraction if config.val_images is None else config.val_images / len(labels)
        assert fraction is not None  # as there are no val_images
        if fraction >= 1:
            raise UserError(
                f"dataset.val_images: {config.val_images} are asked for, and there are {len(labels)} images"
            )
        kept, val = groups.split(labels, ids, fraction, seed)
    elif config.val_images is not None:
        kept, val = stratified_sample(labels, config.val_images, seed)
    else:
        assert config.val_fraction is not None  # as there are no val_images
        kept, val = stratified_split(labels, config.val_fraction, seed)
    if config.train_images is not None:
        kept = kept[stratified_sample(labels[kept], config.train_images, seed)[1]]
    return kept, val


def crop_size(image_size: int) -> int:
    """Return the side of the image that random crops of `image_size` are taken from: 252 for 224, as published."""
    return round(image_size * 252 / 224)


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold back `fraction` of each class, at least one image if a class has two; return sorted (rest, held back)."""
    counts = np.bincount(labels)
    return _hold_back(labels, np.minimum(np.maximum(1, np.round(fraction * counts)), counts - 1), seed)


def stratified_sample(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold back `count` images in the classes' proportions, to the nearest image; return sorted (rest, held back).

    Raises UserError if there are fewer images.
    """
    if count > len(labels):
        raise UserError(f"dataset: {count} images are asked for, and there are {len(labels)}")
    shares = np.bincount(labels) * count / len(labels)
    take = np.floor(shares)
    largest_remainders = np.argsort(take - shares, kind="stable")[: count - int(take.sum())]
    take[largest_remainders] += 1
    return _hold_back(labels, take, seed)


def _hold_back(labels: np.ndarray, take: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold back `take[label]` images of each class; return sorted (rest, held back)."""
    mixed = shuffle.permutation(len(labels), seed)
    by_class = mixed[np.argsort(labels[mixed], kind="stable")]
    counts = np.bincount(labels)
    place_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    held = place_in_class < np.repeat(take, counts)
    return np.sort(by_class[~held]), np.sort(by_class[held])


def _read(config: DatasetConfig, image_size: int, decode: bool = True) -> Parts:
    """Read the splits without unwanted and, with `decode`, without unreadable images.

    The result always has a test set; `max_per_class` does not make it smaller.
    """
    parts = LOADERS[config.name](config, image_size)
    if config.max_classes is not None:
        parts = parts.map(partial(_first_classes, count=config.max_classes))
    train, test = parts.train, parts.test
    if config.groups and parts.val is not None and test is not None:
        raise UserError(f"dataset.groups: {config.title} has validation and test images of its own: leave it out")
    ids = _group_ids(config, train) if config.groups else None
    if ids is not None:
        groups.check(ids, config.title)
    if test is None:
        if ids is not None:
            rest, held_back = groups.split(train.labels, ids, TEST_FRACTION, seed=0)
        else:
            rest, held_back = stratified_split(train.labels, TEST_FRACTION, seed=0)
        train, test = train.subset(rest), train.subset(held_back)
    if config.max_per_class is not None:
        take = np.minimum(np.bincount(train.labels), config.max_per_class)
        train = train.subset(_hold_back(train.labels, take, config.split_seed)[1])
    parts = Parts(train, parts.val, test)
    return parts.map(partial(_readable, skip_unreadable=config.skip_unreadable)) if decode else parts


def _group_ids(config: DatasetConfig, images: Images) -> np.ndarray:
    """Return the group of each image that `dataset.groups` tells apart: (N,) int64."""
    assert config.groups is not None
    assert images.names is not None  # by DatasetConfig: dataset digits alone has none
    column: list[str] = []
    if config.groups.column is not None:
        assert isinstance(images, StoreImages)  # by DatasetConfig
        column = np.array(images.split.column(config.groups.column), dtype=object)[images.rows].tolist()
    return groups.group_ids(config.groups, images.names.tolist(), config.title, column)


def _crop_source(config: DatasetConfig, image_size: int, train: Images) -> Images:
    """Return the images of `train` at the size that crops are taken from; those of native size stay as they are."""
    large = crop_size(image_size)
    if config.name == "digits":
        return train
    if config.name == "store":
        opened = store.Store.open(config.crop_root or config.folder)
        if opened.description.native:
            return train
        check_size(opened, large, wanted="dataset.crop_root needs")
        config = config.model_copy(update={"root": opened.folder})
    crops = _read(config, large).train
    if not np.array_equal(crops.labels, train.labels):
        raise UserError(f"dataset.crop_root: {config.crop_root} has other images than {config.root}")
    return crops


def _first_classes(images: Images, count: int) -> Images:
    """Return the images of the first `count` classes."""
    chosen = images.subset(np.flatnonzero(images.labels < count))
    return replace(chosen, class_names=images.class_names[:count])


def _readable(folder: Images, skip_unreadable: bool) -> Images:
    """Keep the files that can be read, and decode them into memory if they fit; return other images as they are.

    For a folder too large for memory each file's header and end marker are checked. That finds files that are empty,
    truncated or no images, without decoding all of them before every trial.
    """
    if not isinstance(folder, FolderImages):
        return folder
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
    unreadable = [p for p in problems if p]
    good = np.array([i for i, p in enumerate(problems) if not p], dtype=np.int64)
    if unreadable:
        count = len(unreadable)
        listing = "; ".join(unreadable[:3]) + (f"; and {count - 3} more" if count > 3 else "")
        if not skip_unreadable:
            raise UserError(f"{count} unreadable images: {listing}. Set dataset.skip_unreadable: true to go on")
        print(f"skipping {count} unreadable images: {listing}", flush=True)
        if len(np.unique(folder.labels[good])) < len(folder.class_names):
            raise UserError(f"a class has no readable image left: {listing}")
    images: Images = folder
    if pixels is not None:
        images = ArrayImages(pixels, folder.labels, folder.class_names, names=folder.names)
    return images.subset(good) if unreadable else images


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


def _image_folder(config: DatasetConfig, image_size: int) -> Parts:
    """Read an image folder as `folders.image_folder` finds it, and print what is left out."""
    source = folders.image_folder(config.folder)
    for remark in source.remarks(config.folder):
        print(remark, flush=True)
    return Parts(**{split: _files(source.class_names, rows, image_size) for split, rows in source.splits.items()})


def _digits(config: DatasetConfig, image_size: int) -> Parts:
    """Read scikit-learn's 1,797 handwritten digits, 8x8 grey levels 0..16; they have no test split of their own."""
    # read from the package's file: importing scikit-learn would take longer than the quickstart's first epoch
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    grey = torch.from_numpy(np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8))
    pixels = grey[:, None].repeat(1, 3, 1, 1)
    return Parts(ArrayImages(pixels, table[:, -1].astype(np.int64), tuple(str(d) for d in range(10))))


def _store(config: DatasetConfig, image_size: int) -> Parts:
    """Open a store made by `python -m lorvp.data prepare`; resized images are available at their stored size only."""
    opened = store.Store.open(config.folder)
    check_size(opened, image_size, config.exact)
    if "train" not in opened.splits:
        raise UserError(f"{config.root}: {opened.description.dataset} has no images to train on, only to evaluate on")
    return Parts(**{split: store_images(opened, split, image_size) for split in SPLITS if split in opened.splits})


def check_size(opened: store.Store, image_size: int, exact: bool = False, wanted: str = "the backbone takes") -> None:
    """Raise UserError for images resized to another size; with `exact`, also for native images of another size."""
    description = opened.description
    if description.image_size in (None, image_size) or (description.native and not exact):
        return
    wanted = "dataset.exact needs" if description.native else wanted
    folder = opened.folder.with_name(f"{description.dataset}-{image_size}")
    mismatch = f"stored at {description.image_size} px, and {wanted} {image_size}"
    raise UserError(f"{opened.folder}: {mismatch}: {store.how_to_make(folder)}")


def store_images(opened: store.Store, split: str, image_size: int) -> StoreImages:
    """Return all images of one split of a store; encoded ones are decoded to `image_size`."""
    rows, description = opened.splits[split], opened.description
    size = description.image_size or image_size
    return StoreImages(rows, np.arange(len(rows)), rows.labels, description.class_names, size)


LOADERS = {"store": _store, "image_folder": _image_folder, "digits": _digits}
"""Functions from (config, image size) to a dataset's parts, by the name in DatasetConfig."""
