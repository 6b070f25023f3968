"""Make and inspect stores: python -m lorvp.data prepare NAME --source DIR --out DIR; also `list`, `info`, `verify`.

It imports no torch, to leave the memory to the images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.table import Table

from lorvp.config import DatasetConfig
from lorvp.data import store
from lorvp.data.prepare import console, prepare
from lorvp.data.sources import SOURCES, torchvision_sets
from lorvp.data.store import MANIFEST
from lorvp.errors import UserError
from lorvp.utils import cli
from lorvp.utils.explain import explain

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


def stores(out: Path) -> Iterator[Path]:
    """Yield the folders of the stores in `out`, sorted by name."""
    return (path.parent for path in sorted(out.glob(f"*/{MANIFEST}")))


@app.command("prepare")
def prepare_command(
    dataset: Annotated[str, typer.Argument(metavar="NAME", help=f"one of {', '.join(sorted(SOURCES))}")],
    source: Annotated[Path, typer.Option(help="folder of the dataset as it comes")],
    out: Annotated[Path, typer.Option(help="folder of all stores; this one is made in NAME-SIZE")],
    size: Annotated[int | None, typer.Option(min=8, help="side in pixels; default: the images' own, else 224")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="default: one a core")] = None,
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help="leave out what can't be read")] = False,
    download: Annotated[bool, typer.Option("--download", help="have torchvision fetch it, where it can")] = False,
    partial: Annotated[bool, typer.Option("--partial", help="take a part of the dataset, too")] = False,
    encoded: Annotated[bool, typer.Option("--encoded", help="keep the files as they are: smaller, slower")] = False,
    name: Annotated[str, typer.Option(help="what the store is called; default: NAME")] = "",
    nested: Annotated[bool, typer.Option("--nested", help="of image_folder: every folder in it is a class")] = False,
    column: Annotated[str, typer.Option(help="of huggingface: a column to store for dataset.groups")] = "",
) -> None:
    """Decode a dataset once. Run the command again to resume it. A store of something else is never overwritten."""
    if download:
        torchvision_sets.download(dataset, source)
    folder = prepare(dataset, source, out, size, processes, skip_unreadable, partial, encoded, name, nested, column)
    show(folder)


@app.command("list")
def list_command(out: Annotated[Path, typer.Argument(help="folder of the stores")]) -> None:
    """Show the stores in a folder."""
    table = Table(box=None)
    for column in ("store", "size", "classes", "images", "GiB"):
        table.add_column(column, justify="left" if column == "store" else "right")
    for folder in stores(out):
        manifest = store.read_manifest(folder)
        files = [file for split in manifest.splits.values() for file in (split.index, *split.parts)]
        counts = ", ".join(f"{split.index.rows:,} {name}" for name, split in manifest.splits.items())
        size = sum(file.bytes for file in files) / 2**30
        description = manifest.description
        side = str(description.image_size or store.ENCODED)
        table.add_row(folder.name, side, str(len(description.class_names)), counts, f"{size:.2f}")
    console.print(table)


@app.command("info")
def info_command(folder: Path) -> None:
    """Show what a store holds."""
    show(folder)


@app.command("verify")
def verify_command(folder: Path) -> None:
    """Read every byte of a store and compare it with the checksums."""
    store.verify(folder, store.read_manifest(folder))
    console.print(f"{folder}: every file is as it was written")


@app.command("duplicates")
def duplicates_command(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="the value of trial.dataset, as JSON")],
) -> None:
    """Say whether validation images have near-duplicates among the training images, if more than a few have."""
    from lorvp.data import duplicates  # torch

    try:
        config = DatasetConfig.model_validate_json(dataset)
    except ValidationError as error:
        raise UserError(f"DATASET: {explain(error, DatasetConfig)[1]}") from None
    with redirect_stdout(sys.stderr):  # what is read is remarked on as in a trial
        line = duplicates.find(config).line(config)
    if line:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show(folder: Path) -> None:
    """Print what the store in `folder` holds. Raises UserError if it is no complete store."""
    opened = store.Store.open(folder)
    description = opened.description
    counts = ", ".join(f"{len(split):,} {name}" for name, split in opened.splits.items())
    console.print(f"{folder}: {description.dataset}, {counts}, {len(description.class_names)} classes", highlight=False)
    size = f"{description.image_size} px" if description.image_size else "encoded"
    console.print(f"images: {size}, {description.transform or 'as in the source'}", highlight=False)


if __name__ == "__main__":
    cli.run(app)
