"""Read datasets in their original layouts, for `python -m lorvp.data prepare NAME`.

A dataset is a function here or in a module beside this one, and a line in SOURCES. The function lists images and labels
without decoding them, in an order that depends on their names only.
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


def rows_from_list(root: Path, labels: dict[str, str], class_names: Sequence[str], where: Path) -> Rows:
    """List the images of a flat folder by a mapping of file name to class. Raises UserError if the two differ."""
    left_out: Counter[str] = Counter()
    files = folders.image_files(root, left_out)
    unmatched = sorted(set(files) ^ labels.keys())
    if unmatched:
        listing = ", ".join(unmatched[:3])
        raise UserError(f"{where}: {len(unmatched)} names are not those of the files in {root}: {listing}")
    unknown = sorted(set(labels.values()) - set(class_names))
    if unknown:
        raise UserError(f"{where}: classes without a folder in train: {', '.join(unknown[:3])}")
    index = {name: i for i, name in enumerate(class_names)}
    return Rows(np.array([index[labels[file]] for file in files], dtype=np.int64), files, root, left_out=left_out)


DEVKIT = "ILSVRC2012_devkit_t12"


def imagenet(root: Path) -> Source:
    """Read ILSVRC 2012: train/WNID/*.JPEG, and val/WNID/*.JPEG or a flat val/*.JPEG. Raises UserError.

    The classes of a flat val come from Kaggle's LOC_val_solution.csv in `root`, or from the development kit there,
    packed or unpacked. The validation images become the test split; trials validate on a part of train.
    """
    names, train = folders.class_folders(root / "train")
    if folders.inner_folders(_folder(root / "val")):
        return Source(names, {"train": train, "test": folders.class_folders(root / "val", names)[1]})
    solution = root / "LOC_val_solution.csv"
    if solution.is_file():
        with open(solution, newline="") as file:
            labels = {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        return Source(names, {"train": train, "test": rows_from_list(root / "val", labels, names, solution)})
    kit = next((path for path in (root / DEVKIT, root / f"{DEVKIT}.tar.gz") if path.exists()), None)
    if kit is None:
        raise UserError(
            f"{root / 'val'}: no WNID folders, and neither {solution.name} nor {DEVKIT}.tar.gz in {root} "
            f"that say which is which"
        )
    return Source(names, {"train": train, "test": rows_from_list(root / "val", _ground_truth(kit), names, kit)})


def _ground_truth(kit: Path) -> dict[str, str]:
    """Read the WNID of each validation image, by file name, from ILSVRC's development kit."""
    from scipy.io import loadmat  # reads values only, no code

    try:
        with _member(kit, "data/meta.mat") as file:
            synsets = loadmat(file, squeeze_me=True)["synsets"]
        with _member(kit, "data/ILSVRC2012_validation_ground_truth.txt") as file:
            numbers = [int(line) for line in file]
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        return {f"ILSVRC2012_val_{i:08}.JPEG": wnids[number] for i, number in enumerate(numbers, start=1)}
    except (OSError, KeyError, ValueError, TypeError, IndexError, tarfile.TarError) as error:
        raise UserError(f"{kit}: not ILSVRC's development kit ({error})") from None


@contextmanager
def _member(kit: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a file of the development kit, which is a folder or an archive."""
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
    """Read CLASS/IMAGE as a test split only: ImageNet-R, -A and -Sketch, whose classes are ImageNet's WNIDs."""
    names, rows = folders.class_folders(root)
    return Source(names, {"test": rows})


def imagenet_v2(root: Path) -> Source:
    """Read ImageNet-V2: 0/IMAGE to 999/IMAGE. The folders are class numbers and are sorted as numbers."""
    names = folders.inner_folders(root)
    wrong = sorted(name for name in names if not name.isdigit())
    if wrong:
        raise UserError(f"{root}: the class folders of imagenet-v2 are numbers, and not {', '.join(wrong[:3])}")
    names, rows = folders.class_folders(root, sorted(names, key=int))
    return Source(names, {"test": rows})


def tiny_imagenet(root: Path) -> Source:
    """Read wnids.txt, train/WNID/images/*.JPEG and val/images/*.JPEG with val/val_annotations.txt; 64 px."""
    names, train = folders.class_folders(root / "train")
    annotations = root / "val" / "val_annotations.txt"
    for needed in (root / "wnids.txt", annotations):
        if not needed.is_file():
            raise UserError(f"{needed}: missing; tiny-imagenet is laid out as in tiny-imagenet-200.zip")
    if sorted((root / "wnids.txt").read_text().split()) != names:
        raise UserError(f"{root / 'wnids.txt'}: not the class folders of {root / 'train'}")
    rows = [line.split("\t") for line in annotations.read_text().splitlines()]
    labels = {row[0]: row[1] for row in rows}
    return Source(
        names, {"train": train, "test": rows_from_list(root / "val" / "images", labels, names, annotations)}, 64
    )


def gtsrb(root: Path) -> Source:
    """Read the German traffic signs from torchvision's download or from the unpacked official archives.

    In the archives each class folder has its GT-CLASS.csv, and GT-final_test.csv has the test images' classes.
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
    """Read the image files and classes of one of GTSRB's lists, whose columns are separated by semicolons."""
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
"""Counts of the official archives; torchvision has the competition's 26,640 training images."""


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
    """Read the source that `prepare` stores. Raises UserError for an unknown name, a wrong layout or wrong counts.

    `partial` accepts a part of a dataset, `nested` accepts folders that do not look like classes.
    """
    if name not in SOURCES:
        raise UserError(f"no dataset is called {name!r}; one of {', '.join(sorted(SOURCES))}")
    if nested and name != "image_folder":
        raise UserError(f"--nested is about image_folder; {name} has a layout of its own")
    source = folders.image_folder(root, nested) if nested else SOURCES[name](_folder(root))
    counts = {"classes": len(source.class_names)} | {split: len(rows) for split, rows in source.splits.items()}
    expected = source.expected or EXPECTED.get(name, counts)
    if counts != expected and not partial:
        both = ", ".join(f"{counts.get(key, 0):,} {key} (should be {expected[key]:,})" for key in expected)
        raise UserError(f"{root}: not all of {name}: {both}; --partial takes what there is")
    return source
