"""Evaluate a tuned prompt on prepared datasets, OOD sets included: python -m lorvp.evaluate BUNDLE --data STORE.

`--corruptions` adds their images with blur, noise, JPEG artefacts and low contrast (`lorvp/data/corruptions.py`).
"""

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
from rich.table import Table

from lorvp.bundle import io as bundle
from lorvp.data import datasets, loader
from lorvp.data.corruptions import CORRUPTIONS, Corruption
from lorvp.data.resize import resize
from lorvp.data.store import Store
from lorvp.errors import UserError
from lorvp.methods.base import Method
from lorvp.utils import cli
from lorvp.utils.device import MicroBatches
from lorvp.utils.files import replacing

TOP_K = 5
NORMAL_95 = 1.959964

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = cli.make_console()


@dataclass(frozen=True)
class Accuracy:
    """Hold the accuracy on one dataset's test images, in percent, with 95 % intervals (Wilson 1927)."""

    data: str
    corruption: str | None
    """Kind of corruption; None for clean images."""
    strength: int | None
    images: int
    classes: int
    top1: float
    top1_low: float
    top1_high: float
    top5: float
    top5_low: float
    top5_high: float


SCHEMA = pa.schema(
    [("data", pa.string()), ("corruption", pa.string()), ("strength", pa.int64())]
    + [("images", pa.int64()), ("classes", pa.int64())]
    + [(f"{top}{end}", pa.float64()) for top in ("top1", "top5") for end in ("", "_low", "_high")]
)


def evaluate(method: Method, opened: Store, batch_size: int = 512, corruption: Corruption | None = None) -> Accuracy:
    """Evaluate a loaded bundle on a store's test images. Raises UserError as `test_images` and `hits` do."""
    images = test_images(opened, method.backbone.image_size)
    image_hits = hits(method, images, opened.folder, batch_size, corruption)
    return accuracy(image_hits, images, opened.folder, corruption)


def test_images(opened: Store, image_size: int) -> datasets.StoreImages:
    """Return a store's images to evaluate on. Raises UserError if they were resized to another size."""
    datasets.check_size(opened, image_size)
    return datasets.store_images(opened, "test" if "test" in opened.splits else "train", image_size)


def hits(
    method: Method,
    images: datasets.Images,
    where: Path,
    batch_size: int = 512,
    corruption: Corruption | None = None,
) -> np.ndarray:
    """Return for each image whether its class comes first, and whether it is among the first five: (N, 2) bool.

    Images are corrupted at the backbone's input size. If they have only a part of the bundle's classes, the logits of
    the others are left out, as the authors of ImageNet-R and -A do. `where` names the images in errors. Raises
    UserError for classes that the bundle doesn't know.
    """
    device = method.backbone.mean.device
    known = torch.from_numpy(class_index(images.class_names, method.class_names, where)).to(device)
    batch_hits: list[torch.Tensor] = []
    micro_batches = MicroBatches(batch_size)
    done = 0
    with torch.inference_mode():
        for pixels, labels in loader.batches(images, batch_size, device=device):
            if corruption is not None:
                places = range(done, done + len(labels))
                pixels = corruption(resize(pixels, method.backbone.image_size), places)
            logits = torch.cat(micro_batches.run(method, pixels))[:, known]
            ranked = logits.topk(min(TOP_K, logits.shape[1]), dim=1).indices == labels[:, None]
            batch_hits.append(torch.stack([ranked[:, 0], ranked.any(1)], dim=1))
            done += len(labels)
    return torch.cat(batch_hits).cpu().numpy()


def accuracy(image_hits: np.ndarray, images: datasets.Images, where: Path, corruption: Corruption | None) -> Accuracy:
    """Summarise what `hits` returned as accuracies with their intervals."""
    count, (top1, top5) = len(image_hits), image_hits.sum(0).tolist()
    return Accuracy(
        where.name,
        corruption.kind if corruption else None,
        corruption.strength if corruption else None,
        count,
        len(images.class_names),
        100 * top1 / count,
        *wilson(top1, count),
        100 * top5 / count,
        *wilson(top5, count),
    )


def class_index(wanted: Sequence[str], known: Sequence[str], where: Path) -> np.ndarray:
    """Return the index in `known` of each `wanted` class, by name, or by number if the names are numbers.

    Raises UserError for unknown classes.
    """
    places = {name: place for place, name in enumerate(known)}
    if all(name.isdigit() and name not in places for name in wanted) and max(map(int, wanted)) < len(known):
        return np.array([int(name) for name in wanted])
    unknown = [name for name in wanted if name not in places]
    if unknown:
        raise UserError(f"{where}: {len(unknown)} of its classes are not the bundle's: {', '.join(unknown[:3])}")
    return np.array([places[name] for name in wanted])


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of the fraction `right` / `count`, in percent (Wilson 1927)."""
    fraction, z2 = right / count, NORMAL_95**2 / count
    centre = (fraction + z2 / 2) / (1 + z2)
    half = NORMAL_95 / (1 + z2) * math.sqrt(fraction * (1 - fraction) / count + z2 / count / 4)
    return 100 * (centre - half), 100 * (centre + half)


@app.command()
def command(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="the folder of a tuned prompt")],
    stores: Annotated[list[Path], typer.Option("--data", metavar="STORE", help="a prepared dataset; may be repeated")],
    corruptions: Annotated[bool, typer.Option("--corruptions", help="on corrupted images, too")] = False,
    out: Annotated[Path | None, typer.Option(help="a Parquet file to write, too")] = None,
    module: cli.Module = None,
) -> None:
    """Evaluate a bundle on the test images of prepared datasets."""
    opened = [Store.open(path) for path in stores]
    method = bundle.load(folder, "cuda" if torch.cuda.is_available() else "cpu", module)
    applied = [None, *CORRUPTIONS] if corruptions else [None]
    accuracies = [evaluate(method, data, corruption=corruption) for data in opened for corruption in applied]
    table = Table(box=None)
    for column in ("data", "corruption", "images", "classes", "top-1 %", "95 %", "top-5 %", "95 %"):
        table.add_column(column, justify="left" if column in ("data", "corruption") else "right")
    for a in accuracies:
        top1, top5 = f"{a.top1_low:.2f} to {a.top1_high:.2f}", f"{a.top5_low:.2f} to {a.top5_high:.2f}"
        name = f"{a.corruption} {a.strength}" if a.corruption else ""
        table.add_row(a.data, name, f"{a.images:,}", str(a.classes), f"{a.top1:.2f}", top1, f"{a.top5:.2f}", top5)
    console.print(table)
    if out is not None:
        try:
            with replacing(out) as temporary:
                pq.write_table(pa.Table.from_pylist([asdict(a) for a in accuracies], SCHEMA), temporary)
        except OSError as error:
            raise UserError(f"{out}: can't be written ({error.strerror})") from None
        console.print(f"written: {out}", highlight=False)


if __name__ == "__main__":
    cli.run(app)
