"""Validation images that are nearly training images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from lorvp.config import DatasetConfig
from lorvp.data import __main__ as command
from lorvp.data import datasets, duplicates


def scene(random: np.random.Generator, size: int = 64) -> Image.Image:
    """A smooth picture, as photos are."""
    small = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def changed(image: Image.Image, frame: int) -> Image.Image:
    """The image as it is, saved again, made smaller, brighter, or shifted by a pixel."""
    if frame == 1:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=50)
        return Image.open(buffer).convert("RGB")
    if frame == 2:
        return image.resize((40, 40), Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BILINEAR)
    if frame == 3:
        return image.point(lambda level: int(level * 0.8 + 20))
    return image


def tracks(root: Path, each: int, frames: int) -> Path:
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for track in range(each):
            image = scene(random)
            for frame in range(frames):
                changed(image, frame).save(root / name / f"{track:03}_{frame}.png")
    return root


def config(root: Path, **options) -> DatasetConfig:
    return DatasetConfig(**{"name": "image_folder", "root": root, "val_fraction": 0.25} | options)


@pytest.mark.parametrize("kind", ["folder", "store", "encoded"])
def test_frames_of_a_track_on_both_sides_are_found_and_groups_part_them(tmp_path, kind):
    root, options = tracks(tmp_path / "signs", 15, 4), {}
    if kind != "folder":
        size = None if kind == "encoded" else 48
        root = make("image_folder", root, tmp_path, size=size, encoded=kind == "encoded").folder
        options = {"name": "store"}
    mixed, apart = config(root, **options), config(root, **options, groups={"pattern": "(.+)_"})
    found = duplicates.find(mixed)
    assert found.looked_at == found.there
    splits = datasets.load(mixed, 48)
    of_track = {name.rpartition("_")[0] for name in splits.train.names}
    also_trained_on = [name for name in splits.val.names if name.rpartition("_")[0] in of_track]
    assert [val for val, _ in found.pairs] == also_trained_on
    assert all(val.rpartition("_")[0] == train.rpartition("_")[0] for val, train in found.pairs)
    val, train = found.pairs[0]
    assert found.line(mixed) == (
        f"{len(found.pairs)} of {len(splits.val)} val images are near-duplicates of training images, "
        f"as {val} of {train}: val may not show the gain; dataset.groups keeps images that belong together on one side"
    )
    assert duplicates.find(apart).pairs == []
    assert duplicates.find(apart).line(apart) is None


def test_a_sample_of_a_large_set_has_the_neighbours_of_its_validation_images(tmp_path, monkeypatch):
    root = tracks(tmp_path / "signs", 60, 4)
    every = duplicates.find(config(root))
    monkeypatch.setattr(duplicates, "MAX_FILES", 100)
    sample = duplicates.find(config(root))
    assert sample.looked_at == (20, 80)
    assert sample.there == every.looked_at
    assert len(sample.pairs) / 20 > 0.9 * len(every.pairs) / every.looked_at[0]
    assert f"(80 of {every.looked_at[1]} were compared)" in sample.line(config(root))


def test_digits_and_pictures_that_are_alike_are_none(tmp_path):
    """Also not flat images, which have no picture to compare."""
    pixels, labels = load_digits(return_X_y=True)
    for place, (image, label) in enumerate(zip(pixels[:600], labels, strict=False)):
        folder = tmp_path / "digits" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.reshape(8, 8) * 15).astype(np.uint8)).save(folder / f"{place:04}.png")
    for level in range(40):
        Image.new("L", (8, 8), level).save(tmp_path / "digits" / "0" / f"flat{level}.png")
    assert duplicates.find(config(tmp_path / "digits")).pairs == []


@pytest.mark.parametrize(
    ("pairs", "images", "said"), [(4, 100, False), (5, 100, True), (9, 1_000, False), (10, 1_000, True)]
)
def test_a_few_are_not_worth_a_word(pairs, images, said):
    found = duplicates.Duplicates([("a", "b")] * pairs, (images, 900), (images, 900))
    assert (found.line(config(Path("/data"))) is not None) == said
    by_test = DatasetConfig(name="store", root=Path("/data"), val_fraction=0)
    assert not said or "test may not show the gain" in found.line(by_test)


def test_thumbnails_are_compared_without_brightness_and_contrast():
    random = np.random.default_rng(0)
    image = torch.from_numpy(np.array(scene(random))).permute(2, 0, 1)
    pictures = torch.stack([image, (image * 0.5 + 60).byte(), 255 - image])
    images = datasets.ArrayImages(pictures, np.zeros(3, np.int64), ("a",))
    thumbnails = duplicates._thumbnails(images, np.arange(3))
    same, inverse = thumbnails[0] @ thumbnails[1], thumbnails[0] @ thumbnails[2]
    assert same > duplicates.SAME
    assert inverse < -duplicates.SAME


def test_the_command_prints_the_line_alone(tmp_path):
    root = tracks(tmp_path / "signs", 15, 4)
    (root / "notes.txt").write_text("left out, which is remarked")
    run = CliRunner().invoke(command.app, ["duplicates", config(root).model_dump_json()])
    assert run.exit_code == 0
    assert run.stdout.count("\n") == 1
    assert "are near-duplicates of training images" in run.stdout
    assert not CliRunner().invoke(command.app, ["duplicates", '{"name": "digits"}']).stdout
    with pytest.raises(Exception, match=r"DATASET: .*needs root"):
        CliRunner().invoke(command.app, ["duplicates", '{"name": "store"}'], catch_exceptions=False)
