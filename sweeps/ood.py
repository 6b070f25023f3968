"""python -m sweeps.ood SWEEP: the best bundle of a sweep beside its control's, on other images than it was tuned for.

These are the OOD sets of its dataset (ImageNet-R, -A, -Sketch and -V2 of ImageNet) and its own test images corrupted
(`lorvp/data/corruptions.py`). It is a command of its own, and no part of the driver, since it needs a GPU where trials
do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from rich.table import Table

from lorvp import evaluate
from lorvp.bundle import format as bundle_format
from lorvp.bundle import io as bundle
from lorvp.config import DatasetConfig
from lorvp.data import datasets
from lorvp.data.__main__ import stores
from lorvp.data.corruptions import CORRUPTIONS, Corruption
from lorvp.data.store import Store
from lorvp.errors import UserError
from lorvp.methods.base import Method
from lorvp.utils import cli
from lorvp.utils.files import replacing
from sweeps.results.leaderboard import Entry
from sweeps.results.outcome import Outcome
from sweeps.results.paired import Paired
from sweeps.results.rows import OOD

DIFFERENCE = ("difference", "difference_low", "difference_high")
"""Of the best's top-1 to the control's on the same images, in points."""
SCHEMA = pa.schema(
    [("model", pa.string()), *evaluate.SCHEMA, ("trial", pa.string()), ("bundle", pa.string())]
    + [(column, pa.float64()) for column in DIFFERENCE]
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = cli.make_console()


@dataclass(frozen=True)
class OodSet:
    """Images to evaluate on."""

    where: Path
    """Names them."""
    images: datasets.Images
    corruptions: list[Corruption]
    """Those that they are evaluated under, too."""


def ood_sets(config: DatasetConfig, method: Method, paths: Iterable[Path], corrupt: bool) -> list[OodSet]:
    """Open a trial's test images and the stores at `paths`. Raises UserError for what a bundle can't take."""
    own = datasets.load(config, method.backbone.image_size).test
    first = OodSet(Path(config.root or config.name), own, CORRUPTIONS if corrupt else [])
    return [first, *(OodSet(path, open_images(path, method), []) for path in paths)]


def open_images(path: Path, method: Method) -> datasets.Images:
    """Open the images of a store. Raises UserError where their size or their classes are not those of the bundle."""
    images = evaluate.test_images(Store.open(path), method.backbone.image_size)
    evaluate.class_index(images.class_names, method.class_names, path)
    return images


def find_ood_sets(config: DatasetConfig, method: Method) -> list[Path]:
    """Find the OOD sets of a store's dataset that lie in the same folder, one store of each; says which don't fit."""
    if config.name != "store" or config.root is None:
        return []
    family = Store.open(config.root).description.dataset + "-"
    paths: dict[str, Path] = {}
    problems: dict[str, UserError] = {}
    for path in stores(config.root.parent):
        store = Store.open(path)
        dataset = store.description.dataset
        if dataset.startswith(family) and "train" not in store.splits and dataset not in paths:
            try:
                open_images(path, method)
                paths[dataset] = path
            except UserError as error:
                problems[dataset] = error
    for dataset in problems.keys() - paths.keys():
        console.print(f"left out: {problems[dataset]}", style="yellow", highlight=False, markup=False)
    return list(paths.values())


def evaluate_sets(
    entry: Entry, method: Method, sets: Iterable[OodSet], batch_size: int
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yield a row for each set and each of its corruptions, with which images were right: (images,), bool."""
    digest = bundle_format.describe(entry.bundle)["sha256"]
    for each in sets:
        for corruption in [None, *each.corruptions]:
            hits = evaluate.hits(method, each.images, each.where, batch_size, corruption)
            accuracy = evaluate.accuracy(hits, each.images, each.where, corruption)
            yield asdict(accuracy) | {"trial": entry.trial.name, "bundle": digest}, hits[:, 0]


def table(rows: list[dict[str, Any]]) -> Table:
    """Make a table of the best beside the control (percent) and their difference (points), with 95 % intervals."""
    by_set: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        corruption = f"{row['corruption']} {row['strength']}" if row["corruption"] else ""
        by_set.setdefault((row["data"], corruption), {})[row["model"]] = row
    shown = Table(box=None)
    for column in ("data", "corruption", "images", "classes", "best top-1 %", "control top-1 %", "difference"):
        shown.add_column(column, justify="left" if column in ("data", "corruption") else "right")
    for (data, corruption), by_model in by_set.items():
        best, control = by_model["best"], by_model.get("control")
        difference = "{:+.2f} ({:+.2f} to {:+.2f})".format(*(best[key] for key in DIFFERENCE)) if control else "-"
        cells = [f"{best['images']:,}", str(best["classes"]), top1(best), top1(control) if control else "-", difference]
        shown.add_row(data, corruption, *cells)
    return shown


def top1(row: dict[str, Any]) -> str:
    """Format a row's top-1 accuracy with its 95 % interval."""
    return f"{row['top1']:.2f} ({row['top1_low']:.2f} to {row['top1_high']:.2f})"


@app.command()
def command(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="folder of a sweep that has ended")],
    data: Annotated[
        list[Path],
        typer.Option("--data", metavar="STORE", help="an OOD set; may be repeated. Default: those beside the data"),
    ] = [],  # noqa: B006  typer's own form
    corruptions: Annotated[bool, typer.Option(help="its own test images corrupted, too")] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="images at once")] = 512,
) -> None:
    """Evaluates the best bundle of a sweep, and its control's, out of distribution."""
    outcome = Outcome.read(sweep)
    models = {"best": outcome.best(), "control": outcome.control()}
    entries = {model: entry for model, entry in models.items() if entry is not None}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    methods = {
        model: bundle.load(entry.bundle, device, entry.trial.config.backbone.module) for model, entry in entries.items()
    }
    paths = data or find_ood_sets(entries["best"].trial.config.dataset, methods["best"])
    sets = {
        model: ood_sets(entry.trial.config.dataset, methods[model], paths, corruptions)
        for model, entry in entries.items()
    }
    evaluations = {
        model: list(evaluate_sets(entry, methods[model], sets[model], batch_size)) for model, entry in entries.items()
    }
    for (row, best_hits), (_, control_hits) in zip(evaluations["best"], evaluations.get("control", [])):  # noqa: B905  there may be no control
        paired = Paired.of(best_hits, control_hits)
        row |= dict(zip(DIFFERENCE, (paired.points, *paired.interval), strict=True))
    rows = [{"model": model} | row for model, of_model in evaluations.items() for row, _ in of_model]
    with replacing(sweep / OOD) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary)
    console.print(table(rows))
    console.print(f"written: {sweep / OOD}", highlight=False)


if __name__ == "__main__":
    cli.run(app)
