"""A dataset decoded once: a folder of Arrow files that all trials on a machine map into memory.

    train-index.arrow      a row per image: its label, and its name in the source
    train-00000.arrow      the first images' pixels, (H, W, 3) uint8 as fixed-size binary; then -00001 and so on
    test-...               the same of the other splits
    store.json             what it is, and each file's size and checksum; written last, so that it tells a whole store

Every Arrow file carries the description in its schema's metadata, too, so that none of them is ever nameless.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from lorvp.config import Part
from lorvp.errors import UserError
from lorvp.files import replacing

FORMAT_VERSION = 1
MANIFEST = "store.json"
METADATA_KEY = b"lorvp"


class File(Part):
    """One Arrow file of a store."""

    name: str
    rows: int
    bytes: int
    checksum: str


class SplitFiles(Part):
    index: File
    parts: list[File]


class Description(Part):
    """What a store holds, without the list of its files."""

    dataset: str
    image_size: int
    transform: str
    """How the pixels came about; empty where they are the source's own."""
    class_names: tuple[str, ...]
    source: str
    """A digest of the names and sizes of the source's files."""


class Manifest(Part):
    format_version: int
    description: Description
    splits: dict[str, SplitFiles]


def write_index(path: Path, labels: np.ndarray, names: list[str], description: Description) -> File:
    """Writes a split's labels (N,) and names."""
    columns = {"label": pa.array(labels.astype(np.int32)), "name": pa.array(names, pa.string())}
    return _write(path, columns, description)


def write_part(path: Path, pixels: np.ndarray, description: Description) -> File:
    """Writes pixels (N, H, W, 3) uint8."""
    buffer = pa.py_buffer(np.ascontiguousarray(pixels))
    kind = pa.binary(pixels[0].nbytes)
    return _write(path, {"image": pa.FixedSizeBinaryArray.from_buffers(kind, len(pixels), [None, buffer])}, description)


def _write(path: Path, columns: dict[str, pa.Array], description: Description) -> File:
    metadata = {METADATA_KEY: json.dumps({"format_version": FORMAT_VERSION} | description.model_dump())}
    batch = pa.RecordBatch.from_pydict(columns).replace_schema_metadata(metadata)
    with replacing(path) as temporary, pa.OSFile(str(temporary), "wb") as file:  # noqa: SIM117
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
    return described(path, batch.num_rows)


def described(path: Path, rows: int) -> File:
    """A file as the manifest names it. Reads all of it."""
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return File(name=path.name, rows=rows, bytes=path.stat().st_size, checksum=checksum)


def read_batch(path: Path) -> pa.RecordBatch:
    """The one record batch of an Arrow file, mapped into memory. Raises UserError for a damaged file."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); prepare the store anew") from None


@dataclass(frozen=True)
class Split:
    """One split of a store. Nothing is read before it is asked for."""

    folder: Path
    files: SplitFiles
    image_size: int
    _parts: dict[int, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.files.index.rows

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        return self._index.column("label").to_numpy().astype(np.int64)

    @property
    def names(self) -> list[str]:
        return self._index.column("name").to_pylist()

    @property
    def _index(self) -> pa.RecordBatch:
        return read_batch(self.folder / self.files.index.name)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(part.rows for part in self.files.parts)])

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The images at `rows` as (len(rows), H, W, 3) uint8; the batch is the only copy."""
        batch = np.empty((len(rows), self.image_size, self.image_size, 3), dtype=np.uint8)
        in_part = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(in_part):
            places = np.flatnonzero(in_part == part)
            pixels, start = self._pixels(int(part)), self._starts[part]
            for place in places:
                batch[place] = pixels[rows[place] - start]
        return batch

    def _pixels(self, part: int) -> np.ndarray:
        """(rows, H, W, 3) of one file, as it lies on the disk."""
        if part not in self._parts:
            column = read_batch(self.folder / self.files.parts[part].name).column("image")
            shape = (len(column), self.image_size, self.image_size, 3)
            self._parts[part] = np.frombuffer(column.buffers()[1], dtype=np.uint8).reshape(shape)
        return self._parts[part]


@dataclass(frozen=True)
class Store:
    """An open store. Opening it takes as long for a million images as for ten."""

    folder: Path
    description: Description
    splits: dict[str, Split]

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Raises UserError for a folder that is no whole store, with what to do about it."""
        manifest = read_manifest(folder)
        for files in manifest.splits.values():
            for file in (files.index, *files.parts):
                check_size(folder, file)
        description = manifest.description
        splits = {name: Split(folder, files, description.image_size) for name, files in manifest.splits.items()}
        return cls(folder, description, splits)


def how_to_make(folder: Path) -> str:
    """The command that makes the store of that name."""
    name, _, size = folder.name.rpartition("-")
    return f"python -m lorvp.data prepare {name} --size {size} --source SOURCE --out {folder.parent}"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the store in `folder`."""
    try:
        values = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no prepared dataset: {how_to_make(folder)}") from None
    except ValueError:
        raise UserError(f"{folder / MANIFEST}: damaged (no JSON); prepare the store anew") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{folder}: store format {version}; this version of lorvp reads up to {FORMAT_VERSION}: update it"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{folder / MANIFEST}: damaged ({where}); prepare the store anew") from None


def check_size(folder: Path, file: File) -> None:
    """Raises UserError when a file of the store is missing, or cut off."""
    path = folder / file.name
    size = path.stat().st_size if path.exists() else None
    if size != file.bytes:
        found = "is missing" if size is None else f"has {size:,} bytes and should have {file.bytes:,}"
        raise UserError(f"{path} {found}; prepare the store anew")


def verify(folder: Path, progress: Any = None) -> None:
    """Compares every byte with the checksums. Raises UserError naming the first file that differs."""
    for files in read_manifest(folder).splits.values():
        for file in (files.index, *files.parts):
            check_size(folder, file)
            if described(folder / file.name, file.rows).checksum != file.checksum:
                raise UserError(f"{folder / file.name}: not what was written (checksum); prepare the store anew")
            if progress:
                progress(file)
