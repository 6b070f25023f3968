"""Read Hugging Face image datasets on disk: from `save_to_disk`, or the Parquet files of a dataset's repository.

Both are Arrow tables whose schema says which column holds the encoded image and which the class (the conventions of
huggingface/datasets: features of the types Image and ClassLabel), so that pyarrow reads them as they are.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lorvp.data.sources import folders
from lorvp.data.sources.base import Rows, Source
from lorvp.errors import UserError

PART = re.compile(r"(?P<split>[^-]+)(?:-(?P<number>\d+))?(?:-of-(?P<of>\d+))?(?:-.*)?\.(?:parquet|arrow)")
"""Pattern of a file's name: the split, the number of the part, and the number of parts."""
LABEL_COLUMNS = ("label", "labels", "fine_label")
"""Columns that hold the class if there are several columns of classes."""


@dataclass(frozen=True)
class Tables:
    """Hold the encoded images of one split, in the column `image` of tables on disk."""

    files: tuple[Path, ...]
    starts: np.ndarray
    """First row of each file, and the number of all rows."""
    image: str

    def __getitem__(self, row: int) -> bytes:
        """Return the encoded image at `row`. Raises UserError if the table only refers to files."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        file, row = self.files[number], int(row - self.starts[number])
        if file.suffix == ".parquet":
            group = 0
            while row >= (rows := _parquet(file).metadata.row_group(group).num_rows):
                group, row = group + 1, row - rows
            cell = _row_group(file, group, self.image)[row]
        else:
            cell = _arrow(file).column(self.image)[row]
        encoded: bytes | None = cell["bytes"].as_py()
        if encoded is None:
            raise UserError(f"{file}: its images are not in it, but files elsewhere: save them with the table")
        return encoded

    def sizes(self) -> np.ndarray:
        """Return the bytes of each image, (N,) int64; in Parquet files the mean of each row group."""
        sizes = []
        for file in self.files:
            if file.suffix == ".parquet":
                for group in range(_parquet(file).num_row_groups):
                    rows = _parquet(file).metadata.row_group(group)
                    columns = [rows.column(i) for i in range(rows.num_columns)]
                    total = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == f"{self.image}.bytes")
                    sizes.append(np.full(rows.num_rows, total // max(1, rows.num_rows)))
            else:
                lengths = pc.binary_length(pc.struct_field(_arrow(file).column(self.image), "bytes"))
                sizes.append(lengths.fill_null(0).to_numpy())
        return np.concatenate(sizes).astype(np.int64)

    def column(self, name: str) -> list[str]:
        """Return another column of the tables, as text, empty where it is null. Raises UserError if there is none."""
        values: list[str] = []
        for file in self.files:
            known = (_parquet(file).schema_arrow if file.suffix == ".parquet" else _arrow(file).schema).names
            if name not in known:
                raise UserError(f"--column: {file} has no column {name}; it has {', '.join(known)}")
            table = _parquet(file).read(columns=[name]) if file.suffix == ".parquet" else _arrow(file)
            values += ["" if value is None else str(value) for value in table.column(name).to_pylist()]
        return values


def saved(root: Path) -> Source:
    """Read a dataset on disk. The validation split becomes the test split if no test split has labels.

    Raises UserError if the tables' columns of images and classes are unclear, or if a part of a split is missing.
    """
    files, left_out = _split_files(root)
    if "train" not in files:
        there = f"; there are {', '.join(sorted({*files} | {*left_out}))}" if files or left_out else ""
        raise UserError(f"{root}: no train split of a Hugging Face dataset, of save_to_disk or in Parquet files{there}")
    image, label, class_names = _columns(files["train"][0])
    splits: dict[str, Rows] = {}
    notes = []
    for split in ("train", "val", "test"):
        if split not in files:
            continue
        rows = _rows(files[split], split, image, label)
        if split != "train" and (not len(rows) or rows.labels.max() < 0):  # -1 is "not told"
            left_out[f"{split} split, which has no labels"] += 1
        else:
            _check_labels(rows, class_names, root, split)
            splits[split] = rows
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
        notes = [f"{root}: the validation split is the test set, as no other has labels; validation images are train's"]
    return Source(class_names, splits, notes=tuple(notes), left_out=left_out)


def _split_files(root: Path) -> tuple[dict[str, list[Path]], Counter[str]]:
    """Return the tables of each split, and the count of what is left out."""
    left_out: Counter[str] = Counter()
    if (root / "state.json").is_file():
        return {"train": _complete_parts("train", root.glob("data-*.arrow"), root)}, left_out
    if (root / "dataset_dict.json").is_file():
        names = json.loads((root / "dataset_dict.json").read_text())["splits"]
        left_out.update(f"{name}/" for name in names if folders.split_name(name) is None)
        split_names = folders.by_split(names, root)
        return {
            split: _complete_parts(name, (root / name).glob("data-*.arrow"), root / name)
            for split, name in split_names.items()
        }, left_out
    configurations = _parquet_files(root, left_out)
    trained = sorted(name for name, splits in configurations.items() if "train" in folders.by_split(splits, root))
    if len(trained) > 1:
        raise UserError(
            f"{root}: has {len(trained)} configurations: {', '.join(trained)}; name one: {root / trained[0]}"
        )
    chosen = trained[0] if trained else next(iter(configurations), "")
    for name in configurations.keys() - {chosen}:
        left_out[f"{name}/"] += 1
    named = configurations.get(chosen, {})
    return {
        split: _complete_parts(name, named[name], root / chosen)
        for split, name in folders.by_split(named, root).items()
    }, left_out


def _parquet_files(root: Path, left_out: Counter[str]) -> dict[str, dict[str, list[Path]]]:
    """Find Parquet files by configuration and split, under their own names.

    Layouts are data/SPLIT-*.parquet, CONFIG/SPLIT-*.parquet, and the hub's CONFIG/SPLIT/0000.parquet.
    """
    files: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(root.rglob("*.parquet")):
        inside = path.relative_to(root)
        if any(map(folders.is_system, inside.parts)):  # the hub's client keeps a .cache
            continue
        own, *_ = _parse_file_name(path)
        parents = list(inside.parts[:-1])
        name = parents.pop() if folders.split_name(own) is None and parents else own
        if folders.split_name(name) is None:
            left_out[f"{inside.parent / own} (a split of another name)"] += 1
            continue
        if parents and parents[-1] == "data":
            parents.pop()
        files.setdefault("/".join(parents), {}).setdefault(name, []).append(path)
    return files


def _parse_file_name(path: Path) -> tuple[str, int | None, int | None]:
    """Parse a file's name into its split, the number of the part, and the number of parts."""
    match = PART.fullmatch(path.name)
    if match is None:
        return path.stem, None, None
    split, *texts = match.groups()
    number, count = (None if text is None else int(text) for text in texts)
    return split, number, count


def _complete_parts(split: str, paths: Iterable[Path], root: Path) -> list[Path]:
    """Return the sorted parts of a split. Raises UserError if their names show that others are missing."""
    files = sorted(paths)
    if not files:
        raise UserError(f"{root}: {split} has no file there")
    named = [_parse_file_name(path) for path in files]
    counts = {count for _, _, count in named if count is not None}
    if len(counts) > 1:
        raise UserError(f"{files[0].parent}: parts of several {split} splits: of {min(counts)} and of {max(counts)}")
    for count in counts:
        missing = sorted(set(range(count)) - {number for _, number, _ in named})
        if missing:
            raise UserError(
                f"{files[0].parent}: {split} has {count} parts, and {len(missing)} of them are missing, as number "
                f"{missing[0]:05}"
            )
    return files


def _columns(file: Path) -> tuple[str, str, list[str]]:
    """Return the column of images, the column of classes and the classes' names. Raises UserError."""
    try:
        schema = _parquet(file).schema_arrow if file.suffix == ".parquet" else _arrow(file).schema
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
        raise UserError(f"{file}: no table of a Hugging Face dataset ({error})") from None
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    label = labels[0] if len(labels) == 1 else next((name for name in LABEL_COLUMNS if name in labels), None)
    if len(images) != 1 or label is None:
        raise UserError(f"{file}: needs one column of images and one of classes, and has {kinds}")
    return images[0], label, [str(name) for name in features[label]["names"]]


def _rows(files: list[Path], split: str, image: str, label: str) -> Rows:
    labels: list[np.ndarray] = []
    names: list[str] = []
    counts = [0]
    for file in files:
        parquet = file.suffix == ".parquet"
        table = _parquet(file).read(columns=[label, f"{image}.path"]) if parquet else _arrow(file)
        labels.append(table.column(label).to_numpy())
        paths = pc.struct_field(table.column(image), "path").to_pylist()
        names += [path or f"{split}/{len(names) + i}" for i, path in enumerate(paths)]
        counts.append(len(paths))
    cells = Tables(tuple(files), np.cumsum(counts), image)
    return Rows(np.concatenate(labels).astype(np.int64), names, cells=cells)


def _check_labels(rows: Rows, class_names: list[str], root: Path, split: str) -> None:
    if rows.labels.min() < 0 or rows.labels.max() >= len(class_names):
        label_range = f"{rows.labels.min()} to {rows.labels.max()}"
        raise UserError(f"{root}: {split} has labels from {label_range}, and {len(class_names)} classes")


@lru_cache(maxsize=4)
def _arrow(file: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


@lru_cache(maxsize=4)
def _parquet(file: Path) -> pq.ParquetFile:
    return pq.ParquetFile(file)


@lru_cache(maxsize=1)
def _row_group(file: Path, group: int, column: str) -> pa.ChunkedArray:
    return _parquet(file).read_row_group(group, columns=[column]).column(column)
