"""The datasets as they come: what `python -m lorvp.data prepare NAME` reads.

A dataset is a function here or in a module beside this one, and a line in SOURCES. Each lists its images and labels
without decoding any, in an order that depends on nothing but their names.
"""

from __future__ import annotations

import csv
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from lorvp import cifar, huggingface, torchvision_sets
from lorvp.errors import UserError
from lorvp.rows import Rows, Source

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def image_files(folder: Path) -> list[str]:
    """The images under `folder` by their paths in it, sorted.

    Links to folders are not followed, so that none leads in a circle.
    """
    found = []
    for parent, _, names in os.walk(folder):
        inside = os.path.relpath(parent, folder)
        there = "" if inside == "." else inside + os.sep
        found += [there + name for name in names if name.lower().endswith(SUFFIXES)]
    return sorted(found)


def class_folders(root: Path, class_names: Sequence[str] | None = None) -> tuple[list[str], Rows]:
    """`root`/CLASS/IMAGE; classes in sorted order, or those given. Raises UserError for none, and for an empty one."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; an image folder holds CLASS/IMAGE files")
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    names = found if class_names is None else list(class_names)
    if not names:
        raise UserError(f"{root}: no class folders; an image folder holds CLASS/IMAGE files")
    if set(found) != set(names):
        odd = sorted(set(found) ^ set(names))
        raise UserError(f"{root}: its class folders are not those of the other split: {', '.join(odd[:5])}")
    images: list[str] = []
    counts: list[int] = []
    for name in names:
        files = image_files(root / name)
        if not files:
            raise UserError(f"{root / name}: a class folder without images ({', '.join(sorted(SUFFIXES))})")
        images += [name + os.sep + file for file in files]
        counts.append(len(files))
    return names, Rows(np.repeat(np.arange(len(names)), counts), images, root)


def listed(root: Path, labels: dict[str, str], class_names: Sequence[str], where: Path) -> Rows:
    """The images of a flat folder by a list of file name -> class. Raises UserError where the two differ."""
    files = image_files(root)
    odd = sorted(set(files) ^ labels.keys())
    if odd:
        raise UserError(f"{where}: {len(odd)} names are not those of the files in {root}: {', '.join(odd[:3])}")
    unknown = sorted(set(labels.values()) - set(class_names))
    if unknown:
        raise UserError(f"{where}: classes without a folder in train: {', '.join(unknown[:3])}")
    index = {name: i for i, name in enumerate(class_names)}
    return Rows(np.array([index[labels[file]] for file in files], dtype=np.int64), files, root)


def image_folder(root: Path) -> Source:
    """`root`/train/CLASS/IMAGE and `root`/test or `root`/val; or `root`/CLASS/IMAGE, undivided."""
    if not (root / "train").is_dir():
        names, rows = class_folders(root)
        return Source(names, {"train": rows})
    names, train = class_folders(root / "train")
    test = next((root / split for split in ("test", "val") if (root / split).is_dir()), None)
    return Source(names, {"train": train} | ({"test": class_folders(test, names)[1]} if test else {}))


DEVKIT = "ILSVRC2012_devkit_t12"


def imagenet(root: Path) -> Source:
    """ILSVRC 2012: train/WNID/*.JPEG, and val/WNID/*.JPEG or a flat val/*.JPEG.

    What is in a flat val is said by Kaggle's LOC_val_solution.csv in `root`, or by the development kit there, as it
    comes or unpacked. The validation images are the test split: selection happens on a part of train.
    """
    names, train = class_folders(root / "train")
    if any(entry.is_dir() for entry in os.scandir(_folder(root / "val"))):
        return Source(names, {"train": train, "test": class_folders(root / "val", names)[1]})
    solution = root / "LOC_val_solution.csv"
    if solution.is_file():
        with open(solution, newline="") as file:
            labels = {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        return Source(names, {"train": train, "test": listed(root / "val", labels, names, solution)})
    kit = next((path for path in (root / DEVKIT, root / f"{DEVKIT}.tar.gz") if path.exists()), None)
    if kit is None:
        raise UserError(
            f"{root / 'val'}: no WNID folders, and neither {solution.name} nor {DEVKIT}.tar.gz in {root} "
            f"that say which is which"
        )
    return Source(names, {"train": train, "test": listed(root / "val", _ground_truth(kit), names, kit)})


def _ground_truth(kit: Path) -> dict[str, str]:
    """The WNID of each validation image, by file name, from ILSVRC's development kit."""
    from scipy.io import loadmat  # reads values only, no code

    try:
        with _member(kit, "data/meta.mat") as file:
            synsets = loadmat(file, squeeze_me=True)["synsets"]
        with _member(kit, "data/ILSVRC2012_validation_ground_truth.txt") as file:
            numbers = [int(line) for line in file]
        wnids = {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in synsets}
        return {f"ILSVRC2012_val_{i:08}.JPEG": wnids[number] for i, number in enumerate(numbers, start=1)}
    except (OSError, KeyError, ValueError, TypeError, IndexError, tarfile.TarError) as error:
        raise UserError(f"{kit}: not ILSVRC's development kit ({error})") from None


@contextmanager
def _member(kit: Path, name: str) -> Iterator[IO[bytes]]:
    """A file of the development kit, a folder or an archive."""
    if kit.is_dir():
        with open(kit / name, "rb") as file:
            yield file
    else:
        with tarfile.open(kit) as tar:
            member = tar.extractfile(f"{DEVKIT}/{name}")
            if member is None:
                raise KeyError(f"{name} is not a file")
            yield member


def only_test(root: Path) -> Source:
    """CLASS/IMAGE with nothing to train on: ImageNet-R, -A and -Sketch, whose classes are WNIDs of ImageNet's."""
    names, rows = class_folders(root)
    return Source(names, {"test": rows})


def imagenet_v2(root: Path) -> Source:
    """0/IMAGE to 999/IMAGE: the folders are ImageNet's class numbers, in the order of numbers and not of text."""
    names = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    wrong = sorted(name for name in names if not name.isdigit())
    if wrong:
        raise UserError(f"{root}: the class folders of imagenet-v2 are numbers, and not {', '.join(wrong[:3])}")
    names, rows = class_folders(root, sorted(names, key=int))
    return Source(names, {"test": rows})


def tiny_imagenet(root: Path) -> Source:
    """wnids.txt, train/WNID/images/*.JPEG, val/images/*.JPEG with val/val_annotations.txt; 64 px."""
    names, train = class_folders(root / "train")
    annotations = root / "val" / "val_annotations.txt"
    for needed in (root / "wnids.txt", annotations):
        if not needed.is_file():
            raise UserError(f"{needed}: missing; tiny-imagenet is laid out as in tiny-imagenet-200.zip")
    if sorted((root / "wnids.txt").read_text().split()) != names:
        raise UserError(f"{root / 'wnids.txt'}: not the class folders of {root / 'train'}")
    rows = [line.split("\t") for line in annotations.read_text().splitlines()]
    labels = {row[0]: row[1] for row in rows}
    return Source(names, {"train": train, "test": listed(root / "val" / "images", labels, names, annotations)}, 64)


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    return path


SOURCES: dict[str, Callable[[Path], Source]] = {
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "huggingface": huggingface.saved,
    "image_folder": image_folder,
    "imagenet": imagenet,
    "imagenet-a": only_test,
    "imagenet-r": only_test,
    "imagenet-sketch": only_test,
    "imagenet-v2": imagenet_v2,
    "tiny-imagenet": tiny_imagenet,
} | torchvision_sets.SOURCES
EXPECTED: dict[str, dict[str, int]] = {
    "cifar10": {"classes": 10, "train": 50_000, "test": 10_000},
    "cifar100": {"classes": 100, "train": 50_000, "test": 10_000},
    "imagenet": {"classes": 1_000, "train": 1_281_167, "test": 50_000},
    "imagenet-a": {"classes": 200, "test": 7_500},
    "imagenet-r": {"classes": 200, "test": 30_000},
    "imagenet-sketch": {"classes": 1_000, "test": 50_889},
    "imagenet-v2": {"classes": 1_000, "test": 10_000},
    "tiny-imagenet": {"classes": 200, "train": 100_000, "test": 10_000},
} | torchvision_sets.EXPECTED


def read_source(name: str, root: Path, partial: bool = False) -> Source:
    """What `prepare` stores. Raises UserError for an unknown name, a wrong layout, and counts that are not its.

    `partial` lets a part of a dataset pass.
    """
    if name not in SOURCES:
        raise UserError(f"no dataset is called {name!r}; one of {', '.join(SOURCES)}")
    source = SOURCES[name](_folder(root))
    found = {"classes": len(source.class_names)} | {split: len(rows) for split, rows in source.splits.items()}
    expected = EXPECTED.get(name, found)
    if found != expected and not partial:
        both = ", ".join(f"{found.get(key, 0):,} {key} (should be {expected[key]:,})" for key in expected)
        raise UserError(f"{root}: not all of {name}: {both}; --partial takes what there is")
    return source
