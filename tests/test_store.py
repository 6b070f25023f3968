"""Prepared stores: every layout, everything that can be wrong with files, and what a trial reads from them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import digits_values
from PIL import Image
from torchvision import datasets, transforms
from typer.testing import CliRunner

from lorvp import bundle, data, evaluate, images, prepare, store
from lorvp.config import DatasetConfig, TrialConfig
from lorvp.errors import UserError
from lorvp.prepare import PART_BYTES
from lorvp.training import train


def make(name: str, source: Path, out: Path, **options) -> store.Store:
    return store.Store.open(prepare.prepare(name, source, out, partial=True, **options))


def test_an_image_folder_is_what_torchvision_reads(image_root, tmp_path):
    resize = transforms.Compose([transforms.Resize((32, 32)), transforms.PILToTensor()])
    opened = make("image_folder", image_root, tmp_path, size=32)
    for split, folder in (("train", "train"), ("test", "val")):
        expected = datasets.ImageFolder(image_root / folder, resize)
        kept = opened.splits[split]
        assert list(opened.description.class_names) == expected.classes
        assert kept.labels.tolist() == expected.targets
        pixels = kept.read(np.arange(len(kept)))
        assert all(np.array_equal(pixels[i].transpose(2, 0, 1), image) for i, (image, _) in enumerate(expected))
        assert [Path(path).name for path, _ in expected.samples] == [Path(name).name for name in kept.names]
    assert "bilinear with antialias to 32x32" in opened.description.transform


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Files of few images, so that a store has many."""
    monkeypatch.setattr(prepare, "PART_BYTES", 5 * 3 * 16**2)


def test_batches_from_many_files(image_root, tmp_path, small_parts):
    opened = make("image_folder", image_root, tmp_path, size=16)
    kept = opened.splits["train"]
    assert [file.rows for file in kept.files.parts] == [5, 5, 5, 5, 4]
    order = np.random.default_rng(0).permutation(len(kept))
    whole = np.stack([images.decode(image_root / "train" / name, 16) for name in kept.names])
    assert np.array_equal(kept.read(order), whole[order])


def cifar_archive(folder: Path, name: str) -> None:
    """The official python archive's layout, with 20 images a batch."""
    random = np.random.default_rng(0)
    inner = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    (folder / inner).mkdir(parents=True)
    key, classes = {"cifar10": ("label", 10), "cifar100": ("fine_label", 100)}[name]
    train = [f"data_batch_{i}" for i in range(1, 6)] if name == "cifar10" else ["train"]
    for batch in [*train, "test_batch" if name == "cifar10" else "test"]:
        values = {
            "data": random.integers(0, 256, (20, 3072), dtype=np.uint8),
            f"{key}s": random.integers(0, classes, 20).tolist() if name == "cifar100" else [i % 10 for i in range(20)],
            "filenames": [f"{batch}_{i}.png" for i in range(20)],
        }
        if name == "cifar100":
            values["fine_labels"] = [i % 100 for i in range(20)]
        (folder / inner / batch).write_bytes(pickle.dumps(values, protocol=2))
    meta = {f"{key}_names": [f"class {i}" for i in range(10 if name == "cifar10" else 20)]}
    (folder / inner / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(pickle.dumps(meta, protocol=2))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("archived", [False, True])
def test_cifar(tmp_path, name, archived):
    cifar_archive(tmp_path / "source", name)
    (inner,) = (tmp_path / "source").iterdir()
    batch = pickle.loads((inner / ("data_batch_2" if name == "cifar10" else "train")).read_bytes())
    if archived:
        archive = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}[name]
        with tarfile.open(tmp_path / "source" / archive, "w:gz") as tar:
            tar.add(inner, inner.name)
        shutil.rmtree(inner)
    opened = make(name, tmp_path / "source", tmp_path / "out")
    assert opened.folder.name == f"{name}-32"
    assert opened.description.transform == ""
    kept = opened.splits["train"]
    assert len(kept) == (100 if name == "cifar10" else 20)
    first = 20 if name == "cifar10" else 0
    expected = batch["data"].reshape(-1, 3, 32, 32)
    assert np.array_equal(kept.read(np.arange(first, first + 20)).transpose(0, 3, 1, 2), expected)
    assert kept.names[first] == batch["filenames"][0]
    with pytest.raises(UserError, match="stored at its own 32"):
        make(name, tmp_path / "source", tmp_path / "out", size=224)


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    cifar_archive(tmp_path / "source", "cifar10")
    (tmp_path / "source" / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(UserError, match=r"data_batch_3: not a batch of CIFAR .*system"):
        make("cifar10", tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def photo(path: Path, size: int = 64, value: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, 50, 200)).save(path)


def test_tiny_imagenet(tmp_path):
    source = tmp_path / "source"
    for wnid in ("n02", "n01"):
        for i in range(3):
            photo(source / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
    annotations = []
    for i in range(4):
        photo(source / "val" / "images" / f"val_{i}.JPEG", value=40 * i)
        annotations.append(f"val_{i}.JPEG\t{'n02' if i % 2 else 'n01'}\t0\t32\t44\t62")
    (source / "val" / "val_annotations.txt").write_text("\n".join(annotations) + "\n")
    (source / "wnids.txt").write_text("n02\nn01\n")
    opened = make("tiny-imagenet", source, tmp_path / "out")
    assert opened.description.class_names == ("n01", "n02")
    assert opened.splits["test"].labels.tolist() == [0, 1, 0, 1]
    assert (opened.folder.name, opened.description.transform) == ("tiny-imagenet-64", "")
    assert "64x64" not in opened.description.transform
    (source / "val" / "val_annotations.txt").write_text(annotations[0])
    with pytest.raises(UserError, match=r"val_annotations.txt: 3 names are not those of the files"):
        make("tiny-imagenet", source, tmp_path / "other")
    (source / "val" / "val_annotations.txt").write_text("\n".join(annotations))
    with pytest.raises(UserError, match=r"2 classes \(should be 200\), 6 train \(should be 100,000\)"):
        prepare.prepare("tiny-imagenet", source, tmp_path / "other")


def test_imagenet_with_a_flat_validation_folder(tmp_path):
    source = tmp_path / "source"
    for wnid in ("n01", "n02"):
        photo(source / "train" / wnid / f"{wnid}_1.JPEG")
    lines = ["ImageId,PredictionString"]
    for i, wnid in enumerate(["n02", "n01", "n02"], start=1):
        photo(source / "val" / f"ILSVRC2012_val_{i:08}.JPEG")
        lines.append(f"ILSVRC2012_val_{i:08},{wnid} 1 2 3 4 {wnid} 5 6 7 8")
    with pytest.raises(UserError, match=r"no WNID folders, and no LOC_val_solution.csv"):
        make("imagenet", source, tmp_path / "out")
    (source / "LOC_val_solution.csv").write_text("\n".join(lines))
    opened = make("imagenet", source, tmp_path / "out")
    assert opened.folder.name == "imagenet-224"
    assert opened.splits["test"].labels.tolist() == [1, 0, 1]


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
        pixels = images.decode(tmp_path / name, 16)
        assert pixels.shape == (16, 16, 3)
        if name in names:
            assert np.abs(pixels.astype(int) - names[name]).max() <= (5 if name == "palette.png" else 1)
    frames = [Image.new("RGB", (40, 40), color) for color in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    assert images.decode(tmp_path / "animated.gif", 16)[0, 0].tolist() == [255, 0, 0]
    rotated = Image.new("RGB", (40, 20), (1, 2, 3))
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "rotated.jpg", exif=exif)
    assert images.decode(tmp_path / "rotated.jpg", 16).shape == (16, 16, 3)


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
    whole = np.stack([images.decode(image_root / "train" / name, 16) for name in kept.names])
    assert np.array_equal(kept.read(np.arange(24)), whole)
    assert not list(opened.folder.glob("*.json*"))[1:]


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    photo(tmp_path / "large.png", size=200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150**2)
    with pytest.raises(UserError, match="decompression bomb"):
        images.decode(tmp_path / "large.png", 16)


def test_odd_names_and_links_in_circles(tmp_path):
    source = tmp_path / "source"
    names = ["with space.png", "ünï 猫.png", "new\nline.png", "..dots...png"]
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
    store.verify(folder)
    part = folder / "train-00000.arrow"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000.arrow: not what was written"):
        store.verify(folder)


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


def test_trials_read_the_store(image_root, tmp_path):
    folder = make("image_folder", image_root, tmp_path, size=32).folder
    config = DatasetConfig(name="store", root=folder, val_fraction=0.25)
    splits = data.load(config, 32)
    direct = data.load(DatasetConfig(name="image_folder", root=image_root, val_fraction=0.25), 32)
    for part in ("train", "val", "test"):
        ours, theirs = getattr(splits, part), getattr(direct, part)
        assert np.array_equal(ours.labels, theirs.labels)
        order = np.random.default_rng(0).permutation(len(ours))
        assert torch.equal(ours.read(order), theirs.read(order))
    with pytest.raises(
        UserError, match=r"stored at 32 px, and the backbone takes 64: .*prepare image_folder --size 64"
    ):
        data.load(config, 64)
    missing = DatasetConfig(name="store", root=tmp_path / "cifar10-32")
    with pytest.raises(UserError, match=r"python -m lorvp.data prepare cifar10 --size 32 --source SOURCE --out "):
        data.load(missing, 32)
    values = digits_values(dataset={"name": "store", "root": folder, "val_fraction": 0.25}, epochs=1, batch_size=9)
    stored = list(train(TrialConfig.model_validate(values)))
    values["dataset"] = {"name": "image_folder", "root": image_root, "val_fraction": 0.25}
    read = list(train(TrialConfig.model_validate(values)))
    assert stored[0].val_loss == pytest.approx(read[0].val_loss, rel=1e-5)


def test_evaluation_of_a_bundle(image_root, tmp_path):
    """All classes; a part of them, restricted to their logits; numbered ones; and classes that it doesn't know."""
    folder = make("image_folder", image_root, tmp_path, size=32).folder
    values = digits_values(dataset={"name": "store", "root": folder, "val_fraction": 0.25}, epochs=3, batch_size=9)
    results = list(train(TrialConfig.model_validate(values), tmp_path))
    method = bundle.load(tmp_path / "bundle")
    whole = evaluate.evaluate(method, store.Store.open(folder), batch_size=5)
    assert whole.top1 == pytest.approx(results[-1].test_top1)
    assert (whole.images, whole.classes) == (12, 3)
    shutil.copytree(image_root / "val", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "n02")
    part = make("imagenet-r", tmp_path / "part", tmp_path, size=32)
    with torch.inference_mode():
        pixels = torch.from_numpy(part.splits["test"].read(np.arange(8))).permute(0, 3, 1, 2)
        restricted = method(pixels)[:, [0, 2]].argmax(1).numpy()
    found = evaluate.evaluate(method, part)
    assert found.top1 == pytest.approx(100 * np.mean(restricted == part.splits["test"].labels))
    assert (found.images, found.classes) == (8, 2)
    for number, name in enumerate(("n01", "n02", "n03")):
        shutil.copytree(image_root / "val" / name, tmp_path / "numbered" / str(number))
    assert evaluate.evaluate(method, make("imagenet-v2", tmp_path / "numbered", tmp_path, size=32)).top1 == whole.top1
    (tmp_path / "part" / "n01").rename(tmp_path / "part" / "n09")
    with pytest.raises(UserError, match="1 of its classes are not the bundle's: n09"):
        evaluate.evaluate(method, make("imagenet-a", tmp_path / "part", tmp_path, size=32))
    arguments = [str(tmp_path / "bundle"), "--data", str(folder), "--out", str(tmp_path / "found.parquet")]
    shown = CliRunner().invoke(evaluate.app, arguments)
    assert f"{whole.top1:.2f}" in shown.output
    assert pq.read_table(tmp_path / "found.parquet").to_pylist()[0]["top1"] == whole.top1


def test_intervals():
    low, high = evaluate.wilson(81, 100)
    assert (low, high) == pytest.approx((72.22, 87.49), abs=0.01)
    assert evaluate.wilson(0, 50)[0] == pytest.approx(0)


def test_numbered_classes_are_in_the_order_of_numbers(tmp_path):
    for number in (10, 9, 2):
        photo(tmp_path / "source" / str(number) / "x.png")
    opened = make("imagenet-v2", tmp_path / "source", tmp_path, size=16)
    assert opened.description.class_names == ("2", "9", "10")
    with pytest.raises(UserError, match="has no images to train on"):
        data.load(DatasetConfig(name="store", root=opened.folder), 16)
    (tmp_path / "source" / "n01").mkdir()
    with pytest.raises(UserError, match="are numbers, and not n01"):
        make("imagenet-v2", tmp_path / "source", tmp_path / "other")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lorvp.data", *map(str, arguments)]


@pytest.mark.slow
def test_prepare_killed_three_times_and_finished(tmp_path):
    source = tmp_path / "source"
    random = np.random.default_rng(0)
    for i in range(900):
        path = source / "abc"[i % 3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(path)
    prepare_it = command("prepare", "image_folder", "--source", source, "--out", tmp_path / "out", "--size", 448)
    made = tmp_path / "out" / "image_folder-448"
    for kills in range(1, 4):
        process = subprocess.Popen(prepare_it, stdout=subprocess.DEVNULL, start_new_session=True)
        while len(list(made.glob("train-*.arrow"))) < kills:
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (made / "store.json").exists()
    first = made / "train-00000.arrow"
    before = first.stat().st_mtime_ns
    subprocess.run(prepare_it, check=True, stdout=subprocess.DEVNULL)
    assert first.stat().st_mtime_ns == before
    assert len(list(made.glob("train-*.arrow"))) == 1 + -(-900 // (PART_BYTES // (3 * 448**2)))
    store.verify(made)
    kept = store.Store.open(made).splits["train"]
    for row in (0, 450, 899):
        assert np.array_equal(kept.read(np.array([row]))[0], images.decode(source / kept.names[row], 448))
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
        assert said in CliRunner().invoke(prepare.app, arguments).output
    wrong = subprocess.run(
        command("prepare", "cifra10", "--source", image_root, "--out", tmp_path), capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: no dataset is called 'cifra10'; one of cifar10")
    assert len(wrong.stderr.strip().splitlines()) == 1
