"""Every dataset's own layout, imitated, and what `prepare` makes of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import torch
import torchvision
from conftest import make, photo
from PIL import Image
from support.samples.archives import cifar_archive
from torchvision import transforms

from lorvp.config import DatasetConfig
from lorvp.data import datasets, decode, prepare, sources
from lorvp.data.sources import folders, torchvision_sets
from lorvp.errors import UserError


@pytest.mark.slow
def test_real_photos_are_what_torchvision_reads(imagenette, tmp_path):
    folder, _ = imagenette
    opened = make("image_folder", folder, tmp_path, size=160, name="imagenette")
    assert {split: len(rows) for split, rows in opened.splits.items()} == {"train": 2000, "test": 500}
    resize = transforms.Compose([transforms.Resize((160, 160)), transforms.PILToTensor()])
    expected = torchvision.datasets.ImageFolder(folder / "val", resize)
    kept = datasets.store_images(opened, "test", 160)
    assert kept.labels.tolist() == expected.targets
    for pixels, (image, _) in zip(kept.read(np.arange(500)), expected, strict=True):
        assert torch.equal(pixels, image)


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
    resized = make(name, tmp_path / "source", tmp_path / "out", size=64)
    (first_image,) = kept.read(np.array([first]))
    as_published = Image.fromarray(first_image).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(resized.splits["train"].read(np.array([first]))[0], np.asarray(as_published))
    exact = DatasetConfig(name="store", root=opened.folder, exact=True)
    with pytest.raises(UserError, match=rf"stored at 32 px, and dataset.exact needs 64: .*prepare {name} --size 64"):
        datasets.load(exact, 64)
    if name == "cifar10":  # the other has an image a class here
        there = datasets.load(exact.model_copy(update={"root": resized.folder}), 64)
        assert there.train.read([0]).shape == (1, 3, 64, 64)


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
    with pytest.raises(UserError, match=r"no WNID folders, and neither LOC_val_solution.csv nor ILSVRC2012_devkit_t12"):
        make("imagenet", source, tmp_path / "out")
    (source / "LOC_val_solution.csv").write_text("\n".join(lines))
    opened = make("imagenet", source, tmp_path / "out")
    assert opened.folder.name == "imagenet-224"
    assert opened.splits["test"].labels.tolist() == [1, 0, 1]
    (source / "LOC_val_solution.csv").unlink()
    development_kit(source, ["n02", "n01", "n02"])
    assert make("imagenet", source, tmp_path / "kit").splits["test"].labels.tolist() == [1, 0, 1]
    with tarfile.open(source / f"{sources.DEVKIT}.tar.gz", "w:gz") as tar:
        tar.add(source / sources.DEVKIT, sources.DEVKIT)
    shutil.rmtree(source / sources.DEVKIT)
    assert make("imagenet", source, tmp_path / "archive").splits["test"].labels.tolist() == [1, 0, 1]
    (source / f"{sources.DEVKIT}.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"ILSVRC2012_devkit_t12.tar.gz: not ILSVRC's development kit"):
        make("imagenet", source, tmp_path / "broken")


def development_kit(root: Path, wnids: list[str]) -> None:
    """data/meta.mat numbers the synsets in an order of its own, those with children among them."""
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.array([(1, "n02", "b", "", 0), (2, "n01", "a", "", 0), (3, "n00", "all", "", 2)], dtype=fields)
    (root / sources.DEVKIT / "data").mkdir(parents=True)
    scipy.io.savemat(root / sources.DEVKIT / "data" / "meta.mat", {"synsets": synsets})
    numbers = {"n02": 1, "n01": 2}
    truth = "".join(f"{numbers[wnid]}\n" for wnid in wnids)
    (root / sources.DEVKIT / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)


def test_numbered_classes_are_in_the_order_of_numbers(tmp_path):
    for number in (10, 9, 2):
        photo(tmp_path / "source" / str(number) / "x.png")
    opened = make("imagenet-v2", tmp_path / "source", tmp_path, size=16)
    assert opened.description.class_names == ("2", "9", "10")
    with pytest.raises(UserError, match="has no images to train on"):
        datasets.load(DatasetConfig(name="store", root=opened.folder), 16)
    (tmp_path / "source" / "n01").mkdir()
    with pytest.raises(UserError, match="are numbers, and not n01"):
        make("imagenet-v2", tmp_path / "source", tmp_path / "other")


def encoded(value: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20 + value % 7, 30), (value, 50, 200)).save(stream, kind)
    return stream.getvalue()


FEATURES = {
    "img": {"_type": "Image"},
    "fine_label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"},
    "coarse_label": {"names": ["insect", "mammal"], "_type": "ClassLabel"},
}


def table(values: list[int], labels: list[int]) -> pa.Table:
    """As huggingface/datasets lays a dataset of images out."""
    cells = [{"bytes": encoded(value), "path": f"{value}.png" if value % 2 else None} for value in values]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"img": pa.array(cells, kind), "fine_label": labels, "coarse_label": [0] * len(labels)}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})


@pytest.mark.parametrize("layout", ["save_to_disk", "parquet"])
@pytest.mark.parametrize("kept_encoded", [False, True])
def test_hugging_face(tmp_path, layout, kept_encoded, monkeypatch):
    monkeypatch.setattr(prepare, "PART_BYTES", 5 * 3 * 16**2)
    source = tmp_path / "source"
    splits = {"train": (list(range(10, 22)), [0, 1, 2] * 4), "validation": ([100, 101], [2, 0]), "test": ([7], [-1])}
    if layout == "save_to_disk":
        for split, (values, labels) in splits.items():
            (source / split).mkdir(parents=True)
            for i, half in enumerate((slice(0, len(values) // 2), slice(len(values) // 2, None))):
                rows = table(values[half], labels[half])
                with pa.ipc.new_stream(source / split / f"data-0000{i}-of-00002.arrow", rows.schema) as writer:
                    writer.write_table(rows, max_chunksize=2)
        (source / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    else:
        (source / "data").mkdir(parents=True)
        for split, (values, labels) in splits.items():
            pq.write_table(table(values, labels), source / "data" / f"{split}-00000-of-00001.parquet", row_group_size=5)
    opened = make("huggingface", source, tmp_path / "out", size=None if kept_encoded else 16, encoded=kept_encoded)
    assert opened.description.class_names == ("ant", "bee", "cat")
    assert opened.splits["test"].labels.tolist() == [2, 0]
    kept = opened.splits["train"]
    assert kept.labels.tolist() == [0, 1, 2] * 4
    assert kept.names[:2] == ["train/0", "11.png"]
    expected = np.stack([decode.decode(encoded(value), 16) for value in range(10, 22)])
    read = datasets.store_images(opened, "train", 16).read(np.arange(12)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(read, expected)


def test_tables_that_are_no_image_dataset(tmp_path):
    with pytest.raises(UserError, match="no train split of a Hugging Face dataset"):
        make("huggingface", tmp_path, tmp_path / "out")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match=r"train-0.parquet: no table of a Hugging Face dataset"):
        make("huggingface", tmp_path, tmp_path / "out")
    for name in ("labels", "elsewhere"):
        (tmp_path / name).mkdir()
    pq.write_table(table([1, 2], [0, 5]), tmp_path / "labels" / "train-0.parquet")
    with pytest.raises(UserError, match="train has labels from 0 to 5, and 3 classes"):
        make("huggingface", tmp_path / "labels", tmp_path / "out")
    rows = table([1], [0])
    elsewhere = pa.array([{"bytes": None, "path": "/data/1.png"}], rows.schema.field("img").type)
    pq.write_table(rows.set_column(0, "img", elsewhere), tmp_path / "elsewhere" / "train-0.parquet")
    with pytest.raises(UserError, match="its images are not in it"):
        make("huggingface", tmp_path / "elsewhere", tmp_path / "out")


def write_parquet(path: Path, values: list[int], labels: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(values, labels), path)


@pytest.mark.parametrize(
    ("train", "other"),
    [
        ("data/train.parquet", "data/valid.parquet"),
        ("data/train-00000-of-00001-0123456789abcdef.parquet", "data/validation-00000-of-00001.parquet"),
        ("plain/train-00000-of-00001.parquet", "plain/dev-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/validation/0000.parquet"),
        ("main/training/0000.parquet", "main/val/0000.parquet"),
        ("data/training/a.parquet", "data/val/b.parquet"),
    ],
)
def test_layouts_of_the_hub(tmp_path, capsys, train, other):
    """A validation split is one where there is a test split, too; what is neither is named."""
    write_parquet(tmp_path / train, [1, 2, 3], [0, 1, 2])
    write_parquet(tmp_path / other, [4, 5], [0, 1])
    write_parquet(tmp_path / Path(train).parts[0] / "unsupervised-1.parquet", [6], [0])
    write_parquet(tmp_path / ".cache" / "train.parquet", [7], [0])
    source = sources.read_source("huggingface", tmp_path)
    assert {split: rows.labels.tolist() for split, rows in source.splits.items()} == {
        "train": [0, 1, 2],
        "test": [0, 1],
    }
    assert "the validation split is the test set" in "".join(source.notes)
    tests = re.sub("validation|valid|val|dev", "test", other)
    write_parquet(tmp_path / tests, [8], [2])
    source = sources.read_source("huggingface", tmp_path)
    assert {split: len(rows) for split, rows in source.splits.items()} == {"train": 3, "val": 2, "test": 1}
    assert not source.notes
    assert "unsupervised (a split of another name)" in source.remarks(tmp_path)[-1]


def test_parts_that_are_missing_and_tables_of_several_sets(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [1], [0])
    with pytest.raises(UserError, match=r"data: train has 2 parts, and 1 of them are missing, as number 00001$"):
        sources.read_source("huggingface", tmp_path)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [1], [0])
    write_parquet(tmp_path / "data" / "test-00001-of-00002.parquet", [1], [0])
    with pytest.raises(UserError, match=r"data: test has 2 parts, and 1 of them are missing, as number 00000$"):
        sources.read_source("huggingface", tmp_path)
    write_parquet(tmp_path / "data" / "test-00000-of-00003.parquet", [1], [0])
    with pytest.raises(UserError, match=r"parts of several test splits: of 2 and of 3$"):
        sources.read_source("huggingface", tmp_path)
    for config in ("large", "small"):
        write_parquet(tmp_path / "several" / config / "train" / "0000.parquet", [1], [0])
    with pytest.raises(UserError, match=r"has 2 configurations: large, small; name one: .*several/large$"):
        sources.read_source("huggingface", tmp_path / "several")
    assert len(sources.read_source("huggingface", tmp_path / "several" / "small").splits["train"]) == 1
    for split in ("dev", "validation"):
        write_parquet(tmp_path / "several" / "small" / f"{split}.parquet", [1], [0])
    with pytest.raises(UserError, match=r"dev and validation would both be the val split; leave one there$"):
        sources.read_source("huggingface", tmp_path / "several" / "small")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text("{}")
    with pytest.raises(UserError, match="saved: train has no file there"):
        sources.read_source("huggingface", saved)
    with pa.ipc.new_stream(saved / "data-00001-of-00002.arrow", table([1], [0]).schema) as writer:
        writer.write_table(table([1], [0]))
    with pytest.raises(UserError, match="saved: train has 2 parts, and 1 of them are missing, as number 00000"):
        sources.read_source("huggingface", saved)


def folder_of(root: Path, *places: str, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    """An image of each class in each place."""
    for place in places:
        for name in classes:
            photo(root / place / name / "1.png")
    return root


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "Validation", "Testing"),
        ("TRAIN", "valid", "TEST"),
        ("training_set", "dev", "test_set"),
        ("train-images", "val-images", "test images"),
    ],
)
def test_splits_by_every_usual_name(tmp_path, train, val, test):
    """In a store and without one: val is what a trial chooses by, and not a part of train."""
    source = folder_of(tmp_path / "source", train, val, test)
    photo(source / train / "ant" / "2.png", value=7)
    opened = make("image_folder", source, tmp_path / "out", size=16)
    assert {split: len(rows) for split, rows in opened.splits.items()} == {"train": 3, "val": 2, "test": 2}
    for config in ({"name": "image_folder", "root": source}, {"name": "store", "root": opened.folder}):
        found = datasets.load(DatasetConfig(**config), 16)
        assert (len(found.train), len(found.val), len(found.test)) == (3, 2, 2)
        fewer = datasets.load(DatasetConfig(**config, val_images=1, train_images=2), 16)
        assert (len(fewer.train), len(fewer.val), len(fewer.test)) == (2, 1, 2)


def test_what_is_not_taken_is_named(tmp_path, capsys):
    source = folder_of(tmp_path / "source", "train", "validation")
    folder_of(source, "extra")
    photo(source / "test" / "flat.png")
    photo(source / "train" / "stray.png")
    for name in ("a.heic", "b.heic", "notes.txt"):
        (source / "train" / "ant" / name).write_text("no image of ours")
    (source / "train" / "bee" / "more").symlink_to(source / "extra")
    opened = make("image_folder", source, tmp_path / "out", size=16)
    assert {split: len(rows) for split, rows in opened.splits.items()} == {"train": 2, "test": 2}
    said = " ".join(capsys.readouterr().out.split())
    assert f"{source}: validation/ is the test set, as there is no other" in said
    for part in (
        "left out: 2 x *.heic",
        "1 x *.txt",
        "1 x extra/",
        "1 x test/, which has no class folders",
        "1 x images in no class folder (train)",
        "1 x links to folders",
    ):
        assert part in said
    for name in ("2.png", "3.png"):
        photo(source / "train" / "ant" / name)
    datasets.load(DatasetConfig(name="image_folder", root=source), 16)
    assert "2 x *.heic" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["", "train", "imagenet-v2", "imagenet"])
def test_hidden_and_system_names_are_neither_classes_nor_images(tmp_path, layout):
    source = folder_of(tmp_path, *{"": [""], "imagenet": ["train"]}.get(layout, ["train"]))
    if layout == "imagenet-v2":
        source = folder_of(tmp_path / "v2", "", classes=("0", "1"))
    place = source / "train" if layout in ("train", "imagenet") else source
    within = place / ("0" if layout == "imagenet-v2" else "ant")
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN"):
        photo(place / name / "x.png")
        photo(within / name / "1-checkpoint.png")
        photo(source / name / "train" / "x.png")
    photo(within / "._1.png")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (within / name).write_text("no image")
        (source / name).write_text("no image")
    if layout == "imagenet":  # whose flat val has no class folders
        photo(source / "val" / "ILSVRC2012_val_00000001.JPEG")
        photo(source / "val" / ".ipynb_checkpoints" / "x.png")
        (source / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,bee 1 2 3 4")
    name = layout if layout.startswith("imagenet") else "image_folder"
    found = sources.read_source(name, source, partial=True)
    assert found.class_names == (["0", "1"] if layout == "imagenet-v2" else ["ant", "bee"])
    assert [len(rows) for rows in found.splits.values()] == ([2, 1] if layout == "imagenet" else [2])
    (remark,) = found.remarks(source)
    assert ".ipynb_checkpoints/" in remark


def test_every_format_that_pillow_reads(tmp_path):
    kinds = {"a.jfif": "JPEG", "b.JPE": "JPEG", "c.apng": "PNG", "d.tif": "TIFF", "e.jp2": "JPEG2000", "f.webp": "WEBP"}
    kinds |= {"g.qoi": "QOI", "h.tga": "TGA", "i.pcx": "PCX", "j.avif": "AVIF", "k.ico": "ICO", "l.pnm": "PPM"}
    Image.init()
    kinds = {name: kind for name, kind in kinds.items() if kind in Image.OPEN and kind in Image.SAVE}
    assert len(kinds) > 8
    for name, kind in kinds.items():
        folder_of(tmp_path / "source", "", classes=("ant",))
        path = tmp_path / "source" / "bee" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (90, 50, 200)).save(path, kind)
    kept = make("image_folder", tmp_path / "source", tmp_path / "out", size=16).splits["train"]
    assert [Path(name).name for name in kept.names[1:]] == sorted(kinds)
    assert not {".h5", ".grib", ".mpg", ".pdf", ".eps"} & folders.suffixes()  # which it only names, or can't decode


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (("Final_Test/Images", "Final_Training/Images"), "Final_Test, Final_Training (4 images in 2 folders)"),
        (("data/train", "data/test"), "data (4 images in 1 folders)"),
        (("seg_train/seg_train", "seg_test/seg_test"), "seg_test, seg_train (4 images in 2 folders)"),
        (("test",), "test (2 images in 1 folders)"),
        (("train/train", "test"), "train (2 images in 1 folders)"),
        (("part 1", "part 2", "part 3"), "part 1, part 2, part 3 (6 images in 3 folders)"),
    ],
)
def test_folders_that_look_like_splits_are_asked_about(tmp_path, places, said):
    source = folder_of(tmp_path / "source", *places)
    with pytest.raises(UserError, match=re.escape(f"not like classes: {said}; name the folder")) as told:
        make("image_folder", source, tmp_path / "out", size=16)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=re.escape(said)):
        datasets.load(DatasetConfig(name="image_folder", root=source), 16)
    opened = make("image_folder", source, tmp_path / "out", size=16, nested=True)
    assert opened.description.class_names == tuple(sorted({Path(place).parts[0] for place in places}))
    assert len(opened.splits["train"]) == 2 * len(places)


def test_folders_of_classes_are_not_asked_about(tmp_path):
    """A class may be called train, and may have its images in a folder."""
    for place in ("train", "bus", "tram/images"):
        photo(tmp_path / place / "1.png")
    assert sources.read_source("image_folder", tmp_path).class_names == ["bus", "train", "tram"]
    with pytest.raises(UserError, match="--nested is about image_folder; cifar10 has a layout of its own"):
        sources.read_source("cifar10", tmp_path, nested=True)
    shutil.rmtree(tmp_path / "bus")
    photo(tmp_path / "test" / "1.png")
    shutil.rmtree(tmp_path / "tram")
    with pytest.raises(UserError, match="test and train are splits, and have no class folders in them"):
        sources.read_source("image_folder", tmp_path)
    for split in ("train", "val", "Validation"):
        folder_of(tmp_path / "twice", split)
    with pytest.raises(UserError, match="Validation and val would both be the val split; leave one there"):
        sources.read_source("image_folder", tmp_path / "twice")


SIGNS = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2"


def official_gtsrb(root: Path, apart: bool = False) -> Path:
    """GTSRB's official archives, unpacked into one folder, or each into its own; the class is said by the lists."""
    where = {
        name: root / f"GTSRB_{name}" if apart else root for name in ("Final_Training", "Final_Test", "Final_Test_GT")
    }
    training, test = (where[name] / "GTSRB" / name / "Images" for name in ("Final_Training", "Final_Test"))
    for label in (0, 14):
        rows = [f"{SIGNS};ClassId"]
        for i in range(2):
            photo(training / f"{label:05}" / f"00000_{i:05}.ppm", value=label + i)
            rows.append(f"00000_{i:05}.ppm;29;30;5;6;24;25;{label}")
        (training / f"{label:05}" / f"GT-{label:05}.csv").write_text("\n".join(rows))
    for i in range(2):
        photo(test / f"{i:05}.ppm", value=100 + i)
    plain = "\n".join([SIGNS, *(f"{i:05}.ppm;53;54;6;5;48;49" for i in range(2))])
    (test / "GT-final_test.test.csv").write_text(plain)
    labelled = [f"{SIGNS};ClassId", *(f"{i:05}.ppm;53;54;6;5;48;49;{label}" for i, label in enumerate((14, 0)))]
    where["Final_Test_GT"].mkdir(exist_ok=True)
    (where["Final_Test_GT"] / "GT-final_test.csv").write_text("\n".join(labelled))
    (training.parents[1] / "Readme-Images.txt").write_text("about them")
    return root


def test_gtsrb_as_its_publishers_have_it(tmp_path):
    source = official_gtsrb(tmp_path / "source")
    opened = make("gtsrb", source, tmp_path / "out", size=16)
    assert make("gtsrb", official_gtsrb(tmp_path / "apart", True), tmp_path / "out", size=16).folder == opened.folder
    assert opened.splits["train"].labels.tolist() == [0, 0, 14, 14]
    assert opened.splits["test"].labels.tolist() == [14, 0]
    assert len(opened.description.class_names) == 43
    expected = decode.decode(source / "GTSRB" / "Final_Training" / "Images" / opened.splits["train"].names[2], 16)
    assert np.array_equal(opened.splits["train"].read(np.array([2]))[0], expected)
    with pytest.raises(UserError, match=r"4 train \(should be 39,209\), 2 test \(should be 12,630\)"):
        sources.read_source("gtsrb", source)
    with pytest.raises(UserError, match=r"not like classes: GTSRB \(6 images in 1 folders\)"):
        sources.read_source("image_folder", source)
    (source / "GTSRB" / "Final_Training" / "Images" / "00014" / "00000_00001.ppm").unlink()
    with pytest.raises(
        UserError, match=r"Final_Training/Images: 1 images are not those of its GT-\*.csv: 00014/00000_00001"
    ):
        sources.read_source("gtsrb", source, partial=True)
    listed = source / "GT-final_test.csv"
    listed.write_text(listed.read_text().replace(";14", ";43"))
    with pytest.raises(UserError, match=r"GT-final_test.csv: ClassId 43 is not one of 0 to 42"):
        sources.read_source("gtsrb", source, partial=True)
    listed.write_text("Filename,ClassId\n00000.ppm,1")
    with pytest.raises(UserError, match=r"GT-final_test.csv: not a list of GTSRB's"):
        sources.read_source("gtsrb", source, partial=True)
    listed.unlink()
    with pytest.raises(UserError, match=r"no GT-final_test.csv, which GTSRB_Final_Test_GT.zip has"):
        sources.read_source("gtsrb", source, partial=True)


def matlab(path: Path, **values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, values)


def make_eurosat(root: Path) -> None:
    for name in ("Forest", "River"):
        photo(root / "eurosat" / "2750" / name / f"{name}_1.jpg")


def make_food101(root: Path) -> None:
    lists = {split: {"pizza": [f"pizza/{split}"], "apple_pie": [f"apple_pie/{split}"]} for split in ("train", "test")}
    for split, names in lists.items():
        photo_list = [name for each in names.values() for name in each]
        for name in photo_list:
            photo(root / "food-101" / "images" / f"{name}.jpg")
        meta = root / "food-101" / "meta"
        meta.mkdir(exist_ok=True)
        (meta / f"{split}.json").write_text(json.dumps(names))


def make_dtd(root: Path) -> None:
    for split in ("train", "val", "test"):
        names = [f"{kind}/{kind}_{split}.jpg" for kind in ("banded", "woven")]
        for name in names:
            photo(root / "dtd" / "dtd" / "images" / name)
        labels = root / "dtd" / "dtd" / "labels"
        labels.mkdir(parents=True, exist_ok=True)
        (labels / f"{split}1.txt").write_text("\n".join(names))


def make_flowers102(root: Path) -> None:
    folder = root / "flowers-102"
    for number in range(1, 7):
        photo(folder / "jpg" / f"image_{number:05}.jpg")
    matlab(folder / "imagelabels.mat", labels=[1, 2, 1, 2, 1, 2])
    matlab(folder / "setid.mat", trnid=[1, 2], valid=[3, 4], tstid=[5, 6])


def make_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    for split in ("trainval", "test"):
        names = [f"Abyssinian_{split}", f"great_dane_{split}"]
        for name in names:
            photo(folder / "images" / f"{name}.jpg")
        (folder / "annotations").mkdir(exist_ok=True)
        lines = [f"{name} {label} 1 1" for label, name in enumerate(names, start=1)]
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines))


def make_gtsrb(root: Path) -> None:
    for label in ("00000", "00001"):
        photo(root / "gtsrb" / "GTSRB" / "Training" / label / "00000_00000.ppm")
    photo(root / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / "00000.ppm")
    (root / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;1\n")


def make_svhn(root: Path) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        pixels = random.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
        matlab(root / f"{split}_32x32.mat", X=pixels, y=np.array([[10], [1], [2], [10]]))


PEERS = {
    "eurosat": (make_eurosat, {"train": [0, 1]}, ("Forest", "River")),
    "food101": (make_food101, {"train": [0, 1], "test": [0, 1]}, ("apple_pie", "pizza")),
    "dtd": (make_dtd, {"train": [0, 1, 0, 1], "test": [0, 1]}, ("banded", "woven")),
    "flowers102": (
        make_flowers102,
        {"train": [0, 1, 0, 1], "test": [0, 1]},
        ("pink primrose", "hard-leaved pocket orchid"),
    ),
    "pets": (make_pets, {"train": [0, 1], "test": [0, 1]}, ("Abyssinian", "Great Dane")),
    "gtsrb": (make_gtsrb, {"train": [0, 1], "test": [1]}, ("0", "1")),
    "svhn": (make_svhn, {"train": [0, 1, 2, 0], "test": [0, 1, 2, 0]}, ("0", "1")),
}


@pytest.mark.parametrize("name", PEERS)
def test_sets_that_torchvision_carries(tmp_path, monkeypatch, name):
    """Small imitations; torchvision's checksums of the true files are left out."""
    for kind in (torchvision.datasets.SVHN, torchvision.datasets.Flowers102):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    lay_out, labels, class_names = PEERS[name]
    with pytest.raises(UserError, match="not as torchvision's download leaves it; --download fetches it"):
        make(name, tmp_path, tmp_path / "out")
    lay_out(tmp_path / "source")
    opened = make(name, tmp_path / "source", tmp_path / "out")
    assert opened.description.class_names[: len(class_names)] == class_names
    assert {split: sorted(rows.labels.tolist()) for split, rows in opened.splits.items()} == {
        split: sorted(expected) for split, expected in labels.items()
    }
    kept = opened.splits["train"]
    if name == "svhn":
        expected = torchvision.datasets.SVHN(tmp_path / "source").data[1].transpose(1, 2, 0)
        assert opened.folder.name == "svhn-32"
    else:
        expected = decode.decode(tmp_path / "source" / kept.names[1], 224)
    assert np.array_equal(kept.read(np.array([1]))[0], expected)
    with pytest.raises(UserError, match=r"not all of .* \(should be "):
        prepare.prepare(name, tmp_path / "source", tmp_path / "other")


def test_downloads_are_torchvisions(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torchvision.datasets, "GTSRB", lambda root, download, split: asked.append((root, download, split))
    )
    torchvision_sets.download("gtsrb", tmp_path / "raw")
    assert asked == [(tmp_path / "raw", True, "train"), (tmp_path / "raw", True, "test")]
    with pytest.raises(UserError, match="--download: imagenet is not one of cifar10"):
        torchvision_sets.download("imagenet", tmp_path)
