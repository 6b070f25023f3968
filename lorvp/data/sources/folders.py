"""Read folders of images: tell images, classes and splits by their names, and count what is left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from lorvp.data.sources.base import Rows, Source
from lorvp.errors import UserError

SPLITS = re.compile(
    r"(?:(?P<train>train|training)|(?P<val>val|valid|validation|dev|development)|(?P<test>test|testing))"
    r"(?:[ _-]?(?:set|split|data|images?))?"
)
"""Names of splits, in lower case."""
SYSTEM = {
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "@eadir",
    "@tmp",
    "__macosx",
    "__pycache__",
    "desktop.ini",
    "ehthumbs.db",
    "lost+found",
    "system volume information",
    "thumbs.db",
}
"""Names that operating systems, file servers and notebooks leave, apart from names that begin with a dot."""
COMMON = (".jpg", ".png", ".webp", ".tif")
ONLY_NAMED = {"EPS", "MPEG"}
"""Formats that Pillow recognises by name and does not decode by itself."""


@cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that the installed Pillow reads."""
    Image.init()
    reads = {
        kind
        for kind, (plugin, _) in Image.OPEN.items()
        if kind not in ONLY_NAMED and not (isinstance(plugin, type) and issubclass(plugin, ImageFile.StubImageFile))
    }
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in reads)


def is_system(name: str) -> bool:
    """Tell whether a file or folder is hidden, or left by a system."""
    return name.startswith(".") or name.casefold() in SYSTEM


def split_name(name: str) -> str | None:
    """Return the split that a name stands for: train, val, test, or None."""
    match = SPLITS.fullmatch(name.casefold())
    return match.lastgroup if match else None


def inner_folders(root: Path) -> list[str]:
    """List the folders in `root` that are no system's, sorted; links to folders are included."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_system(entry.name))


def image_files(folder: Path, left_out: Counter[str] | None = None) -> list[str]:
    """List the images under `folder` by their paths in it, sorted; count other entries in `left_out`.

    Links to folders are not followed, as they may form a circle.
    """
    paths: list[str] = []
    others: Counter[str] = Counter() if left_out is None else left_out
    for parent, folders, names in os.walk(folder):
        inside = os.path.relpath(parent, folder)
        there = "" if inside == "." else inside + os.sep
        images = [name for name in names if _is_image(name)]
        paths += [there + name for name in images]
        if len(images) < len(names):
            others.update(_kind(name) for name in names if not _is_image(name))
        others.update(f"{name}/" for name in folders if is_system(name))
        folders[:] = [name for name in folders if not is_system(name)]
        others.update("links to folders" for name in folders if os.path.islink(os.path.join(parent, name)))
    return sorted(paths)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes() and not is_system(name)


def _kind(name: str) -> str:
    """Return the kind under which a file that is no image is counted."""
    suffix = os.path.splitext(name)[1].lower()
    if name.startswith("._"):  # macOS keeps a file's attributes in it
        return "._*"
    return f"*{suffix}" if suffix and not is_system(name) else name


def class_folders(root: Path, class_names: Sequence[str] | None = None) -> tuple[list[str], Rows]:
    """Read `root`/CLASS/IMAGE, with sorted classes or those of `class_names`.

    Raises UserError if there are no class folders, other ones, or an empty one.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; an image folder holds CLASS/IMAGE files")
    present = inner_folders(root)
    names = present if class_names is None else list(class_names)
    if not names or not present:
        raise UserError(f"{root}: no class folders; an image folder holds CLASS/IMAGE files")
    if set(present) != set(names):
        odd = sorted(set(present) ^ set(names))
        raise UserError(f"{root}: its class folders are not those of the other split: {', '.join(odd[:5])}")
    left_out = _beside(root)
    images: list[str] = []
    counts: list[int] = []
    for name in names:
        files = image_files(root / name, left_out)
        if not files:
            raise UserError(
                f"{root / name}: a class folder without images ({', '.join(COMMON)} and whatever Pillow reads)"
            )
        images += [name + os.sep + file for file in files]
        counts.append(len(files))
    return names, Rows(np.repeat(np.arange(len(names)), counts), images, root, left_out=left_out)


def _beside(root: Path) -> Counter[str]:
    """Count the entries in `root` that are no class folders."""
    others: Counter[str] = Counter()
    for entry in os.scandir(root):
        if entry.is_dir():
            others.update([f"{entry.name}/"] if is_system(entry.name) else [])
        else:
            others[f"images in no class folder ({root.name})" if _is_image(entry.name) else _kind(entry.name)] += 1
    return others


def image_folder(root: Path, nested: bool = False) -> Source:
    """Read `root`/SPLIT/CLASS/IMAGE, with any usual names of the splits, or undivided `root`/CLASS/IMAGE.

    A val split without a test split becomes the test set, as in ImageNet's layout. `nested` takes every folder in
    `root` as a class. Raises UserError if folders look like splits or unpacked archives and not like classes.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; an image folder holds CLASS/IMAGE files")
    folders = {} if nested else _split_folders(root)
    if not folders:
        names, rows = class_folders(root)
        if not nested:
            _check_classes(root, names, rows)
        return Source(names, {"train": rows})
    left_out: Counter[str] = Counter(f"{name}/" for name in inner_folders(root) if name not in folders.values())
    left_out += _beside(root)
    names, train = class_folders(root / folders["train"])
    _check_classes(root / folders["train"], names, train)
    splits = {"train": train}
    for split in ("val", "test"):
        if split in folders and not inner_folders(root / folders[split]):
            left_out[f"{folders[split]}/, which has no class folders"] += 1
        elif split in folders:
            splits[split] = class_folders(root / folders[split], names)[1]
            _check_classes(root / folders[split], names, splits[split])
    notes: tuple[str, ...] = ()
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
        notes = (f"{root}: {folders['val']}/ is the test set, as there is no other; validation images are train's",)
    return Source(names, splits, notes=notes, left_out=left_out)


def _split_folders(root: Path) -> dict[str, str]:
    """Return the split folders in `root` by split; an empty dictionary if there is none to train on."""
    names = inner_folders(root)
    splits = by_split(names, root)
    if "train" in splits and inner_folders(root / splits["train"]):
        return splits
    if len(splits) > 1 and not any(inner_folders(root / name) for name in splits.values()):
        raise UserError(f"{root}: {' and '.join(splits.values())} are splits, and have no class folders in them")
    return {}


def by_split(names: Iterable[str], where: Path) -> dict[str, str]:
    """Return the names that stand for splits, by split. Raises UserError if two stand for the same."""
    splits: dict[str, str] = {}
    for name in names:
        split = split_name(name)
        if split in splits:
            raise UserError(f"{where}: {splits[split]} and {name} would both be the {split} split; leave one there")
        if split:
            splits[split] = name
    return splits


def _check_classes(root: Path, names: list[str], rows: Rows) -> None:
    """Raise UserError for a class folder whose images lie in several subfolders, as those of a split do."""
    inner: dict[str, set[str]] = {name: set() for name in names}
    for path in rows.names:
        name, _, rest = path.partition(os.sep)
        inner[name].add(os.path.dirname(rest))
    odd = [
        name
        for name, folders in inner.items()
        if "" not in folders and (len(folders) > 1 or split_name(name) is not None)
    ]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise UserError(
            f"{root}: these look like splits or unpacked archives, not like classes: {', '.join(odd[:3])}{more} "
            f"({len(rows):,} images in {len(names)} folders); name the folder that has the classes, or have "
            f"`prepare image_folder --nested` take each as a class"
        )
