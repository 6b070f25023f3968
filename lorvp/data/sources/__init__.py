"""The datasets as they come: what `python -m lorvp.data prepare NAME` reads.

A dataset is a function here or in a module beside this one, and a line in SOURCES. Each lists its images and labels
without decoding any, in an order that depends on nothing but their names.
"""

from __future__ import annotations

import csv
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from lorvp.data.sources import cifar, folders, huggingface, torchvision_sets
from lorvp.data.sources.base import Rows, Source
from lorvp.errors import UserError


def listed(root: Path, labels: dict[str, str], class_names: Sequence[str], where: Path) -> Rows:
    """The images of a flat folder by a list of file name -> class. Raises UserError where the two differ."""
    left_out: Counter[str] = Counter()
    files = folders.image_files(root, left_out)
    odd = sorted(set(files) ^ labels.keys())
    if odd:
        raise UserError(f"{where}: {len(odd)} names are not those of the files in {root}: {', '.join(odd[:3])}")
    unknown = sorted(set(labels.values()) - set(class_names))
    if unknown:
        raise UserError(f"{where}: classes without a folder in train: {', '.join(unknown[:3])}")
    index = {name: i for i, name in enumerate(class_names)}
    return Rows(np.array([index[labels[file]] for file in files], dtype=np.int64), files, root, left_out=left_out)


DEVKIT = "ILSVRC2012_devkit_t12"


def imagenet(root: Path) -> Source:
    """ILSVRC 2012: train/WNID/*.JPEG, and val/WNID/*.JPEG or a flat val/*.JPEG.

    What is in a flat val is said by Kaggle's LOC_val_solution.csv in `root`, or by the development kit there, as it
    comes or unpacked. The validation images are the test split: selection happens on a part of train.
    """
    names, train = folders.class_folders(root / "train")
    if folders.inner_folders(_folder(root / "val")):
        return Source(names, {"train": train, "test": folders.class_folders(root / "val", names)[1]})
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
    names, rows = folders.class_folders(root)
    return Source(names, {"test": rows})


def imagenet_v2(root: Path) -> Source:
    """0/IMAGE to 999/IMAGE: the folders are ImageNet's class numbers, in the order of numbers and not of text."""
    names = folders.inner_folders(root)
    wrong = sorted(name for name in names if not name.isdigit())
    if wrong:
        raise UserError(f"{root}: the class folders of imagenet-v2 are numbers, and not {', '.join(wrong[:3])}")
    names, rows = folders.class_folders(root, sorted(names, key=int))
    return Source(names, {"test": rows})


def tiny_imagenet(root: Path) -> Source:
    """wnids.txt, train/WNID/images/*.JPEG, val/images/*.JPEG with val/val_annotations.txt; 64 px."""
    names, train = folders.class_folders(root / "train")
    annotations = root / "val" / "val_annotations.txt"
    for needed in (root / "wnids.txt", annotations):
        if not needed.is_file():
            raise UserError(f"{needed}: missing; tiny-imagenet is laid out as in tiny-imagenet-200.zip")
    if sorted((root / "wnids.txt").read_text().split()) != names:
        raise UserError(f"{root / 'wnids.txt'}: not the class folders of {root / 'train'}")
    rows = [line.split("\t") for line in annotations.read_text().splitlines()]
    labels = {row[0]: row[1] for row in rows}
    return Source(names, {"train": train, "test": listed(root / "val" / "images", labels, names, annotations)}, 64)


def gtsrb(root: Path) -> Source:
    """The German traffic signs, as torchvision's download leaves them or from the official archives, unpacked.

    Of the latter each class folder has its GT-CLASS.csv, and GT-final_test.csv has the classes of the test images.
    """
    if (root / "gtsrb").is_dir():
        return torchvision_sets.SOURCES["gtsrb"](root)
    lists = sorted(path for path in root.rglob("GT-*.csv") if not folders.is_system(path.name))
    trained = [path for path in lists if path.name == f"GT-{path.parent.name}.csv"]
    tested = [path for path in lists if path.name == "GT-final_test.csv"]
    if not trained:
        return torchvision_sets.SOURCES["gtsrb"](root)  # which says what is missing
    places = sorted({path.parent.parent for path in trained})
    if len(places) > 1 or len(tested) > 1:
        twice = places if len(places) > 1 else tested
        raise UserError(f"{root}: {twice[0]} and {twice[1]} are both of gtsrb; leave one there")
    if not tested:
        raise UserError(f"{root}: no GT-final_test.csv, which GTSRB_Final_Test_GT.zip has: the test images' classes")
    train = [(path.parent / name, label) for path in trained for name, label in _signs(path)]
    images = next((path.parent for path in lists if path.name == "GT-final_test.test.csv"), tested[0].parent)
    test = [(images / name, label) for name, label in _signs(tested[0])]
    splits = {}
    for split, signs, where in (("train", train, places[0]), ("test", test, images)):
        paths = [str(path.relative_to(where)) for path, _ in signs]
        left_out: Counter[str] = Counter()
        odd = sorted(set(folders.image_files(where, left_out)) ^ set(paths))
        if odd:
            raise UserError(f"{where}: {len(odd)} images are not those of its GT-*.csv: {', '.join(odd[:3])}")
        del left_out["*.csv"]
        splits[split] = Rows(np.array([label for _, label in signs], np.int64), paths, where, left_out=left_out)
    return Source([str(i) for i in range(GTSRB["classes"])], splits, expected=GTSRB)


def _signs(path: Path) -> list[tuple[str, int]]:
    """The image files and classes of one of GTSRB's lists: semicolons between columns, the image's place among them."""
    with open(path, newline="") as file:
        try:
            signs = [(row["Filename"], int(row["ClassId"])) for row in csv.DictReader(file, delimiter=";")]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a list of GTSRB's, with Filename and ClassId ({error})") from None
    wrong = [label for _, label in signs if not 0 <= label < GTSRB["classes"]]
    if wrong:
        raise UserError(f"{path}: ClassId {wrong[0]} is not one of 0 to {GTSRB['classes'] - 1}")
    return signs


GTSRB = {"classes": 43, "train": 39_209, "test": 12_630}
"""The official archives; torchvision has the 26,640 that the competition had to train on."""


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    return path


SOURCES: dict[str, Callable[[Path], Source]] = torchvision_sets.SOURCES | {
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "gtsrb": gtsrb,
    "huggingface": huggingface.saved,
    "image_folder": folders.image_folder,
    "imagenet": imagenet,
    "imagenet-a": only_test,
    "imagenet-r": only_test,
    "imagenet-sketch": only_test,
    "imagenet-v2": imagenet_v2,
    "tiny-imagenet": tiny_imagenet,
}
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


def read_source(name: str, root: Path, partial: bool = False, nested: bool = False) -> Source:
    """What `prepare` stores. Raises UserError for an unknown name, a wrong layout, and counts that are not its.

    `partial` lets a part of a dataset pass, `nested` folders that do not look like classes.
    """
    if name not in SOURCES:
        raise UserError(f"no dataset is called {name!r}; one of {', '.join(sorted(SOURCES))}")
    if nested and name != "image_folder":
        raise UserError(f"--nested is about image_folder; {name} has a layout of its own")
    source = folders.image_folder(root, nested) if nested else SOURCES[name](_folder(root))
    found = {"classes": len(source.class_names)} | {split: len(rows) for split, rows in source.splits.items()}
    expected = source.expected or EXPECTED.get(name, found)
    if found != expected and not partial:
        both = ", ".join(f"{found.get(key, 0):,} {key} (should be {expected[key]:,})" for key in expected)
        raise UserError(f"{root}: not all of {name}: {both}; --partial takes what there is")
    return source
