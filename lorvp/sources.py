"""The datasets as they come: what `python -m lorvp.data prepare NAME` reads.

A dataset is a function here, and a line in SOURCES. Each lists its images and labels without decoding any, in an order
that depends on nothing but their names.
"""

from __future__ import annotations

import csv
import io
import os
import pickle
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorvp.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Rows:
    """The images of one split: files to decode, or pixels (N, H, W, 3) uint8; labels (N,) int64 and names."""

    labels: np.ndarray
    names: list[str]
    paths: list[Path] | None = None
    pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Source:
    class_names: list[str]
    splits: dict[str, Rows]
    native_size: int | None = None
    """Side of the images where all have the same, so that they need not be resized."""


def image_files(folder: Path) -> list[Path]:
    """The images under `folder`, sorted; links to folders are not followed, so that none leads in a circle."""
    found = []
    for parent, _, names in os.walk(folder):
        found += [Path(parent, name) for name in names if Path(name).suffix.lower() in SUFFIXES]
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
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        files = image_files(root / name)
        if not files:
            raise UserError(f"{root / name}: a class folder without images ({', '.join(sorted(SUFFIXES))})")
        paths += files
        labels += [label] * len(files)
    return names, Rows(np.array(labels, dtype=np.int64), [str(p.relative_to(root)) for p in paths], paths)


def listed(root: Path, labels: dict[str, str], class_names: Sequence[str], where: Path) -> Rows:
    """The images of a flat folder by a list of file name -> class. Raises UserError where the two differ."""
    files = {path.name: path for path in image_files(root)}
    odd = sorted(files.keys() ^ labels.keys())
    if odd:
        raise UserError(f"{where}: {len(odd)} names are not those of the files in {root}: {', '.join(odd[:3])}")
    unknown = sorted(set(labels.values()) - set(class_names))
    if unknown:
        raise UserError(f"{where}: classes without a folder in train: {', '.join(unknown[:3])}")
    index = {name: i for i, name in enumerate(class_names)}
    names = sorted(files)
    return Rows(np.array([index[labels[n]] for n in names], dtype=np.int64), names, [files[n] for n in names])


def image_folder(root: Path) -> Source:
    """`root`/train/CLASS/IMAGE and `root`/test or `root`/val; or `root`/CLASS/IMAGE, undivided."""
    if not (root / "train").is_dir():
        names, rows = class_folders(root)
        return Source(names, {"train": rows})
    names, train = class_folders(root / "train")
    test = next((root / split for split in ("test", "val") if (root / split).is_dir()), None)
    return Source(names, {"train": train} | ({"test": class_folders(test, names)[1]} if test else {}))


def imagenet(root: Path) -> Source:
    """ILSVRC 2012: train/WNID/*.JPEG, and val/WNID/*.JPEG or val/*.JPEG with Kaggle's LOC_val_solution.csv in `root`.

    The validation images are the test split: selection happens on a part of train.
    """
    names, train = class_folders(root / "train")
    solution = root / "LOC_val_solution.csv"
    if not solution.is_file():
        if not any(entry.is_dir() for entry in os.scandir(_folder(root / "val"))):
            raise UserError(
                f"{root / 'val'}: no WNID folders, and no {solution.name} in {root} that says which is which"
            )
        return Source(names, {"train": train, "test": class_folders(root / "val", names)[1]})
    with open(solution, newline="") as file:
        labels = {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    return Source(names, {"train": train, "test": listed(root / "val", labels, names, solution)})


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


def cifar10(root: Path) -> Source:
    """The python version's archive, cifar-10-python.tar.gz, or the folder in it."""
    batches = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    return _cifar(root, "cifar-10-python.tar.gz", "cifar-10-batches-py", "batches.meta", batches, "label")


def cifar100(root: Path) -> Source:
    """The python version's archive, cifar-100-python.tar.gz, or the folder in it; the 100 fine labels."""
    batches = {"train": ["train"], "test": ["test"]}
    return _cifar(root, "cifar-100-python.tar.gz", "cifar-100-python", "meta", batches, "fine_label")


def download(name: str, root: Path) -> None:
    """Has torchvision put the archive of CIFAR-10 or CIFAR-100 into `root`, and check it. Raises UserError."""
    from torchvision import datasets

    kinds = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
    if name not in kinds:
        raise UserError(f"--download: {name} is not one of {', '.join(kinds)}; get it from its authors")
    try:
        kinds[name](root, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{root}: no {name}, and its download failed ({error})") from None


def _cifar(root: Path, archive: str, folder: str, meta: str, batches: dict[str, list[str]], key: str) -> Source:
    if (root / folder).is_dir():

        def member(name: str) -> bytes:
            try:
                return (root / folder / name).read_bytes()
            except FileNotFoundError:
                raise UserError(f"{root / folder / name}: missing") from None
    elif (root / archive).is_file():

        def member(name: str) -> bytes:
            try:
                with tarfile.open(root / archive) as tar:
                    return tar.extractfile(f"{folder}/{name}").read()
            except (KeyError, tarfile.TarError, EOFError, OSError) as error:
                raise UserError(f"{root / archive}: {folder}/{name} can't be read ({error})") from None
    else:
        raise UserError(f"{root}: holds neither {archive} nor {folder}; they are the official python version")
    class_names = [str(name) for name in _plain_pickle(member(meta), meta)[f"{key}_names"]]
    splits = {}
    for split, files in batches.items():
        read = [_plain_pickle(member(name), name) for name in files]
        pixels = np.concatenate([np.asarray(batch["data"], dtype=np.uint8) for batch in read])
        labels = np.concatenate([np.asarray(batch[f"{key}s"], dtype=np.int64) for batch in read])
        if pixels.shape != (len(labels), 3072) or not ((labels >= 0) & (labels < len(class_names))).all():
            raise UserError(f"{root}: {split} has pixels {pixels.shape} and {len(labels)} labels, not 3,072 each")
        names = [str(name) for batch in read for name in batch["filenames"]]
        splits[split] = Rows(labels, names, pixels=pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Source(class_names, splits, 32)


PLAIN = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Plain(pickle.Unpickler):
    """Builds numbers, texts, lists, dictionaries and arrays; nothing in a file can have it run anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("._core", ".core"), name) not in PLAIN:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return super().find_class(module, name)


def _plain_pickle(data: bytes, name: str) -> dict[str, Any]:
    """CIFAR's own format, which is a pickle, read without running what it may hold."""
    try:
        values = _Plain(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{name}: not a batch of CIFAR ({error})") from None
    return values


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    return path


SOURCES: dict[str, Callable[[Path], Source]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "image_folder": image_folder,
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
}


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
