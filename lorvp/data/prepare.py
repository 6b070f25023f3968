"""Make stores: decode a dataset once for all trials that will read it.

A store is made in files of 32 MiB, each renamed into place when it is complete. A second call makes the missing ones.
`store.json` comes last.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import progress
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text
from zlib_ng import zlib_ng

from lorvp.data import decode, store
from lorvp.data.sources import read_source
from lorvp.data.sources.base import Rows, Source
from lorvp.data.sources.huggingface import Tables
from lorvp.data.store import MANIFEST, Description, File, Manifest, SplitFiles, StoredImage
from lorvp.errors import UserError
from lorvp.utils import cli
from lorvp.utils.files import write_json

PART_BYTES = 32 << 20
ROW_BYTES = 256
"""Largest number of bytes of a row's label and name in the index."""
SAMPLE = 16
"""Number of images of a split that are compared with an existing store."""
PLAN = "plan.json"
DEFAULT_SIZE = 224

console = cli.make_console()


@dataclass(frozen=True)
class Task:
    """Describe one file of images to make."""

    path: Path
    rows: Rows
    description: Description
    resize: bool

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class PartResult:
    """Hold the result of a task: the file, which rows are in it, and the errors of the others."""

    file: File | None
    """None if unreadable images may not be left out."""
    kept: list[bool]
    problems: list[str]


def make_part(task: Task, skip_unreadable: bool) -> PartResult:
    """Make one file in a process of its own. Write nothing if an image is unreadable and may not be skipped."""
    kept: list[bool] = []
    problems: list[str] = []

    def readable() -> Iterator[StoredImage]:
        for row in range(len(task)):
            try:
                image = make_image(task, row)
            except UserError as error:
                kept.append(False)
                problems.append(str(error))
            else:
                kept.append(True)
                yield image
        if problems and not (skip_unreadable and any(kept)):
            raise Unreadable
        if problems:  # the index is written later, perhaps after a restart; this file is there before the part is
            write_json(task.path.with_suffix(".skipped.json"), {"kept": kept, "problems": problems})

    try:
        return PartResult(store.write_part(task.path, readable(), task.description), kept, problems)
    except Unreadable:
        return PartResult(None, kept, problems)


class Unreadable(Exception):
    """Report that a part has unreadable images that may not be left out."""


def make_image(task: Task, row: int) -> StoredImage:
    """Decode one image to what is stored of it. Raises UserError if it can't be read."""
    size, rows = task.description.image_size, task.rows
    if rows.pixels is not None:
        pixels = np.ascontiguousarray(rows.pixels[row])
        resized = decode.resized(pixels, size) if task.resize and size else pixels
        return StoredImage(resized, zlib_ng.crc32(pixels))
    name = repr(str(Path(rows.root or "", rows.names[row])))
    try:
        file = rows.file(row)
    except OSError as error:
        raise UserError(f"{name}: not a readable image ({error.strerror})") from None
    # an image that is stored encoded must be readable, too
    pixels = decode.decode(file, size or DEFAULT_SIZE, task.resize or size is None, name)
    return StoredImage(file if size is None else pixels, zlib_ng.crc32(file))


def load_finished_part(task: Task) -> PartResult | None:
    """Return what an earlier call made for the task; None if there is no complete file."""
    if not task.path.exists():
        return None
    skipped = task.path.with_suffix(".skipped.json")
    values: dict[str, Any] = {"kept": [True] * len(task), "problems": []}
    if skipped.exists():
        values = json.loads(skipped.read_text())
    try:
        file = store.open_file(task.path)
        rows = sum(file.get_batch(i).num_rows for i in range(file.num_record_batches))
    except UserError:
        return None
    if rows != sum(values["kept"]):
        return None
    return PartResult(store.describe_file(task.path, rows), values["kept"], values["problems"])


def prepare(
    dataset: str,
    source_folder: Path,
    out: Path,
    size: int | None = None,
    processes: int | None = None,
    skip_unreadable: bool = False,
    partial: bool = False,
    encoded: bool = False,
    name: str = "",
    nested: bool = False,
    column: str = "",
) -> Path:
    """Make the store of `dataset`, or continue making it, and return its folder, `name`-`size` in `out`.

    `size` is the side of the images in pixels; the default is their own if all have the same, else 224. `encoded` keeps
    image files as they are. `column` is one of the source's tables, stored for `dataset.groups`. Raises UserError for a
    source that isn't the dataset, unreadable images, a full disk, and a folder that can't be written or holds another
    store.
    """
    source = read_source(dataset, source_folder, partial, nested)
    for remark in source.remarks(source_folder):
        console.print(remark, style="yellow", markup=False)
    if encoded and any(rows.pixels is not None for rows in source.splits.values()):
        raise UserError(f"--encoded: {dataset} comes as pixels, not as image files")
    columns = {split: _column(rows, column) for split, rows in source.splits.items()} if column else {}
    size = None if encoded else size or source.native_size or DEFAULT_SIZE
    folder = out / f"{name or dataset}-{size or store.ENCODED}"
    resize = size != source.native_size
    description = Description(
        dataset=name or dataset,
        image_size=size,
        transform=decode.transform(size) if resize and size and not encoded else "",
        class_names=tuple(source.class_names),
        source=digest(source),
    )
    if (folder / MANIFEST).exists():
        existing = store.Store.open(folder)
        check_same(existing, description, source, skip_unreadable)
        if column:
            for stored in existing.splits.values():
                stored.column(column)  # or say how to get it
        return folder
    check_room(folder, source, size or DEFAULT_SIZE, encoded)
    begin(folder, description)
    skipped: list[str] = []
    splits: dict[str, SplitFiles] = {}
    with progress_bar(sum(map(len, source.splits.values()))) as bar:
        for split, rows in source.splits.items():
            tasks = plan(folder, split, rows, description, resize)
            done = make_parts(tasks, processes or len(os.sched_getaffinity(0)), skip_unreadable, bar)
            skipped += problems(done, skip_unreadable)
            kept = np.concatenate([part.kept for part in done])
            names = [name for name, keep in zip(rows.names, kept, strict=True) if keep]
            values = {column: [v for v, keep in zip(columns[split], kept, strict=True) if keep]} if column else {}
            with translate_write_errors(folder):
                path = folder / f"{split}-index.arrow"
                index = store.write_index(path, rows.labels[kept], names, description, values)
            splits[split] = SplitFiles(index=index, parts=[part.file for part in done if part.file])
    for split, files in splits.items():
        classes = len(np.unique(store.Split(folder, files, size).labels))
        if classes < len(np.unique(source.splits[split].labels)):
            raise UserError(f"{folder}: a class has no readable image in {split}: {'; '.join(skipped[:3])}")
        store.verify_file(folder, files.index)  # the images have been, as they were made
    manifest = Manifest(format_version=store.FORMAT_VERSION, description=description, splits=splits)
    with translate_write_errors(folder):
        write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    for leftover in [folder / PLAN, *folder.glob("*.skipped.json"), *folder.glob(".*.tmp")]:
        leftover.unlink()
    if skipped:
        console.print(
            f"left out {len(skipped)} unreadable images: {'; '.join(skipped[:5])}", style="yellow", markup=False
        )
    return folder


def _column(rows: Rows, name: str) -> list[str]:
    """Return a column of the source as text. Raises UserError if the source has none of that name."""
    if not isinstance(rows.cells, Tables):
        raise UserError("--column is about tables of huggingface; dataset.groups reads the paths of image files")
    if name in ("label", "name"):
        raise UserError(f"--column: a store's own columns are label and name; call {name} something else")
    return rows.cells.column(name)


@contextmanager
def translate_write_errors(folder: Path) -> Iterator[None]:
    """Translate the system's errors of a full or missing disk to UserError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{folder}: can't be written ({reason}); what is done is kept for the next call") from None


def plan(folder: Path, split: str, rows: Rows, description: Description, resize: bool) -> list[Task]:
    """Divide one split, in the order of its images, into tasks of about PART_BYTES each."""
    size = description.image_size
    sizes = rows.sizes if size is None else np.full(len(rows), 3 * size**2)
    ends = np.flatnonzero(np.diff(np.cumsum(sizes) // PART_BYTES, append=-1)) + 1
    starts = [0, *ends[:-1].tolist()]
    return [
        Task(folder / f"{split}-{number:05}.arrow", rows.part(start, end), description, resize)
        for number, (start, end) in enumerate(zip(starts, ends.tolist(), strict=True))
    ]


def make_parts(tasks: list[Task], workers: int, skip_unreadable: bool, bar: Progress) -> list[PartResult]:
    """Make the files that are missing, `workers` at a time. Raises UserError if they can't be written."""
    done = {number: before for number, task in enumerate(tasks) if (before := load_finished_part(task))}
    bar.advance(bar.task_ids[0], sum(len(before.kept) for before in done.values()))
    todo = [number for number in range(len(tasks)) if number not in done]
    with (
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool,
        ThreadPoolExecutor(1) as reader,
    ):
        running: dict[Future[PartResult], int] = {}
        verified: list[Future[None]] = []
        while todo or running:
            while todo and len(running) < 2 * workers:  # few at a time, because a task may hold pixels
                number = todo.pop(0)
                running[pool.submit(make_part, tasks[number], skip_unreadable)] = number
            finished = next(as_completed(running))
            number = running.pop(finished)
            with translate_write_errors(tasks[number].path.parent):
                done[number] = finished.result()
            file = done[number].file
            if file:  # the file is verified while others are decoded, which leaves the disk idle
                verified.append(reader.submit(store.verify_file, tasks[number].path.parent, file))
            bar.advance(bar.task_ids[0], len(tasks[number]))
        for verification in verified:
            verification.result()
    return [done[number] for number in range(len(tasks))]


def problems(done: list[PartResult], skip_unreadable: bool) -> list[str]:
    """Collect the errors of unreadable images, one line each. Raises UserError if those may not be left out."""
    lines = [line for part in done for line in part.problems]
    if any(part.file is None for part in done):
        listing = "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")
        hint = "no image near them can" if skip_unreadable else "--skip-unreadable leaves them out"
        raise UserError(f"{len(lines)} unreadable images: {listing}. {hint}")
    return lines


def begin(folder: Path, description: Description) -> None:
    """Make the folder, or check that it holds a part of the same store. Raises UserError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begun = folder / PLAN
        if begun.exists():
            if json.loads(begun.read_text()) != description.model_dump(mode="json"):
                raise UserError(f"{folder}: was begun from other files, or by another version; remove it first")
        else:
            write_json(begun, description.model_dump(mode="json"))
    except OSError as error:
        raise UserError(f"--out {folder.parent}: can't be written ({error.strerror})") from None


def check_same(existing: store.Store, requested: Description, source: Source, skip_unreadable: bool) -> None:
    """Raise UserError if the existing store is not the requested one.

    Up to SAMPLE images of each split are compared by their bytes, the others by name, label and size.
    """
    description = existing.description
    counts = {split: len(rows) for split, rows in existing.splits.items()}
    wanted = {split: len(rows) for split, rows in source.splits.items()}
    if counts.keys() != wanted.keys() or any(counts[split] > wanted[split] for split in wanted):
        other = f"has {amounts(counts)}, and the source {amounts(wanted)}"
    elif description.class_names != requested.class_names:
        odd = sorted({*description.class_names} ^ {*requested.class_names}) or ["in another order"]
        other = f"has other classes than the source: {', '.join(odd[:3])}"
    elif description.source != requested.source:
        other = "was made of other files than lie in the source: their names, classes or sizes differ"
    elif bool(description.transform) != bool(requested.transform):
        other = f"has images {description.transform or 'as they were'}, not {requested.transform or 'as they are'}"
    elif counts != wanted and not skip_unreadable:
        left_out = sum(wanted.values()) - sum(counts.values())
        other = f"leaves out {left_out:,} images that could not be read, which --skip-unreadable would accept"
    elif changed := next(changed_images(existing, source), None):
        other = f"was made when {changed} was another image"
    else:
        return
    raise UserError(f"{existing.folder}: {other}; --name NAME makes another store, or remove this one first")


def changed_images(existing: store.Store, source: Source) -> Iterator[str]:
    """Yield the names of sampled images whose source has changed since the store was made."""
    for split, rows in source.splits.items():
        stored = existing.splits[split]
        if len(stored) < len(rows):  # unreadable images were left out, so rows have moved
            continue
        for row in np.unique(np.linspace(0, len(rows) - 1, SAMPLE, dtype=np.int64)).tolist():
            try:
                content = rows.file(row) if rows.pixels is None else np.ascontiguousarray(rows.pixels[row])
            except OSError:  # it could be read before
                yield rows.names[row]
            else:
                if zlib_ng.crc32(content) != stored.checksum(row):
                    yield rows.names[row]


def amounts(counts: dict[str, int]) -> str:
    """Format the number of images of each split."""
    return " and ".join(f"{count:,} {split}" for split, count in counts.items())


def digest(source: Source) -> str:
    """Compute a digest of the names, labels and sizes of the source's images, and of pixels in memory."""
    seen = hashlib.blake2b(digest_size=16)
    for split, rows in source.splits.items():
        seen.update(f"{split}\0".encode())
        seen.update(rows.labels.tobytes())
        seen.update(rows.sizes.tobytes())
        for name in rows.names:
            seen.update(f"{name}\0".encode(errors="surrogateescape"))
        if rows.pixels is not None:
            seen.update(np.ascontiguousarray(rows.pixels).data)
    return seen.hexdigest()


def check_room(folder: Path, source: Source, size: int, encoded: bool) -> None:
    """Print the store's size, as pixels and encoded. Raises UserError, before anything is written, if it won't fit."""
    splits = source.splits.values()
    rows = sum(map(len, splits))
    takes = {"pixels": rows * (3 * size**2 + ROW_BYTES)}
    if all(split.pixels is None for split in splits):
        takes["--encoded"] = sum(int(split.sizes.sum()) for split in splits) + rows * ROW_BYTES
    there = sum(path.stat().st_size for path in folder.glob("*.arrow")) if folder.is_dir() else 0
    needed = takes["--encoded" if encoded else "pixels"] - there
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    choices = ", ".join(f"{gib(size)} as {kind}" for kind, size in takes.items())
    console.print(f"{folder}: {rows:,} images, {choices}; {gib(there)} done, {gib(free)} free", highlight=False)
    if needed > free:
        raise UserError(f"{existing}: has {gib(free)} free, and the store takes {gib(needed)} more")


def gib(count: int) -> str:
    """Format a number of bytes in GiB."""
    return f"{count / 2**30:.2f} GiB"


def progress_bar(total: int) -> Progress:
    """Make a progress bar with one task of `total` images."""
    left = (TimeRemainingColumn(), TextColumn("left"))
    bar = Progress(BarColumn(), MofNCompleteColumn(), SpeedColumn(), *left, console=console)
    bar.add_task("images", total=total)
    return bar


class SpeedColumn(ProgressColumn):
    """Show the speed in images per second."""

    def render(self, task: progress.Task) -> Text:
        """Format the speed; nothing before it is known."""
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "")
