"""A dataset decoded once: a folder of Arrow files that all trials on a machine map into memory.

    train-index.arrow      a row per image: its label, and its name in the source
    train-00000.arrow      the first images' pixels, (H, W, 3) uint8 as fixed-size binary; then -00001 and so on; in
                           record batches of 4 MiB, all of one length but the last, with the CRC-32 of what each image
                           was in the source, a file or pixels
    test-...               the same of the other splits

(of an encoded store the images are files as they came, as binary, in place of pixels), and

    store.json             what it is, and each file's size and checksum; written last, so that it tells a whole store

Every Arrow file carries the description in its schema's metadata, too, so that none of them is ever nameless.
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

from lorvp.config import Part
from lorvp.data.sources import SOURCES
from lorvp.errors import UserError
from lorvp.utils.files import replacing

FORMAT_VERSION = 1
MANIFEST = "store.json"
METADATA_KEY = b"lorvp"
BATCH_BYTES = 4 << 20
ENCODED_BATCH = 32
"""Images of a record batch: in pixels as many as these bytes take, encoded so many."""
ENCODED = "encoded"
"""What stands in the name of an encoded store's folder in place of a size."""


class File(Part):
    """One Arrow file of a store."""

    name: str
    rows: int
    bytes: int
    checksum: int
    """CRC-32, which finds what a disk or a copy has spoiled."""


class SplitFiles(Part):
    index: File
    parts: list[File]


class Description(Part):
    """What a store holds, without the list of its files."""

    dataset: str
    image_size: int | None
    """Side in pixels; None of an encoded store, whose images are decoded to the size that a trial asks for."""
    transform: str
    """How the pixels came about; empty where they are the source's own."""
    class_names: tuple[str, ...]
    source: str
    """A digest of the names, labels and sizes of the source's images."""

    @property
    def native(self) -> bool:
        """Whether the images have the source's own size, and are small enough to be resized on the device."""
        return self.image_size is not None and not self.transform


class Manifest(Part):
    format_version: int
    description: Description
    splits: dict[str, SplitFiles]


class StoredImage(NamedTuple):
    """(H, W, 3) uint8 pixels or an image file, and the CRC-32 of its source."""

    content: np.ndarray | bytes
    source: int


class Writer:
    """Writes one Arrow file, batch by batch; it takes its name when it is `whole`."""

    def __init__(self, path: Path, column_types: dict[str, pa.DataType], description: Description) -> None:
        metadata = {METADATA_KEY: json.dumps({"format_version": FORMAT_VERSION} | description.model_dump())}
        self._path = path
        self._schema = pa.schema(column_types, metadata)
        self._rows = 0
        self._checksum = 0
        self._size = 0

    @contextmanager
    def open(self) -> Iterator[Writer]:
        with (
            replacing(self._path) as temporary,
            open(temporary, "wb") as self._file,
            pa.ipc.new_file(pa.PythonFile(self, "w"), self._schema) as self._arrow,
        ):
            yield self

    def add(self, *columns: pa.Array) -> None:
        """Writes a record batch."""
        self._rows += len(columns[0])
        self._arrow.write_batch(pa.RecordBatch.from_arrays(list(columns), schema=self._schema))
        uncache(self._file)

    def whole(self) -> File:
        """The file as the manifest names it."""
        return File(name=self._path.name, rows=self._rows, bytes=self._size, checksum=self._checksum)

    # what pyarrow asks of a file: every byte is counted and summed up on its way to the disk

    closed = False

    def write(self, data: bytes) -> int:
        self._checksum = zlib_ng.crc32(data, self._checksum)
        self._size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        pass


def write_index(path: Path, labels: np.ndarray, names: list[str], description: Description) -> File:
    """Writes a split's labels (N,) and names."""
    with Writer(path, {"label": pa.int32(), "name": pa.string()}, description).open() as writer:
        writer.add(pa.array(labels.astype(np.int32)), pa.array(names, pa.string()))
    return writer.whole()


def write_part(path: Path, images: Iterable[StoredImage], description: Description) -> File:
    """Writes images as they come; never more of them in memory than a record batch has."""
    if description.image_size is None:
        kind, each, make_column = pa.binary(), ENCODED_BATCH, lambda files: pa.array(files, pa.binary())
    else:
        size = 3 * description.image_size**2
        kind, each = pa.binary(size), max(1, BATCH_BYTES // size)
        room = np.empty((each, size), dtype=np.uint8)

        def make_column(images: list[np.ndarray]) -> pa.Array:
            for place, pixels in enumerate(images):
                room[place] = pixels.reshape(-1)
            return pa.FixedSizeBinaryArray.from_buffers(kind, len(images), [None, pa.py_buffer(room[: len(images)])])

    with Writer(path, {"image": kind, "source": pa.uint32()}, description).open() as writer:
        for batch in batched(images, each):
            sources = pa.array([image.source for image in batch], pa.uint32())
            writer.add(make_column([image.content for image in batch]), sources)
    return writer.whole()


def batched(items: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """As itertools has it from Python 3.12 on."""
    left = iter(items)
    while batch := list(islice(left, count)):
        yield batch


def uncache(file: IO[bytes]) -> None:
    """Gives the disk's cache of a file back. A store that is being made is read once more, to verify what the disk has,
    and may be larger than memory: its next file had better take the same pages than push other people's data out.
    """
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def described(path: Path, rows: int) -> File:
    """A file as the manifest names it. Reads all of it."""
    checksum = 0
    with open(path, "rb") as file:
        while data := file.read(BATCH_BYTES):
            checksum = zlib_ng.crc32(data, checksum)
        uncache(file)
    return File(name=path.name, rows=rows, bytes=path.stat().st_size, checksum=checksum)


def open_file(path: Path) -> pa.ipc.RecordBatchFileReader:
    """An Arrow file of a store, mapped into memory. Raises UserError for a damaged one."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); prepare the store anew") from None


@dataclass(frozen=True)
class Split:
    """One split of a store. Nothing is read before it is asked for."""

    folder: Path
    files: SplitFiles
    image_size: int | None
    _parts: dict[int, list[pa.Array]] = field(default_factory=dict)

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
        return open_file(self.folder / self.files.index.name).get_batch(0)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(part.rows for part in self.files.parts)])

    def read(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The images at `rows` as (len(rows), H, W, 3) uint8, in `out` if that is given: the only copy."""
        size = self.image_size
        assert size is not None  # encoded images are not read so
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
        """The image file at `row` of an encoded store."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        batches = self._part(part)
        number, offset = divmod(row - int(self._starts[part]), len(batches[0]))
        return batches[number][offset].as_py()

    def checksum(self, row: int) -> int:
        """The CRC-32 of what the image at `row` was in the source."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        file = open_file(self.folder / self.files.parts[part].name)
        number, offset = divmod(row - int(self._starts[part]), file.get_batch(0).num_rows)
        return file.get_batch(number).column("source")[offset].as_py()

    def _part(self, part: int) -> list[pa.Array]:
        """The images of one file, as they lie on the disk, in record batches of one length."""
        if part not in self._parts:
            file = open_file(self.folder / self.files.parts[part].name)
            self._parts[part] = [file.get_batch(i).column("image") for i in range(file.num_record_batches)]
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
    dataset = name if name in SOURCES else f"image_folder --name {name}"
    option = "--encoded" if size == ENCODED else f"--size {size}"
    return f"python -m lorvp.data prepare {dataset} {option} --source SOURCE --out {folder.parent}"


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


def verify(folder: Path, manifest: Manifest) -> None:
    """Compares every byte with the checksums. Raises UserError naming the first file that differs."""
    files = [file for split in manifest.splits.values() for file in (split.index, *split.parts)]
    for file in files:
        check_size(folder, file)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as readers:  # both reading and summing let the others run
        list(readers.map(lambda file: verify_file(folder, file), files))


def verify_file(folder: Path, file: File) -> None:
    """Compares every byte of one file with its checksum. Raises UserError."""
    check_size(folder, file)
    if described(folder / file.name, file.rows).checksum != file.checksum:
        raise UserError(f"{folder / file.name}: not what was written (checksum); prepare the store anew")
