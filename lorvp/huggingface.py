"""Hugging Face image datasets on disk: what `save_to_disk` wrote, or the Parquet files of a dataset's repository.

Both are Arrow tables whose schema says which column holds the encoded image and which the class (the conventions of
huggingface/datasets: features of the types Image and ClassLabel), so that pyarrow reads them as they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lorvp.errors import UserError
from lorvp.rows import Rows, Source

TEST_SPLITS = ("test", "validation", "valid", "val")
"""What the test images may be called; the first of them whose images have labels is taken."""
LABEL_COLUMNS = ("label", "labels", "fine_label")
"""Which is the class where there are several columns of classes."""


@dataclass(frozen=True)
class Tables:
    """The encoded images of one split, in the column `image` of tables on disk."""

    files: tuple[Path, ...]
    starts: np.ndarray
    """The first row of each file, and the number of all rows."""
    image: str

    def __getitem__(self, row: int) -> bytes:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        file, row = self.files[number], int(row - self.starts[number])
        if file.suffix == ".parquet":
            group = 0
            while row >= (rows := _parquet(file).metadata.row_group(group).num_rows):
                group, row = group + 1, row - rows
            cell = _row_group(file, group, self.image)[row]
        else:
            cell = _arrow(file).column(self.image)[row]
        encoded = cell["bytes"].as_py()
        if encoded is None:
            raise UserError(f"{file}: its images are not in it, but files elsewhere: save them with the table")
        return encoded

    def sizes(self) -> np.ndarray:
        """Bytes of each image, (N,) int64; in Parquet files the mean of each row group."""
        found = []
        for file in self.files:
            if file.suffix == ".parquet":
                for group in range(_parquet(file).num_row_groups):
                    each = _parquet(file).metadata.row_group(group)
                    columns = [each.column(i) for i in range(each.num_columns)]
                    whole = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == f"{self.image}.bytes")
                    found.append(np.full(each.num_rows, whole // max(1, each.num_rows)))
            else:
                lengths = pc.binary_length(pc.struct_field(_arrow(file).column(self.image), "bytes"))
                found.append(lengths.fill_null(0).to_numpy())
        return np.concatenate(found).astype(np.int64)


def saved(root: Path) -> Source:
    """A dataset on disk. Raises UserError where its tables don't say what is an image and what its class."""
    files = _split_files(root)
    if "train" not in files:
        raise UserError(f"{root}: no train split of a Hugging Face dataset, of save_to_disk or in Parquet files")
    image, label, class_names = _columns(files["train"][0])
    splits = {"train": _rows(files["train"], "train", image, label)}
    _check_labels(splits["train"], class_names, root, "train")
    for name in TEST_SPLITS:
        if name in files:
            rows = _rows(files[name], name, image, label)
            if len(rows) and rows.labels.min() >= 0:  # -1 is "not told"
                _check_labels(rows, class_names, root, name)
                splits["test"] = rows
                break
    return Source(class_names, splits)


def _split_files(root: Path) -> dict[str, list[Path]]:
    """The tables of each split, by its name."""
    if (root / "state.json").is_file():
        return {"train": sorted(root.glob("data-*.arrow"))}
    if (root / "dataset_dict.json").is_file():
        names = json.loads((root / "dataset_dict.json").read_text())["splits"]
        return {name: sorted((root / name).glob("data-*.arrow")) for name in names}
    found: dict[str, list[Path]] = {}
    for path in sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")]):
        found.setdefault(path.name.split("-")[0].removesuffix(".parquet"), []).append(path)
    return found


def _columns(file: Path) -> tuple[str, str, list[str]]:
    """The column of images, the column of classes and the classes' names."""
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
        found = f"{rows.labels.min()} to {rows.labels.max()}"
        raise UserError(f"{root}: {split} has labels from {found}, and {len(class_names)} classes")


@lru_cache(maxsize=4)
def _arrow(file: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


@lru_cache(maxsize=4)
def _parquet(file: Path) -> pq.ParquetFile:
    return pq.ParquetFile(file)


@lru_cache(maxsize=1)
def _row_group(file: Path, group: int, column: str) -> pa.ChunkedArray:
    return _parquet(file).read_row_group(group, columns=[column]).column(column)
