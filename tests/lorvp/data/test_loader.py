"""The way from images to the device: resizing, orders, crops, and several processes at one trial."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from support import stops
from support.waiting import wait_for

from lorvp.config import DatasetConfig
from lorvp.data import augment, datasets, loader, shuffle
from lorvp.data.datasets import ArrayImages, crop_size
from lorvp.data.resize import resize
from lorvp.errors import UserError
from lorvp.training import launch
from lorvp.training.checkpoint import CHECKPOINT
from lorvp.training.loop import train


def by_pil(images: np.ndarray, size: int) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), Image.Resampling.BILINEAR)) for i in images])


def both_ways(images: np.ndarray, size: int) -> tuple[int, int]:
    """The largest difference to PIL, of the way that GPUs take and of the CPU's."""
    expected = by_pil(images, size).astype(int)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    ways = (resize(batch, size, exact=True), resize(batch, size))
    return tuple(np.abs(way.permute(0, 2, 3, 1).numpy() - expected).max() for way in ways)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(28, 28, 224), (32, 32, 224), (32, 32, 252), (64, 64, 224), (8, 8, 32), (252, 252, 224), (500, 333, 224)],
)
def test_resizing_is_pils(height, width, size):
    images = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    exact, on_cpu = both_ways(images, size)
    assert exact <= (0 if height == width else 1)
    assert on_cpu <= (0 if height in (28, 32) and size == 224 else 2)


@pytest.mark.parametrize("side", [32, 28, 64, 200])
def test_resizing_real_photos_is_pils(imagenette, side):
    folder, _ = imagenette
    photos = [Image.open(path).convert("RGB") for path in sorted(folder.glob("val/*/*"))[::25]]
    images = np.stack([np.asarray(photo.resize((side, side), Image.Resampling.BICUBIC)) for photo in photos])
    exact, on_cpu = both_ways(images, 224)
    assert exact == 0
    assert on_cpu <= (0 if side in (28, 32) else 2)


def test_orders_are_the_same_everywhere():
    """These numbers were printed once: whoever gets others has another order than everybody else."""
    assert shuffle.permutation(8, 3, 7).tolist() == ORDER
    order = loader.epoch_order(500, 3, 7)
    assert sorted(order) == list(range(500))
    assert not np.array_equal(order, loader.epoch_order(500, 3, 8))
    assert not np.array_equal(order, loader.epoch_order(500, 4, 7))
    # no trace of the place that an image started from
    places = np.mean([shuffle.permutation(100, seed) for seed in range(2000)], axis=0)
    assert np.abs(places - 49.5).max() < 4.5 * np.sqrt((100**2 - 1) / 12 / 2000)


ORDER = [6, 5, 7, 3, 2, 1, 4, 0]


def arrays(count: int, side: int = 8) -> ArrayImages:
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (count, 3, side, side), dtype=np.uint8))
    return ArrayImages(pixels, np.arange(count) % 3, ("a", "b", "c"))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_image_once(processes):
    images, order = arrays(25), loader.epoch_order(25, 0, 1)
    seen = [
        torch.cat([pixels for pixels, _ in loader.batches(images, 8, order, share=(rank, processes))])
        for rank in range(processes)
    ]
    together = torch.cat(seen)
    assert len(together) == 25
    assert sorted(p.sum().item() for p in together) == sorted(p.sum().item() for p in images.pixels)


def test_kept_in_one_tensor_is_the_same(image_root):
    splits = datasets.load(DatasetConfig(name="image_folder", root=image_root, val_fraction=0.25), 16)
    for images in (splits.train, arrays(9)):
        kept = loader.copy_to_device(images, torch.device("cpu"), at_once=4)
        order = np.random.default_rng(0).permutation(len(images))
        assert torch.equal(kept.read(order), images.read(order))
        assert kept.read(order).stride() == images.read(order).stride()


def test_reading_ahead_starts_no_threads():
    """Those that torch would start for the reader keep the step's from going on at once."""
    images, threads = arrays(64, side=64), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as reader:
            counts = [
                reader.submit(lambda work=work: (work(), psutil.Process().num_threads())[1]).result()
                for work in (lambda: None, lambda: images.read(np.arange(64)), lambda: images.pixels[torch.arange(64)])
            ]
    finally:
        torch.set_num_threads(threads)
    assert counts == [counts[0], counts[0], counts[0] + 1]


def test_crops_are_windows_of_the_image_half_of_them_mirrored():
    images = arrays(200, crop_size(16)).pixels
    crops = augment.crop_and_flip(images, 16, shuffle.uniform(np.arange(200), 3, 0))
    found = set()
    for image, crop in zip(images, crops, strict=True):
        windows = {
            (top, left, flip): (window.flip(-1) if flip else window)
            for top in range(3)
            for left in range(3)
            for flip in (False, True)
            for window in [image[:, top : top + 16, left : left + 16]]
        }
        (which,) = [where for where, window in windows.items() if torch.equal(window, crop)]
        found.add(which)
    assert len(found) == 18


def test_crops_depend_on_neither_processes_nor_an_interruption(digits, tmp_path):
    images, places = arrays(10, 8).pixels, np.arange(10)
    whole = augment.crop_and_flip(images, 8, shuffle.uniform(places, 3, 1))
    for rank in range(2):
        part = augment.crop_and_flip(images[rank::2], 8, shuffle.uniform(places[rank::2], 3, 1))
        assert torch.equal(part, whole[rank::2])
    dataset = {"name": "digits", "max_per_class": 20, "val_fraction": 0.2, "crop_flip": True}
    config = digits(dataset=dataset, epochs=2)
    expected = [r.train_loss for r in train(config)]
    assert expected != [r.train_loss for r in train(digits(epochs=2))]
    stop = stops.from_call(3)
    assert not list(train(config, folder=tmp_path, should_stop=stop))
    assert [r.train_loss for r in train(config, resume_from=tmp_path / CHECKPOINT)] == expected


def test_crops_of_a_folder_come_from_larger_images_and_validation_does_not(image_root):
    config = DatasetConfig(name="image_folder", root=image_root, val_fraction=0.25, crop_flip=True)
    splits = datasets.load(config, 32)
    plain = datasets.load(config.model_copy(update={"crop_flip": False}), 32)
    assert splits.train.read([0]).shape == (1, 3, 36, 36)
    assert np.array_equal(splits.train.labels, plain.train.labels)
    assert torch.equal(splits.val.read(range(6)), plain.val.read(range(6)))


def test_a_split_of_800_and_200():
    labels = np.repeat(np.arange(7), [900, 300, 50, 7, 100, 100, 43])
    pixels = torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8)
    pixels[:] = torch.arange(len(labels)).view(-1, 1, 1, 1) % 251
    images = ArrayImages(pixels, labels, tuple("abcdefg"))
    rest, val = datasets.stratified_sample(labels, 200, seed=0)
    assert (len(val), len(rest)) == (200, 1300)
    assert np.abs(np.bincount(labels[val]) - np.bincount(labels) * 200 / 1500).max() < 1
    _, train_part = datasets.stratified_sample(labels[rest], 800, seed=0)
    assert len(train_part) == 800
    assert not set(rest[train_part]) & set(val)
    assert len(images.subset(rest[train_part])) == 800
    with pytest.raises(UserError, match="1501 images are asked for, and there are 1500"):
        datasets.stratified_sample(labels, 1501, seed=0)


def test_a_trial_on_800_and_200(digits):
    config = digits(dataset={"name": "digits", "train_images": 80, "val_images": 20})
    splits = datasets.load(config.dataset, 32)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (80, 20, 359)


WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["lorvp.training", "sklearn.datasets"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"head": {"init": "fitted", "fit": 1e-3}},
        {"head": {"kind": "ilm"}},
        {"head": {"kind": "ilm", "counting": "streamed"}},
    ],
)
def test_two_processes_give_what_one_gives(digits, tmp_path, monkeypatch, changes):
    """With an odd last batch of one image, so that one process has none of it; stopped and continued, too."""
    if changes["head"].get("kind") == "ilm":  # once, the other process has to import its libraries, as it does in a job
        monkeypatch.setattr(launch.multiprocessing, "get_context", lambda _: WARM)
    dataset = {"name": "digits", "train_images": 161, "val_images": 41, "crop_flip": True}
    # SGD: Adam's first steps have the size of the learning rate also where a gradient is rounding alone
    given = {"dataset": dataset, "prompt": {"lr": 2.0, "optimizer": "sgd"}, "optimizer": {"lr": 0.1}} | changes
    config = digits(**given, precision="fp32", batch_size=32, epochs=3)
    alone = list(train(config))
    (tmp_path / "whole").mkdir()
    monkeypatch.setenv("LORVP_CACHE", str(tmp_path / "cache"))
    together = []
    for result in launch.train(config, 2, folder=tmp_path / "whole"):
        together.append(result)
        for other in multiprocessing.active_children():  # as SLURM does, to all of a job's processes
            for signum in launch.LEFT_TO_THE_FIRST:
                os.kill(other.pid, signum)
    assert len(together) == 3
    for one, two in zip(alone, together, strict=True):
        assert two.train_loss == pytest.approx(one.train_loss, abs=1e-5)
        assert two.val_loss == pytest.approx(one.val_loss, abs=1e-5)
        assert (two.val_top1, two.test_top1) == pytest.approx((one.val_top1, one.test_top1))
    assert (tmp_path / "whole" / "bundle").is_dir()
    stop = stops.from_call(12)
    first = list(launch.train(config, 2, folder=tmp_path, should_stop=stop))
    assert len(first) < 3
    continued = list(launch.train(config, 2, folder=tmp_path, resume_from=tmp_path / CHECKPOINT))
    assert [r.train_loss for r in continued] == pytest.approx([r.train_loss for r in together], abs=1e-9)


ENDING = """
import multiprocessing, os, sys
from lorvp.training import launch
if __name__ == "__main__":
    other = multiprocessing.get_context("spawn").Process(target=launch._end_with_the_first)
    other.start()
    print(other.pid, flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_the_others_end_with_the_first_process(tmp_path):
    (tmp_path / "ending.py").write_text(ENDING)
    killed = subprocess.run([sys.executable, tmp_path / "ending.py"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    wait_for("end of the other process", lambda: not psutil.pid_exists(int(killed.stdout)))


def leave(rank: int, processes: int, folder: str, *others: object) -> None:
    launch._join_group(rank, processes, folder)
    sys.exit(3)


@pytest.mark.slow
def test_a_process_that_fails_is_told(digits, monkeypatch):
    monkeypatch.setattr(launch, "_take_part", leave)
    with pytest.raises(RuntimeError, match="process 1 of the trial's 2 has ended with exit code 3"):
        list(launch.train(digits(), 2))
