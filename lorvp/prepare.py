"""`python -m lorvp.data prepare NAME`: decodes a dataset once, into the store that all its trials read.

What is done is kept: a store is made in files of 64 MiB, each renamed into place when it is whole, and a second call
goes on with the missing ones. `store.json` comes last.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lorvp import images, sources, store
from lorvp.errors import UserError
from lorvp.files import write_json
from lorvp.sources import SOURCES, Rows, Source, read_source
from lorvp.store import MANIFEST, Description, File, Manifest, SplitFiles

PART_BYTES = 64 << 20
ROW_BYTES = 256
"""What a row's label and name take, at most, of the index and of the plan."""
PLAN = "plan.json"
DEFAULT_SIZE = 224

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Task:
    """One file of pixels to be made."""

    path: Path
    paths: list[Path] | None
    pixels: np.ndarray | None
    description: Description
    resize: bool

    def __len__(self) -> int:
        return len(self.paths if self.paths is not None else self.pixels)


@dataclass(frozen=True)
class Done:
    file: File | None
    kept: list[bool]
    problems: list[str]


def make_part(task: Task, skip_unreadable: bool) -> Done:
    """Makes one file, in a process of its own. Writes nothing where an image can't be read and may not be skipped."""
    if task.pixels is not None:
        return Done(store.write_part(task.path, task.pixels, task.description), [True] * len(task.pixels), [])
    size = task.description.image_size
    pixels = np.empty((len(task.paths), size, size, 3), dtype=np.uint8)
    kept, problems = [], []
    for path in task.paths:
        try:
            pixels[sum(kept)] = images.decode(path, size, task.resize)
            kept.append(True)
        except UserError as error:
            kept.append(False)
            problems.append(str(error))
    if problems and not (skip_unreadable and any(kept)):
        return Done(None, kept, problems)
    if problems:  # the index is written later, perhaps after a restart; told first, as the file says that all is done
        write_json(task.path.with_suffix(".skipped.json"), {"kept": kept, "problems": problems})
    return Done(store.write_part(task.path, pixels[: sum(kept)], task.description), kept, problems)


def done_before(task: Task) -> Done | None:
    """What an earlier call made of the task."""
    if not task.path.exists():
        return None
    skipped = task.path.with_suffix(".skipped.json")
    values = json.loads(skipped.read_text()) if skipped.exists() else {"kept": [True] * len(task), "problems": []}
    try:
        rows = store.read_batch(task.path).num_rows
    except UserError:
        return None
    if rows != sum(values["kept"]):
        return None
    return Done(store.described(task.path, rows), values["kept"], values["problems"])


def prepare(
    name: str,
    source_folder: Path,
    out: Path,
    size: int | None = None,
    processes: int | None = None,
    skip_unreadable: bool = False,
    partial: bool = False,
) -> Path:
    """Makes the store of dataset `name`, or goes on making it, and returns its folder.

    `size` is the side of the images in pixels: by default their own where all have the same, else 224. Raises UserError
    for a source that isn't the dataset, images that can't be read, a disk without room, a folder that can't be written.
    """
    source = read_source(name, source_folder, partial)
    size = size or source.native_size or DEFAULT_SIZE
    folder = out / f"{name}-{size}"
    if (folder / MANIFEST).exists():
        store.Store.open(folder)
        return folder
    resize = size != source.native_size
    if resize and any(rows.pixels is not None for rows in source.splits.values()):
        raise UserError(f"--size {size}: {name} is stored at its own {source.native_size} and resized where it is used")
    description = Description(
        dataset=name,
        image_size=size,
        transform=images.transform(size) if resize else "",
        class_names=tuple(source.class_names),
        source=digest(source),
    )
    check_room(folder, source, size)
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
            index = store.write_index(folder / f"{split}-index.arrow", rows.labels[kept], names, description)
            splits[split] = SplitFiles(index=index, parts=[each.file for each in done])
    for split, files in splits.items():
        found = len(np.unique(store.Split(folder, files, size).labels))
        if found < len(source.class_names):
            raise UserError(f"{folder}: {len(source.class_names) - found} classes have no readable image in {split}")
    manifest = Manifest(format_version=store.FORMAT_VERSION, description=description, splits=splits)
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    store.verify(folder)
    for leftover in [folder / PLAN, *folder.glob("*.skipped.json"), *folder.glob(".*.tmp")]:
        leftover.unlink()
    if skipped:
        console.print(
            f"left out {len(skipped)} unreadable images: {'; '.join(skipped[:5])}", style="yellow", markup=False
        )
    return folder


def plan(folder: Path, split: str, rows: Rows, description: Description, resize: bool) -> list[Task]:
    """The files of one split, in the order of its images."""
    each = max(1, PART_BYTES // (3 * description.image_size**2))
    tasks = []
    for number, start in enumerate(range(0, len(rows), each)):
        here = slice(start, start + each)
        paths = rows.paths[here] if rows.paths else None
        pixels = rows.pixels[here] if rows.pixels is not None else None
        tasks.append(Task(folder / f"{split}-{number:05}.arrow", paths, pixels, description, resize))
    return tasks


def carry_out(tasks: list[Task], workers: int, skip_unreadable: bool, bar: Progress) -> list[Done]:
    """Makes the files that are not there yet, several at a time. Raises UserError when they can't be written."""
    done = [done_before(task) for task in tasks]
    bar.advance(bar.task_ids[0], sum(len(before.kept) for before in done if before))
    todo = [number for number, before in enumerate(done) if before is None]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        running: dict[Future[Done], int] = {}
        while todo or running:
            while todo and len(running) < 2 * workers:  # few at a time: a task may hold the pixels themselves
                number = todo.pop(0)
                running[pool.submit(make_part, tasks[number], skip_unreadable)] = number
            finished = next(as_completed(running))
            number = running.pop(finished)
            try:
                done[number] = finished.result()
            except OSError as error:
                pool.shutdown(cancel_futures=True)
                folder = tasks[number].path.parent
                raise UserError(f"{folder}: can't be written ({error.strerror}); what is done is kept") from None
            bar.advance(bar.task_ids[0], len(tasks[number]))
    return done


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


def digest(source: Source) -> str:
    """Of the names, labels and sizes of the source's images."""
    seen = hashlib.blake2b(digest_size=16)
    for split, rows in source.splits.items():
        seen.update(f"{split}\0".encode())
        seen.update(rows.labels.tobytes())
        for i, name in enumerate(rows.names):
            size = rows.paths[i].stat().st_size if rows.paths else 0
            seen.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        if rows.pixels is not None:
            seen.update(np.ascontiguousarray(rows.pixels))
    return seen.hexdigest()


def check_room(folder: Path, source: Source, size: int) -> None:
    """Raises UserError, before anything is written, when the disk has no room for the store."""
    rows = sum(map(len, source.splits.values()))
    there = sum(path.stat().st_size for path in folder.glob("*.arrow")) if folder.is_dir() else 0
    needed = rows * (3 * size**2 + ROW_BYTES) - there
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    console.print(f"{folder}: {rows:,} images of {size} px, {needed / 2**30:.2f} GiB of {free / 2**30:.2f} GiB free")
    if needed > free:
        raise UserError(
            f"{existing}: has {free / 2**30:.2f} GiB free, and the store takes {needed / 2**30:.2f} GiB more"
        )


def progress_bar(total: int) -> Progress:
    left = (TimeRemainingColumn(), TextColumn("left"))
    bar = Progress(BarColumn(), MofNCompleteColumn(), SpeedColumn(), *left, console=console)
    bar.add_task("images", total=total)
    return bar


class SpeedColumn(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: object) -> str:
        return f"{task.speed:,.0f} images/s" if task.speed else ""


def stores(out: Path) -> Iterator[Path]:
    return (path.parent for path in sorted(out.glob(f"*/{MANIFEST}")))


@app.command("prepare")
def prepare_command(
    name: Annotated[str, typer.Argument(help=f"one of {', '.join(SOURCES)}")],
    source: Annotated[Path, typer.Option(help="folder of the dataset as it comes")],
    out: Annotated[Path, typer.Option(help="folder of all stores; this one is made in NAME-SIZE")],
    size: Annotated[int | None, typer.Option(min=8, help="side in pixels; default: the images' own, else 224")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="default: one a core")] = None,
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help="leave out what can't be read")] = False,
    download: Annotated[bool, typer.Option("--download", help="have torchvision fetch CIFAR-10 or -100")] = False,
    partial: Annotated[bool, typer.Option("--partial", help="take a part of the dataset, too")] = False,
) -> None:
    """Decodes a dataset once. A call that was interrupted is gone on with by another."""
    if download:
        sources.download(name, source)
    folder = prepare(name, source, out, size, processes, skip_unreadable, partial)
    show(folder)


@app.command("list")
def list_command(out: Annotated[Path, typer.Argument(help="folder of the stores")]) -> None:
    """Shows the stores in a folder."""
    table = Table(box=None)
    for column in ("store", "size", "classes", "images", "GiB"):
        table.add_column(column, justify="left" if column == "store" else "right")
    for folder in stores(out):
        manifest = store.read_manifest(folder)
        files = [file for split in manifest.splits.values() for file in (split.index, *split.parts)]
        counts = ", ".join(f"{split.index.rows:,} {name}" for name, split in manifest.splits.items())
        size = sum(file.bytes for file in files) / 2**30
        description = manifest.description
        table.add_row(
            folder.name, str(description.image_size), str(len(description.class_names)), counts, f"{size:.2f}"
        )
    console.print(table)


@app.command("info")
def info_command(folder: Path) -> None:
    """Shows what a store holds."""
    show(folder)


@app.command("verify")
def verify_command(folder: Path) -> None:
    """Reads every byte of a store and compares it with the checksums."""
    store.verify(folder)
    console.print(f"{folder}: every file is as it was written")


def show(folder: Path) -> None:
    opened = store.Store.open(folder)
    description = opened.description
    counts = ", ".join(f"{len(split):,} {name}" for name, split in opened.splits.items())
    console.print(f"{folder}: {description.dataset}, {counts}, {len(description.class_names)} classes", highlight=False)
    console.print(
        f"pixels: {description.image_size} px, {description.transform or 'as in the source'}", highlight=False
    )
