"""Read and write stores: datasets decoded once into a folder of Arrow files, which all trials map into memory.

    train-index.arrow      a row for each image: its label, its name in the source, and a column for groups, if
                           one was asked for
    train-00000.arrow      the first images' pixels, (H, W, 3) uint8 as fixed-size binary; then -00001 and so on. Record
                           batches have 4 MiB and, but for the last, one length. Each row has the CRC-32 of the image in
                           the source, a file or pixels
    test-...               the same for the other splits
    store.json             the description, and each file's size and checksum; written last, so that its presence means
                           that the store is complete

An encoded store holds the image files as they came, as binary, in place of pixels. Every Arrow file also carries the
description in its schema's metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import ValidationError
from zlib_ng import zlib_ng

from lorvp.data.sources import SOURCES
from lorvp.errors import UserError
from lorvp.parts import Part
from lorvp.utils.files import replacing

FORMAT_VERSION = 1
MANIFEST = "store.json"
METADATA_KEY = b"lorvp"
BATCH_BYTES = 4 << 20
ENCODED_BATCH = 32
"""Number of images in a record batch of an encoded store; in other stores BATCH_BYTES limits it."""
ENCODED = "encoded"
"""Part of the name of an encoded store's folder, in place of a size."""


class File(Part):
    """Describe one Arrow file of a store."""

    name: str
    rows: int
    bytes: int
    checksum: int
    """CRC-32, which detects damage by a disk or a copy."""


class SplitFiles(Part):
    """List the files of one split."""

    index: File
    parts: list[File]


class Description(Part):
    """Describe what a store holds, without the list of its files."""

    dataset: str
    image_size: int | None
    """Side in pixels; None for an encoded store, whose images are decoded to the size that a trial asks for."""
    transform: str
    """How the pixels were resized; empty if they are the source's own."""
    class_names: tuple[str, ...]
    source: str
    """Digest of the names, labels and sizes of the source's images."""

    @property
    def native(self) -> bool:
        """Whether the images have the source's own size, and are small enough to be resized on the device."""
        return self.image_size is not None and not self.transform


class Manifest(Part):
    """Hold the contents of store.json."""

    format_version: int
    description: Description
    splits: dict[str, SplitFiles]


class StoredImage(NamedTuple):
    """Hold (H, W, 3) uint8 pixels or an image file, and the CRC-32 of its source."""

    content: np.ndarray | bytes
    source: int


class Writer:
    """Write one Arrow file, batch by batch; it gets its final name when it is complete."""

    def __init__(self, path: Path, column_types: dict[str, pa.DataType], description: Description) -> None:
        metadata = {METADATA_KEY: json.dumps({"format_version": FORMAT_VERSION} | description.model_dump())}
        self._path = path
        self._schema = pa.schema(column_types, metadata)
        self._rows = 0
        self._checksum = 0
        self._size = 0

    @contextmanager
    def open(self) -> Iterator[Writer]:
        """Open a temporary file, which takes the final name when the block ends without an error."""
        with (
            replacing(self._path) as temporary,
            open(temporary, "wb") as self._file,
            pa.ipc.new_file(pa.PythonFile(self, "w"), self._schema) as self._arrow,
        ):
            yield self

    def add(self, *columns: pa.Array) -> None:
        """Write a record batch."""
        self._rows += len(columns[0])
        self._arrow.write_batch(pa.RecordBatch.from_arrays(list(columns), schema=self._schema))
        drop_page_cache(self._file)

    def entry(self) -> File:
        """Return the complete file's entry for the manifest."""
        return File(name=self._path.name, rows=self._rows, bytes=self._size, checksum=self._checksum)

    # pyarrow's interface of a file: every byte is counted and added to the checksum on its way to the disk

    closed = False

    def write(self, data: bytes) -> int:
        """Write bytes, count them and add them to the checksum."""
        self._checksum = zlib_ng.crc32(data, self._checksum)
        self._size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def close(self) -> None:
        """Do nothing: `open` closes the file."""


def write_index(
    path: Path,
    labels: np.ndarray,
    names: list[str],
    description: Description,
    columns: dict[str, list[str]] | None = None,
) -> File:
    """Write a split's labels (N,), names and further columns of text; return the file's entry for the manifest."""
    texts = {"name": names} | (columns or {})
    with Writer(path, {"label": pa.int32()} | dict.fromkeys(texts, pa.string()), description).open() as writer:
        writer.add(pa.array(labels.astype(np.int32)), *(pa.array(values, pa.string()) for values in texts.values()))
    return writer.entry()


def write_part(path: Path, images: Iterable[StoredImage], description: Description) -> File:
    """Write images as they come, with at most one record batch in memory; return the file's entry."""
    if description.image_size is None:
        kind, batch_length = pa.binary(), ENCODED_BATCH

        def make_column(contents: list[Any]) -> pa.Array:
            return pa.array(contents, pa.binary())

    else:
        size = 3 * description.image_size**2
        kind, batch_length = pa.binary(size), max(1, BATCH_BYTES // size)
        buffer = np.empty((batch_length, size), dtype=np.uint8)

        def make_column(contents: list[Any]) -> pa.Array:
            for place, pixels in enumerate(contents):
                buffer[place] = pixels.reshape(-1)
            return pa.FixedSizeBinaryArray.from_buffers(
                kind, len(contents), [None, pa.py_buffer(buffer[: len(contents)])]
            )

    with Writer(path, {"image": kind, "source": pa.uint32()}, description).open() as writer:
        for batch in batched(images, batch_length):
            sources = pa.array([image.source for image in batch], pa.uint32())
            writer.add(make_column([image.content for image in batch]), sources)
    return writer.entry()


def batched(items: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """Yield lists of `count` items, the last one shorter, as itertools.batched does from Python 3.12 on."""
    remaining = iter(items)
    while batch := list(islice(remaining, count)):
        yield batch


def drop_page_cache(file: IO[bytes]) -> None:
    """Drop a file from the system's page cache.

    A new store is read once more to verify it, and may be larger than memory. Dropping its pages leaves the cache to
    other data.
    """
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def describe_file(path: Path, rows: int) -> File:
    """Read a complete file and return its entry for the manifest."""
    checksum = 0
    with open(path, "rb") as file:
        while data := file.read(BATCH_BYTES):
            checksum = zlib_ng.crc32(data, checksum)
        drop_page_cache(file)
    return File(name=path.name, rows=rows, bytes=path.stat().st_size, checksum=checksum)


def open_file(path: Path) -> pa.ipc.RecordBatchFileReader:
    """Map an Arrow file of a store into memory. Raises UserError for a damaged file."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); prepare the store anew") from None


@dataclass(frozen=True)
class Split:
    """Hold one split of a store. Nothing is read before it is needed."""

    folder: Path
    files: SplitFiles
    image_size: int | None
    _parts: dict[int, list[pa.Array]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.files.index.rows

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels, (N,) int64."""
        labels: np.ndarray = self._index.column("label").to_numpy().astype(np.int64)
        return labels

    @property
    def names(self) -> list[str]:
        """Names of the images in the source."""
        names: list[str] = self._index.column("name").to_pylist()
        return names

    def column(self, name: str) -> list[str]:
        """Return a column that was stored for groups. Raises UserError if there is none of that name."""
        if name not in self._index.schema.names:
            raise UserError(
                f"{self.folder}: has no column {name}: remove it, and prepare it anew with --column {name}, or prepare "
                "another with --name"
            )
        values: list[str] = self._index.column(name).to_pylist()
        return values

    @property
    def _index(self) -> pa.RecordBatch:
        return open_file(self.folder / self.files.index.name).get_batch(0)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(part.rows for part in self.files.parts)])

    def read(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Read the images at `rows` as (len(rows), H, W, 3) uint8, into `out` if it is given; they are copied once."""
        size = self.image_size
        assert size is not None  # encoded images are read by `encoded`
        images = np.empty((len(rows), size, size, 3), dtype=np.uint8) if out is None else out
        in_part = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(in_part):
            places = np.flatnonzero(in_part == part)
            batches = [np.frombuffer(b.buffers()[1], np.uint8).reshape(len(b), size, size, 3) for b in self._part(part)]
            numbers, offsets = np.divmod(rows[places] - self._starts[part], len(batches[0]))
            for place, number, offset in zip(places.tolist(), numbers.tolist(), offsets.tolist(), strict=True):
                images[place] = batches[number][offset]
        return images

    def encoded(self, row: int) -> bytes:
        """Return the image file at `row` of an encoded store."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        batches = self._part(part)
        number, offset = divmod(row - int(self._starts[part]), len(batches[0]))
        file: bytes = batches[number][offset].as_py()
        return file

    def checksum(self, row: int) -> int:
        """Return the CRC-32 of the image at `row` in the source."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        file = open_file(self.folder / self.files.parts[part].name)
        number, offset = divmod(row - int(self._starts[part]), file.get_batch(0).num_rows)
        return int(file.get_batch(number).column("source")[offset].as_py())

    def _part(self, part: int) -> list[pa.Array]:
        """Return the memory-mapped images of one file, in record batches of one length."""
        if part not in self._parts:
            file = open_file(self.folder / self.files.parts[part].name)
            self._parts[part] = [file.get_batch(i).column("image") for i in range(file.num_record_batches)]
        return self._parts[part]


@dataclass(frozen=True)
class Store:
    """Hold an open store. Opening it takes as long for a million images as for ten."""

    folder: Path
    description: Description
    splits: dict[str, Split]

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Open the store in `folder`. Raises UserError, which says what to do, if it is no complete store."""
        manifest = read_manifest(folder)
        for files in manifest.splits.values():
            for file in (files.index, *files.parts):
                check_size(folder, file)
        description = manifest.description
        splits = {name: Split(folder, files, description.image_size) for name, files in manifest.splits.items()}
        return cls(folder, description, splits)


def how_to_make(folder: Path) -> str:
    """Return the command that makes the store of that name."""
    name, _, size = folder.name.rpartition("-")
    dataset = name if name in SOURCES else f"image_folder --name {name}"
    option = "--encoded" if size == ENCODED else f"--size {size}"
    return f"python -m lorvp.data prepare {dataset} {option} --source SOURCE --out {folder.parent}"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the store in `folder`. Raises UserError if it is missing, damaged or of a later version."""
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
    """Raise UserError if a file of the store is missing or has the wrong size."""
    path = folder / file.name
    size = path.stat().st_size if path.exists() else None
    if size != file.bytes:
        problem = "is missing" if size is None else f"has {size:,} bytes and should have {file.bytes:,}"
        raise UserError(f"{path} {problem}; prepare the store anew")


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every byte with the checksums. Raises UserError naming the first file that differs."""
    files = [file for split in manifest.splits.values() for file in (split.index, *split.parts)]
    for file in files:
        check_size(folder, file)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as readers:  # reading and checksums both release the GIL
        list(readers.map(lambda file: verify_file(folder, file), files))


def verify_file(folder: Path, file: File) -> None:
    """Compare every byte of one file with its checksum. Raises UserError if they differ."""
    check_size(folder, file)
    if describe_file(folder / file.name, file.rows).checksum != file.checksum:
        raise UserError(f"{folder / file.name}: not what was written (checksum); prepare the store anew")
