"""Prepared stores: every layout, everything that can be wrong with files, and what a trial reads from them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torchvision
from conftest import digits_values, make, photo
from PIL import Image
from torchvision import transforms
from typer.testing import CliRunner

from lorvp.config import DatasetConfig, TrialConfig
from lorvp.data import __main__ as data
from lorvp.data import datasets, decode, prepare, sources, store
from lorvp.data.prepare import PART_BYTES
from lorvp.data.sources.base import Rows, Source
from lorvp.errors import UserError
from lorvp.training.loop import train


def test_an_image_folder_is_what_torchvision_reads(image_root, tmp_path):
    resize = transforms.Compose([transforms.Resize((32, 32)), transforms.PILToTensor()])
    opened = make("image_folder", image_root, tmp_path, size=32)
    for split, folder in (("train", "train"), ("test", "val")):
        expected = torchvision.datasets.ImageFolder(image_root / folder, resize)
        kept = opened.splits[split]
        assert list(opened.description.class_names) == expected.classes
        assert kept.labels.tolist() == expected.targets
        pixels = kept.read(np.arange(len(kept)))
        assert all(np.array_equal(pixels[i].transpose(2, 0, 1), image) for i, (image, _) in enumerate(expected))
        assert [Path(path).name for path, _ in expected.samples] == [Path(name).name for name in kept.names]
        sources_of = [zlib.crc32((image_root / folder / name).read_bytes()) for name in kept.names]
        parts = [store.open_file(opened.folder / part.name) for part in kept.files.parts]
        batches = [part.get_batch(i) for part in parts for i in range(part.num_record_batches)]
        assert [crc for batch in batches for crc in batch.column("source").to_pylist()] == sources_of
        metadata = json.loads(parts[0].schema.metadata[store.METADATA_KEY])
        assert metadata["class_names"] == expected.classes
    assert "bilinear with antialias to 32x32" in opened.description.transform


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Files of few images, so that a store has many."""
    monkeypatch.setattr(prepare, "PART_BYTES", 5 * 3 * 16**2)


def test_batches_from_many_files(image_root, tmp_path, small_parts):
    opened = make("image_folder", image_root, tmp_path, size=16)
    kept = opened.splits["train"]
    assert [file.rows for file in kept.files.parts] == [4, 5, 5, 5, 5]
    order = np.random.default_rng(0).permutation(len(kept))
    whole = np.stack([decode.decode(image_root / "train" / name, 16) for name in kept.names])
    assert np.array_equal(kept.read(order), whole[order])


ODD = {
    "alpha.png": lambda: Image.new("RGBA", (40, 40), (10, 20, 30, 0)),
    "palette.png": lambda: Image.new("RGB", (40, 40), (200, 0, 0)).convert("P"),
    "cmyk.jpg": lambda: Image.new("CMYK", (40, 40), (10, 20, 30, 40)),
    "grey.png": lambda: Image.new("L", (40, 40), 99),
    "deep.png": lambda: Image.fromarray(np.full((40, 40), 99 * 256 + 7, dtype=np.uint16)),
}


def test_images_of_every_mode(tmp_path):
    names = {"alpha.png": (10, 20, 30), "palette.png": (200, 0, 0), "grey.png": (99,) * 3, "deep.png": (99,) * 3}
    for name, image in ODD.items():
        image().save(tmp_path / name)
        pixels = decode.decode(tmp_path / name, 16)
        assert pixels.shape == (16, 16, 3)
        if name in names:
            assert np.abs(pixels.astype(int) - names[name]).max() <= (5 if name == "palette.png" else 1)
    frames = [Image.new("RGB", (40, 40), color) for color in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    assert decode.decode(tmp_path / "animated.gif", 16)[0, 0].tolist() == [255, 0, 0]
    rotated = Image.new("RGB", (40, 20), (1, 2, 3))
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "rotated.jpg", exif=exif)
    assert decode.decode(tmp_path / "rotated.jpg", 16).shape == (16, 16, 3)


def spoil(root: Path) -> dict[str, Path]:
    """Files that can't be read, in an image folder."""
    folder = root / "train" / "n02"
    whole = (folder / "0.JPEG").read_bytes()
    bad = {name: folder / name for name in ("truncated.jpg", "empty.jpg", "text.jpg")}
    bad["truncated.jpg"].write_bytes(whole[: len(whole) // 2])
    bad["empty.jpg"].write_bytes(b"")
    bad["text.jpg"].write_text("this is no image")
    return bad


def test_unreadable_images_are_named_or_left_out(image_root, tmp_path, small_parts):
    bad = spoil(image_root)
    with pytest.raises(UserError, match="3 unreadable images") as caught:
        make("image_folder", image_root, tmp_path, size=16)
    assert all(path.name in str(caught.value) for path in bad.values())
    assert not (tmp_path / "image_folder-16" / "store.json").exists()
    opened = make("image_folder", image_root, tmp_path, size=16, skip_unreadable=True)
    kept = opened.splits["train"]
    assert len(kept) == 24
    whole = np.stack([decode.decode(image_root / "train" / name, 16) for name in kept.names])
    assert np.array_equal(kept.read(np.arange(24)), whole)
    assert not list(opened.folder.glob("*.json*"))[1:]


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    photo(tmp_path / "large.png", size=200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150**2)
    with pytest.raises(UserError, match="decompression bomb"):
        decode.decode(tmp_path / "large.png", 16)


def test_odd_names_and_links_in_circles(tmp_path):
    source = tmp_path / "source"
    names = ["with space.png", "ünï 猫.png", "new\nline.png", "dots...png"]
    for name in names:
        photo(source / "a" / name)
    photo(source / "b" / "x.png")
    (source / "a" / "loop").symlink_to(source)
    opened = make("image_folder", source, tmp_path / "out", size=16)
    assert sorted(opened.splits["train"].names) == sorted([f"a/{name}" for name in names] + ["b/x.png"])
    (source / "empty").mkdir()
    with pytest.raises(UserError, match="empty: a class folder without images"):
        make("image_folder", source, tmp_path / "other", size=16)


def damaged(folder: Path, how: str) -> None:
    part = folder / "train-00000.arrow"
    if how == "cut":
        os.truncate(part, part.stat().st_size - 1)
    elif how == "missing":
        part.unlink()
    elif how == "newer":
        values = json.loads((folder / "store.json").read_text())
        (folder / "store.json").write_text(json.dumps(values | {"format_version": 2}))
    else:
        (folder / "store.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut", r"train-00000.arrow has .* bytes and should have .*; prepare the store anew"),
        ("missing", r"train-00000.arrow is missing"),
        ("newer", r"store format 2; this version of lorvp reads up to 1"),
        ("manifest", r"store.json: damaged"),
    ],
)
def test_damaged_stores_are_told(image_root, tmp_path, how, said):
    folder = make("image_folder", image_root, tmp_path, size=16).folder
    damaged(folder, how)
    with pytest.raises(UserError, match=said):
        store.Store.open(folder)


def test_a_flipped_byte_is_found(image_root, tmp_path):
    folder = make("image_folder", image_root, tmp_path, size=16).folder
    store.verify(folder, store.read_manifest(folder))
    part = folder / "train-00000.arrow"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000.arrow: not what was written"):
        store.verify(folder, store.read_manifest(folder))


def test_an_encoded_store_gives_the_same_images(image_root, tmp_path, small_parts, capsys):
    opened = make("image_folder", image_root, tmp_path, encoded=True, name="letters")
    assert opened.folder.name == "letters-encoded"
    assert re.search(r"36 images, 0.01 GiB as pixels, 0.00 GiB as --encoded; .* free", capsys.readouterr().out)
    assert len(opened.splits["train"].files.parts) > 1
    direct = datasets.load(DatasetConfig(name="image_folder", root=image_root, val_fraction=0.25), 32)
    splits = datasets.load(DatasetConfig(name="store", root=opened.folder, val_fraction=0.25), 32)
    order = np.random.default_rng(0).permutation(len(direct.train))
    assert torch.equal(splits.train.read(order), direct.train.read(order))
    missing = DatasetConfig(name="store", root=tmp_path / "cats-encoded")
    with pytest.raises(UserError, match=r"prepare image_folder --name cats --encoded --source SOURCE --out "):
        datasets.load(missing, 32)
    cifar = Source(["a"], {"train": Rows(np.zeros(1), ["x"], pixels=np.zeros((1, 8, 8, 3), dtype=np.uint8))}, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "cifar10", lambda root: cifar)
        with pytest.raises(UserError, match="--encoded: cifar10 comes as pixels"):
            make("cifar10", tmp_path, tmp_path, encoded=True)


@pytest.mark.slow
def test_crops_come_from_a_store_of_larger_images(image_root, tmp_path):
    small = make("image_folder", image_root, tmp_path, size=32).folder
    config = DatasetConfig(name="store", root=small, val_fraction=0.25, crop_flip=True)
    with pytest.raises(UserError, match=r"stored at 32 px, and dataset.crop_root needs 36: .*--size 36"):
        datasets.load(config, 32)
    large = make("image_folder", image_root, tmp_path, size=36).folder
    splits = datasets.load(config.model_copy(update={"crop_root": large}), 32)
    assert splits.train.read([0]).shape == (1, 3, 36, 36)
    assert splits.val.read([0]).shape == (1, 3, 32, 32)
    (image_root / "train" / "n01" / "0.JPEG").unlink()
    other = make("image_folder", image_root, tmp_path / "other", size=36).folder
    with pytest.raises(UserError, match=r"dataset.crop_root: .* has other images than"):
        datasets.load(config.model_copy(update={"crop_root": other}), 32)
    values = digits_values(dataset=config.model_copy(update={"crop_root": large}).model_dump(), epochs=1)
    (result,) = train(TrialConfig.model_validate(values))
    assert np.isfinite(result.train_loss)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_half_way(image_root, tmp_path, small_disk, monkeypatch):
    """What is done is kept, and gone on with when there is room."""
    monkeypatch.setattr(prepare, "PART_BYTES", 5 * 3 * 128**2)
    filler = small_disk / "filler"
    usage = shutil.disk_usage(small_disk)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 40))  # somebody else fills it later
        filler.write_bytes(bytes(1 << 20))
        with pytest.raises(UserError, match=r"image_folder-128: can't be written \(.*No space left on device\)"):
            make("image_folder", image_root, small_disk, size=128)
        folder = small_disk / "image_folder-128"
        assert not (folder / "store.json").exists()
        assert not list(folder.glob(".*"))
        done = len(list(folder.glob("train-0*.arrow")))
        assert done > 0
        filler.unlink()
        opened = make("image_folder", image_root, small_disk, size=128)
    store.verify(opened.folder, store.read_manifest(opened.folder))
    with pytest.raises(UserError, match=r"has 0.00 GiB free, and the store takes 0.00 GiB more"):
        make("image_folder", image_root, small_disk, size=130)


def test_a_folder_that_can_only_be_read(image_root, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"--out .*: can't be written \(Read-only file system\)"):
        make("image_folder", image_root, small_disk, size=16)


def test_no_room_and_no_folder(image_root, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(UserError, match=r"has 0.00 GiB free, and the store takes"):
            make("image_folder", image_root, tmp_path / "full", size=224)
    assert not (tmp_path / "full").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file: can't be written"):
        make("image_folder", image_root, tmp_path / "file", size=16)


def test_another_source_does_not_go_on_with_a_begun_store(image_root, tmp_path, small_parts):
    spoil(image_root)
    with pytest.raises(UserError, match="3 unreadable"):
        make("image_folder", image_root, tmp_path, size=16)
    photo(image_root / "train" / "n01" / "new.png")
    with pytest.raises(UserError, match="was begun from other files"):
        make("image_folder", image_root, tmp_path, size=16)


def other_images(root: Path) -> None:
    """Of the names and sizes that were there."""
    for path in (root / "train").glob("*/*.JPEG"):
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: photo(root / "train" / "n01" / "new.png"), "was made of other files"),
        (lambda root: shutil.rmtree(root / "val"), "has 24 train and 12 test, and the source 24 train;"),
        (lambda root: shutil.copytree(root / "val", root / "test"), "and the source 24 train and 12 val and 12 test;"),
        (
            lambda root: [(root / s / "n03").rename(root / s / "n04") for s in ("train", "val")],
            "other classes .*: n03, n04;",
        ),
        (lambda root: (root / "train/n01/0.JPEG").rename(root / "train/n01/9.JPEG"), "was made of other files"),
        (other_images, r"was made when n01/0.JPEG was another image"),
    ],
)
def test_a_store_of_other_images_is_refused(image_root, tmp_path, small_parts, change, said):
    made = make("image_folder", image_root, tmp_path, size=16).folder
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    copied = shutil.copytree(image_root, tmp_path / "copied")
    assert make("image_folder", copied, tmp_path, size=16).folder == made  # wherever the same images lie
    change(image_root)
    with pytest.raises(
        UserError, match=f"^{made}: .*{said}.* --name NAME makes another store, or remove this one first"
    ):
        make("image_folder", image_root, tmp_path, size=16)
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    assert make("image_folder", image_root, tmp_path, size=16, name="other").folder != made


def test_a_store_made_with_other_options_is_refused(image_root, tmp_path):
    spoil(image_root)
    there = make("image_folder", image_root, tmp_path, size=16, skip_unreadable=True)
    with pytest.raises(
        UserError, match="leaves out 3 images that could not be read, which --skip-unreadable would accept"
    ):
        make("image_folder", image_root, tmp_path, size=16)
    assert make("image_folder", image_root, tmp_path, size=16, skip_unreadable=True).folder == there.folder
    manifest = there.folder / "store.json"
    values = json.loads(manifest.read_text())
    values["description"]["transform"] = "PIL 9.0.0 bilinear with antialias to 16x16, aspect squashed, uint8"
    manifest.write_text(json.dumps(values))  # an older Pillow's is the same request
    assert make("image_folder", image_root, tmp_path, size=16, skip_unreadable=True).folder == there.folder
    values["description"]["transform"] = ""
    manifest.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"has images as they were, not PIL .* to 16x16"):
        make("image_folder", image_root, tmp_path, size=16, skip_unreadable=True)


def test_trials_read_the_store(image_root, tmp_path):
    folder = make("image_folder", image_root, tmp_path, size=32).folder
    config = DatasetConfig(name="store", root=folder, val_fraction=0.25)
    splits = datasets.load(config, 32)
    direct = datasets.load(DatasetConfig(name="image_folder", root=image_root, val_fraction=0.25), 32)
    for part in ("train", "val", "test"):
        ours, theirs = getattr(splits, part), getattr(direct, part)
        assert np.array_equal(ours.labels, theirs.labels)
        order = np.random.default_rng(0).permutation(len(ours))
        assert torch.equal(ours.read(order), theirs.read(order))
    with pytest.raises(
        UserError, match=r"stored at 32 px, and the backbone takes 64: .*prepare image_folder --size 64"
    ):
        datasets.load(config, 64)
    missing = DatasetConfig(name="store", root=tmp_path / "cifar10-32")
    with pytest.raises(UserError, match=r"python -m lorvp.data prepare cifar10 --size 32 --source SOURCE --out "):
        datasets.load(missing, 32)
    values = digits_values(dataset={"name": "store", "root": folder, "val_fraction": 0.25}, epochs=1, batch_size=9)
    stored = list(train(TrialConfig.model_validate(values)))
    values["dataset"] = {"name": "image_folder", "root": image_root, "val_fraction": 0.25}
    read = list(train(TrialConfig.model_validate(values)))
    assert stored[0].val_loss == pytest.approx(read[0].val_loss, rel=1e-5)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lorvp.data", *map(str, arguments)]


LIST_IMAGENET = """
import sys
from pathlib import Path
import numpy as np
from lorvp.data import prepare, sources
from lorvp.data.sources import folders
from lorvp.data.sources.base import Rows
from lorvp.data.store import Description

folders.image_files = lambda folder, left_out: [f"{folder.name}_{i:06}.JPEG" for i in range(1281)]
Rows.sizes = property(lambda self: np.full(len(self), 110_000))
source = sources.only_test(Path(sys.argv[1]))
rows = source.splits["test"]
about = Description(dataset="x", image_size=224, transform="", class_names=("a",), source=prepare.digest(source))
tasks = prepare.plan(Path(sys.argv[1]), "test", rows, about, True)
assert len(rows) == 1_281_000 and sum(map(len, tasks)) == len(rows)
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(peak) / 1024)
"""


@pytest.mark.slow
def test_memory_for_as_many_names_as_imagenet_has(tmp_path):
    """Each process that decodes takes a file's worth of pixels and its interpreter beside it: see the next test."""
    for label in range(1000):
        (tmp_path / f"n{label:08}").mkdir()
    listed = subprocess.run([sys.executable, "-c", LIST_IMAGENET, tmp_path], capture_output=True, text=True, check=True)
    assert float(listed.stdout) < 350


KILLED = """
import os, runpy, signal, sys
from lorvp.data import prepare

kills, make_part = int(sys.argv.pop(1)), prepare.make_part

def make_part_and_die(task, *rest):
    done = make_part(task, *rest)
    if len(list(task.path.parent.glob("train-*.arrow"))) >= kills:
        os.killpg(0, signal.SIGKILL)
    return done

prepare.make_part = make_part_and_die
runpy.run_module("lorvp.data.__main__", run_name="__main__")
"""


@pytest.mark.slow
def test_prepare_killed_three_times_and_finished(tmp_path):
    source = tmp_path / "source"
    random = np.random.default_rng(0)
    images_of_seven_parts = 7 * (PART_BYTES // (3 * 448**2)) - 10
    for i in range(images_of_seven_parts):
        path = source / "abc"[i % 3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(path)
    prepare_it = command("prepare", "image_folder", "--source", source, "--out", tmp_path / "out", "--size", 448)
    prepare_it += ["--processes", "2"]  # of which the bound below is
    made = tmp_path / "out" / "image_folder-448"
    for kills in range(1, 4):
        killed = [sys.executable, "-c", KILLED, str(kills), *prepare_it[3:]]
        assert subprocess.run(killed, stdout=subprocess.DEVNULL, start_new_session=True).returncode == -signal.SIGKILL
        assert len(list(made.glob("train-*.arrow"))) >= kills
        assert not (made / "store.json").exists()
    first = min(made.glob("train-0*.arrow"))
    before = first.stat().st_mtime_ns
    process, peak = psutil.Popen(prepare_it, stdout=subprocess.DEVNULL), 0.0
    while process.poll() is None:
        with suppress(psutil.Error):
            together = [process, *process.children(recursive=True)]
            peak = max(peak, sum(each.memory_full_info().pss for each in together) / 2**20)
        time.sleep(0.1)
    assert process.returncode == 0
    assert peak < 1024 - 350, peak
    assert first.stat().st_mtime_ns == before
    assert len(list(made.glob("train-*.arrow"))) == 1 + 7
    store.verify(made, store.read_manifest(made))
    kept = store.Store.open(made).splits["train"]
    for row in (0, images_of_seven_parts // 2, images_of_seven_parts - 1):
        assert np.array_equal(kept.read(np.array([row]))[0], decode.decode(source / kept.names[row], 448))
    assert sorted(path.suffix for path in made.iterdir() if path.suffix != ".arrow") == [".json"]


def test_the_command_line(image_root, tmp_path):
    source = ["prepare", "image_folder", "--source", str(image_root), "--out", str(tmp_path), "--size", "16"]
    looks = [
        (source, "24 train, 12 test, 3 classes"),
        (["list", str(tmp_path)], "24 train, 12 test"),
        (["info", str(tmp_path / "image_folder-16")], "16 px, PIL"),
        (["verify", str(tmp_path / "image_folder-16")], "as it was written"),
    ]
    for arguments, said in looks:
        assert said in CliRunner().invoke(data.app, arguments).output
    wrong = subprocess.run(
        command("prepare", "cifra10", "--source", image_root, "--out", tmp_path), capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: no dataset is called 'cifra10'; one of cifar10")
    assert len(wrong.stderr.strip().splitlines()) == 1
