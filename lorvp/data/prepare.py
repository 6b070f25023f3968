"""Makes stores: decodes a dataset once, for all trials that will read it.

What is done is kept: a store is made in files of 32 MiB, each renamed into place when it is whole, and a second call
goes on with the missing ones. `store.json` comes last.
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
from lorvp.data.store import MANIFEST, Description, File, Manifest, SplitFiles, StoredImage
from lorvp.errors import UserError
from lorvp.utils import cli
from lorvp.utils.files import write_json

PART_BYTES = 32 << 20
ROW_BYTES = 256
"""What a row's label and name take, at most, of the index and of the plan."""
SAMPLE = 16
"""Of so many images of a split it is asked whether a store was made of them."""
PLAN = "plan.json"
DEFAULT_SIZE = 224

console = cli.make_console()


@dataclass(frozen=True)
class Task:
    """One file of images to be made."""

    path: Path
    rows: Rows
    description: Description
    resize: bool

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Done:
    file: File | None
    kept: list[bool]
    problems: list[str]


def make_part(task: Task, skip_unreadable: bool) -> Done:
    """Makes one file, in a process of its own. Writes nothing where an image can't be read and may not be skipped."""
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
        return Done(store.write_part(task.path, readable(), task.description), kept, problems)
    except Unreadable:
        return Done(None, kept, problems)


class Unreadable(Exception):
    """A part has images that can't be read, and may not be left out."""


def make_image(task: Task, row: int) -> StoredImage:
    """What is stored of one image. Raises UserError when it can't be read."""
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
    # one that is kept as it is must be readable, too
    pixels = decode.decode(file, size or DEFAULT_SIZE, task.resize or size is None, name)
    return StoredImage(file if size is None else pixels, zlib_ng.crc32(file))


def done_before(task: Task) -> Done | None:
    """What an earlier call made of the task."""
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
    return Done(store.described(task.path, rows), values["kept"], values["problems"])


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
) -> Path:
    """Makes the store of `dataset`, or goes on making it, and returns its folder, `name`-`size` in `out`.

    `size` is the side of the images in pixels: by default their own where all have the same, else 224. `encoded` keeps
    image files as they are. Raises UserError for a source that isn't the dataset, images that can't be read, a disk
    without room, a folder that can't be written or holds another store.
    """
    source = read_source(dataset, source_folder, partial, nested)
    for remark in source.remarks(source_folder):
        console.print(remark, style="yellow", markup=False)
    if encoded and any(rows.pixels is not None for rows in source.splits.values()):
        raise UserError(f"--encoded: {dataset} comes as pixels, not as image files")
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
        check_same(store.Store.open(folder), description, source, skip_unreadable)
        return folder
    check_room(folder, source, size or DEFAULT_SIZE, encoded)
    begin(folder, description)
    skipped: list[str] = []
    splits: dict[str, SplitFiles] = {}
    with progress_bar(sum(map(len, source.splits.values()))) as bar:
        for split, rows in source.splits.items():
            tasks = plan(folder, split, rows, description, resize)
            done = carry_out(tasks, processes or len(os.sched_getaffinity(0)), skip_unreadable, bar)
            skipped += problems(done, skip_unreadable)
            kept = np.concatenate([each.kept for each in done])
            names = [name for name, keep in zip(rows.names, kept, strict=True) if keep]
            with written(folder):
                index = store.write_index(folder / f"{split}-index.arrow", rows.labels[kept], names, description)
            splits[split] = SplitFiles(index=index, parts=[each.file for each in done])
    for split, files in splits.items():
        found = len(np.unique(store.Split(folder, files, size).labels))
        if found < len(np.unique(source.splits[split].labels)):
            raise UserError(f"{folder}: a class has no readable image in {split}: {'; '.join(skipped[:3])}")
        store.verify_file(folder, files.index)  # the images have been, as they were made
    manifest = Manifest(format_version=store.FORMAT_VERSION, description=description, splits=splits)
    with written(folder):
        write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    for leftover in [folder / PLAN, *folder.glob("*.skipped.json"), *folder.glob(".*.tmp")]:
        leftover.unlink()
    if skipped:
        console.print(
            f"left out {len(skipped)} unreadable images: {'; '.join(skipped[:5])}", style="yellow", markup=False
        )
    return folder


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Raises UserError in place of the system's, for a disk that fills up or goes away."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{folder}: can't be written ({reason}); what is done is kept for the next call") from None


def plan(folder: Path, split: str, rows: Rows, description: Description, resize: bool) -> list[Task]:
    """The files of one split, in the order of its images, of about PART_BYTES each."""
    size = description.image_size
    sizes = rows.sizes if size is None else np.full(len(rows), 3 * size**2)
    ends = np.flatnonzero(np.diff(np.cumsum(sizes) // PART_BYTES, append=-1)) + 1
    starts = [0, *ends[:-1].tolist()]
    return [
        Task(folder / f"{split}-{number:05}.arrow", rows.part(start, end), description, resize)
        for number, (start, end) in enumerate(zip(starts, ends.tolist(), strict=True))
    ]


def carry_out(tasks: list[Task], workers: int, skip_unreadable: bool, bar: Progress) -> list[Done]:
    """Makes the files that are not there yet, several at a time. Raises UserError when they can't be written."""
    done = {number: before for number, task in enumerate(tasks) if (before := done_before(task))}
    bar.advance(bar.task_ids[0], sum(len(before.kept) for before in done.values()))
    todo = [number for number in range(len(tasks)) if number not in done]
    with (
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool,
        ThreadPoolExecutor(1) as reader,
    ):
        running: dict[Future[Done], int] = {}
        verified: list[Future[None]] = []
        while todo or running:
            while todo and len(running) < 2 * workers:  # few at a time: a task may hold the pixels themselves
                number = todo.pop(0)
                running[pool.submit(make_part, tasks[number], skip_unreadable)] = number
            finished = next(as_completed(running))
            number = running.pop(finished)
            with written(tasks[number].path.parent):
                done[number] = finished.result()
            file = done[number].file
            if file:  # what the disk has is read beside the decoding, which leaves the disk idle
                verified.append(reader.submit(store.verify_file, tasks[number].path.parent, file))
            bar.advance(bar.task_ids[0], len(tasks[number]))
        for each in verified:
            each.result()
    return [done[number] for number in range(len(tasks))]


def problems(done: list[Done], skip_unreadable: bool) -> list[str]:
    """What could not be read, one line each. Raises UserError where it may not be left out."""
    found = [problem for each in done for problem in each.problems]
    if any(each.file is None for each in done):
        listing = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
        hint = "no image near them can" if skip_unreadable else "--skip-unreadable leaves them out"
        raise UserError(f"{len(found)} unreadable images: {listing}. {hint}")
    return found


def begin(folder: Path, description: Description) -> None:
    """Makes the folder, or makes sure that what lies there is a part of the same store."""
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


def check_same(there: store.Store, asked: Description, source: Source, skip_unreadable: bool) -> None:
    """Raises UserError where the store that is there is not the one that is asked for.

    Of each split the bytes of up to SAMPLE images are compared, the rest by names, labels and sizes.
    """
    found = there.description
    counts = {split: len(rows) for split, rows in there.splits.items()}
    wanted = {split: len(rows) for split, rows in source.splits.items()}
    if counts.keys() != wanted.keys() or any(counts[split] > wanted[split] for split in wanted):
        other = f"has {amounts(counts)}, and the source {amounts(wanted)}"
    elif found.class_names != asked.class_names:
        odd = sorted({*found.class_names} ^ {*asked.class_names}) or ["in another order"]
        other = f"has other classes than the source: {', '.join(odd[:3])}"
    elif found.source != asked.source:
        other = "was made of other files than lie in the source: their names, classes or sizes differ"
    elif bool(found.transform) != bool(asked.transform):
        other = f"has images {found.transform or 'as they were'}, not {asked.transform or 'as they are'}"
    elif counts != wanted and not skip_unreadable:
        left_out = sum(wanted.values()) - sum(counts.values())
        other = f"leaves out {left_out:,} images that could not be read, which --skip-unreadable would accept"
    elif changed := next(changed_images(there, source), None):
        other = f"was made when {changed} was another image"
    else:
        return
    raise UserError(f"{there.folder}: {other}; --name NAME makes another store, or remove this one first")


def changed_images(there: store.Store, source: Source) -> Iterator[str]:
    """The names of those of a sample whose source is not what it was."""
    for split, rows in source.splits.items():
        kept = there.splits[split]
        if len(kept) < len(rows):  # without some that could not be read, rows are not at their places
            continue
        for row in np.unique(np.linspace(0, len(rows) - 1, SAMPLE, dtype=np.int64)).tolist():
            try:
                content = rows.file(row) if rows.pixels is None else np.ascontiguousarray(rows.pixels[row])
            except OSError:  # it could be read before
                yield rows.names[row]
            else:
                if zlib_ng.crc32(content) != kept.checksum(row):
                    yield rows.names[row]


def amounts(counts: dict[str, int]) -> str:
    return " and ".join(f"{count:,} {split}" for split, count in counts.items())


def digest(source: Source) -> str:
    """Of the names, labels and sizes of the source's images."""
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
    """Says what the store takes, and would take otherwise; raises UserError, before anything is written, if there is
    no room for it."""
    splits = source.splits.values()
    rows = sum(map(len, splits))
    takes = {"pixels": rows * (3 * size**2 + ROW_BYTES)}
    if all(each.pixels is None for each in splits):
        takes["--encoded"] = sum(int(each.sizes.sum()) for each in splits) + rows * ROW_BYTES
    there = sum(path.stat().st_size for path in folder.glob("*.arrow")) if folder.is_dir() else 0
    needed = takes["--encoded" if encoded else "pixels"] - there
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    choices = ", ".join(f"{gib(each)} as {kind}" for kind, each in takes.items())
    console.print(f"{folder}: {rows:,} images, {choices}; {gib(there)} done, {gib(free)} free", highlight=False)
    if needed > free:
        raise UserError(f"{existing}: has {gib(free)} free, and the store takes {gib(needed)} more")


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def progress_bar(total: int) -> Progress:
    left = (TimeRemainingColumn(), TextColumn("left"))
    bar = Progress(BarColumn(), MofNCompleteColumn(), SpeedColumn(), *left, console=console)
    bar.add_task("images", total=total)
    return bar


class SpeedColumn(ProgressColumn):
    def render(self, task: progress.Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "")
