from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make
from PIL import Image

from lorvp.config import DatasetConfig
from lorvp.data import datasets, loader
from lorvp.errors import UserError


def folder_config(root: Path, **changes) -> DatasetConfig:
    fraction = {} if "val_images" in changes else {"val_fraction": 0.25}
    return DatasetConfig(**{"name": "image_folder", "root": root} | fraction | changes)


def test_image_folder_is_the_published_resize(image_root):
    splits = datasets.load(folder_config(image_root), 32)
    assert splits.class_names == ("n01", "n02", "n03")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (18, 6, 12)
    with Image.open(image_root / "val" / "n02" / "0.JPEG") as image:
        expected = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(splits.test.read([4])[0].permute(1, 2, 0).numpy(), expected)


def test_large_folders_are_read_batch_by_batch_alike(image_root, monkeypatch):
    kept = datasets.load(folder_config(image_root), 32)
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    read = datasets.load(folder_config(image_root), 32)
    assert isinstance(read.train, datasets.FolderImages)
    for (a, la), (b, lb) in zip(loader.batches(kept.train, 5), loader.batches(read.train, 5), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)


def test_validation_split_is_stratified_and_seeded():
    labels = np.repeat([0, 1, 2], [100, 50, 3])
    rest, held = datasets.stratified_split(labels, 0.1, seed=0)
    assert np.bincount(labels[held]).tolist() == [10, 5, 1]
    assert sorted([*rest, *held]) == list(range(153))
    assert np.array_equal(held, datasets.stratified_split(labels, 0.1, seed=0)[1])
    assert not np.array_equal(held, datasets.stratified_split(labels, 0.1, seed=1)[1])


def test_order_is_a_function_of_seed_and_epoch():
    order = loader.epoch_order(50, 3, 7)
    assert sorted(order) == list(range(50))
    assert np.array_equal(order, loader.epoch_order(50, 3, 7))
    assert not np.array_equal(order, loader.epoch_order(50, 3, 8))
    assert not np.array_equal(order, loader.epoch_order(50, 4, 7))


def test_every_image_once_in_batches(image_root):
    splits = datasets.load(folder_config(image_root), 8)
    order = loader.epoch_order(18, 0, 1)
    sizes, labels = zip(*((len(x), y) for x, y in loader.batches(splits.train, 5, order)), strict=True)
    assert sizes == (5, 5, 5, 3)
    assert np.array_equal(torch.cat(labels).numpy(), splits.train.labels[order])


def test_limits(image_root):
    splits = datasets.load(folder_config(image_root, max_classes=2, max_per_class=4), 8)
    assert splits.class_names == ("n01", "n02")
    assert (len(splits.train) + len(splits.val), len(splits.test)) == (8, 8)


def used(splits: datasets.Splits) -> set[bytes]:
    """The images to train and to choose by."""
    both = (part.read([i]).numpy().tobytes() for part in (splits.train, splits.val) for i in range(len(part)))
    return set(both)


@pytest.mark.parametrize("kind", ["digits", "divided folder", "undivided folder", "store"])
def test_a_few_of_each_class_are_drawn_by_the_seed_and_the_test_set_stays(image_root, tmp_path, kind):
    config = {
        "digits": lambda: DatasetConfig(name="digits"),
        "divided folder": lambda: folder_config(image_root),
        "undivided folder": lambda: folder_config(image_root / "train"),
        "store": lambda: folder_config(make("image_folder", image_root, tmp_path, size=8).folder, name="store"),
    }[kind]()
    whole = datasets.load(config, 8)

    def few(seed: int) -> datasets.Splits:
        return datasets.load(config.model_copy(update={"max_per_class": 4, "split_seed": seed}), 8)

    one, again, other = few(0), few(0), few(1)
    for found in (one, again, other):
        assert np.bincount([*found.train.labels, *found.val.labels]).tolist() == [4] * len(whole.class_names)
        every = range(len(whole.test))
        assert torch.equal(found.test.read(every), whole.test.read(every))
    assert used(one) == used(again) != used(other)
    assert used(one) <= used(whole)
    labels = whole.train.labels
    first = np.concatenate([np.flatnonzero(labels == label)[:4] for label in np.unique(labels)])
    assert not used(one) <= {whole.train.read([i]).numpy().tobytes() for i in first}


def pixels(images: datasets.Images) -> torch.Tensor:
    return images.read(range(len(images)))


@pytest.mark.parametrize("stored", [False, True])
def test_positions_in_place_of_draws(image_root, tmp_path, stored):
    """As VTAB takes them: the first images, and so many from a place on, whatever their classes."""
    config = folder_config(image_root)
    if stored:
        config = folder_config(make("image_folder", image_root, tmp_path, size=8).folder, name="store")
    rows = datasets.image_folder(image_root / "train", 8)

    def load(**changes: object) -> datasets.Splits:
        values = config.model_dump(exclude={"val_fraction"}) | {"train_images": 10, "val_images": 3} | changes
        return datasets.load(DatasetConfig(**values), 8)

    for seed in (0, 1):
        found = load(val_from=20, split_seed=seed)
        assert torch.equal(pixels(found.train), rows.read(range(10)))
        assert torch.equal(pixels(found.val), rows.read(range(20, 23)))
        assert found.val.labels.tolist() == [2] * 3
        assert len(found.test) == 12
    for first in (9, 22):
        with pytest.raises(
            UserError, match=rf"dataset.val_from: the first 10 images and those from {first} to .* has 24 to"
        ):
            load(val_from=first)
    assert len(load(val_from=21).val) == 3
    shutil.copytree(image_root / "val", image_root / "test")
    if not stored:  # with validation images of its own it is a place among those
        found = load(val_from=1)
        assert torch.equal(pixels(found.train), rows.read(range(10)))
        assert torch.equal(pixels(found.val), datasets.image_folder(image_root / "val", 8).read(range(1, 4)))
        with pytest.raises(UserError, match=r"those from 10 to 12 .* has 24 to train on and 12 to choose by"):
            load(val_from=10)


@pytest.mark.parametrize(
    "changes", [{}, {"val_images": 6, "train_images": 10}, {"val_images": 6, "train_images": 10, "val_from": 12}]
)
@pytest.mark.parametrize("crop_flip", [False, True])
def test_the_last_training_is_on_the_validation_images_too(image_root, changes, crop_flip):
    config = folder_config(image_root, crop_flip=crop_flip, **changes)
    apart, together = (datasets.load(config.model_copy(update={"train_on_val": on}), 8) for on in (False, True))
    assert len(together.train) == len(apart.train) + len(apart.val) == (16 if changes else 24)
    assert torch.equal(pixels(together.val), pixels(apart.val))
    last = range(len(apart.train), len(together.train))
    assert together.train.labels[last].tolist() == apart.val.labels.tolist()
    assert torch.equal(together.train.read(range(len(apart.train))), pixels(apart.train))
    if not crop_flip:
        assert torch.equal(together.train.read(last), pixels(apart.val))
    shutil.copytree(image_root / "val", image_root / "test")
    with pytest.raises(UserError, match=r"train_on_val: .* has validation images apart; put them into train"):
        datasets.load(folder_config(image_root, train_on_val=True), 8)


def test_digits_have_a_test_split_of_their_own():
    splits = datasets.load(DatasetConfig(name="digits"), 32)
    assert len(splits.train) + len(splits.val) + len(splits.test) == 1797
    assert splits.train.read([0]).shape == (1, 3, 8, 8)
    assert splits.train.read(range(100)).max() == 255


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    "damage",
    [truncate, lambda p: p.write_bytes(b""), lambda p: p.write_text("a text"), lambda p: p.unlink() or p.symlink_to(p)],
)
def test_unreadable_images_are_named_and_counted(image_root, monkeypatch, capsys, damage, in_memory):
    if not in_memory:
        monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    for name in ("3.JPEG", "5.JPEG"):
        damage(image_root / "train" / "n02" / name)
    with pytest.raises(UserError, match=r"2 unreadable images: .*n02/3\.JPEG.*skip_unreadable"):
        datasets.load(folder_config(image_root), 32)
    splits = datasets.load(folder_config(image_root, skip_unreadable=True), 32)
    assert len(splits.train) + len(splits.val) == 22
    assert "skipping 2 unreadable images" in capsys.readouterr().out


def test_odd_but_readable_images(image_root):
    folder = image_root / "train" / "n01"
    modes = ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"]
    for mode in modes:
        suffix = "tif" if mode == "CMYK" else "png"
        Image.new(mode, (20, 30)).save(folder / f"mode {mode.replace(';', '')} ü.{suffix}")
    splits = datasets.load(folder_config(image_root), 16)
    assert len(splits.train) + len(splits.val) == 24 + len(modes)


def test_folders_that_are_not_datasets(image_root, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        datasets.load(folder_config(tmp_path / "nowhere"), 8)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        datasets.load(folder_config(tmp_path / "bare"), 8)
    (image_root / "train" / "n04").mkdir()
    with pytest.raises(UserError, match="n04: a class folder without images"):
        datasets.load(folder_config(image_root), 8)
    (image_root / "train" / "n04").rmdir()
    (image_root / "val" / "n03").rename(image_root / "val" / "n09")
    with pytest.raises(UserError, match="val: its class folders are not those of the other split: n03, n09"):
        datasets.load(folder_config(image_root), 8)
