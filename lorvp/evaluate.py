"""python -m lorvp.evaluate BUNDLE --data STORE: how good a tuned prompt is on prepared datasets, OOD sets included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.table import Table

from lorvp import bundle, cli, datasets, pipeline
from lorvp.errors import UserError
from lorvp.files import replacing
from lorvp.methods import Method
from lorvp.store import Store

TOP_K = 5
NORMAL_95 = 1.959964

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Accuracy:
    """On the test images of one store, in percent, with 95 % intervals (Wilson 1927)."""

    data: str
    images: int
    classes: int
    top1: float
    top1_low: float
    top1_high: float
    top5: float
    top5_low: float
    top5_high: float


def evaluate(method: Method, opened: Store, batch_size: int = 512) -> Accuracy:
    """The accuracy of a loaded bundle on a store's test images.

    Where the store has a part of the bundle's classes only, the others' logits are left out (ImageNet-R and -A, as
    published by their authors). Raises UserError for classes that the bundle doesn't know.
    """
    description = opened.description
    datasets.check_size(opened, method.backbone.image_size)
    images = datasets.stored(opened, "test" if "test" in opened.splits else "train", method.backbone.image_size)
    device = method.backbone.mean.device
    known = torch.from_numpy(class_index(description.class_names, method.class_names, opened.folder)).to(device)
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    with torch.inference_mode():
        for pixels, labels in pipeline.batches(images, batch_size, device=device):
            logits = method(pixels)[:, known]
            ranked = logits.topk(min(TOP_K, logits.shape[1]), dim=1).indices == labels[:, None]
            hits += torch.stack([ranked[:, 0].sum(), ranked.sum()])
    top1, top5 = hits.tolist()
    count = len(images)
    return Accuracy(
        opened.folder.name,
        count,
        len(known),
        100 * top1 / count,
        *wilson(top1, count),
        100 * top5 / count,
        *wilson(top5, count),
    )


def class_index(asked: Sequence[str], known: Sequence[str], where: Path) -> np.ndarray:
    """Which of the `known` classes each of the `asked` ones is: by name, or by number where the names are numbers."""
    places = {name: place for place, name in enumerate(known)}
    if all(name.isdigit() and name not in places for name in asked) and max(map(int, asked)) < len(known):
        return np.array([int(name) for name in asked])
    unknown = [name for name in asked if name not in places]
    if unknown:
        raise UserError(f"{where}: {len(unknown)} of its classes are not the bundle's: {', '.join(unknown[:3])}")
    return np.array([places[name] for name in asked])


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count`, in percent."""
    share, z2 = hits / count, NORMAL_95**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = NORMAL_95 / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / count / 4)
    return 100 * (centre - half), 100 * (centre + half)


@app.command()
def command(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="the folder of a tuned prompt")],
    stores: Annotated[list[Path], typer.Option("--data", metavar="STORE", help="a prepared dataset; may be repeated")],
    out: Annotated[Path | None, typer.Option(help="a Parquet file to write, too")] = None,
) -> None:
    """Evaluates a bundle on the test images of prepared datasets."""
    opened = [Store.open(path) for path in stores]
    method = bundle.load(folder, "cuda" if torch.cuda.is_available() else "cpu")
    found = [evaluate(method, each) for each in opened]
    table = Table(box=None)
    for column in ("data", "images", "classes", "top-1 %", "95 %", "top-5 %", "95 %"):
        table.add_column(column, justify="left" if column == "data" else "right")
    for a in found:
        top1, top5 = f"{a.top1_low:.2f} to {a.top1_high:.2f}", f"{a.top5_low:.2f} to {a.top5_high:.2f}"
        table.add_row(a.data, f"{a.images:,}", str(a.classes), f"{a.top1:.2f}", top1, f"{a.top5:.2f}", top5)
    console.print(table)
    if out is not None:
        with replacing(out) as temporary:
            pq.write_table(pa.Table.from_pylist([asdict(a) for a in found]), temporary)
        console.print(f"written: {out}", highlight=False)


if __name__ == "__main__":
    cli.run(app)
