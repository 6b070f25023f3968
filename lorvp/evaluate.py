"""python -m lorvp.evaluate BUNDLE --data STORE: how good a tuned prompt is on prepared datasets, OOD sets included.

With `--corruptions` also on their images blurred, noisy, as JPEG and at less contrast (`lorvp/data/corruptions.py`).
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
    """On the test images of one dataset, in percent, with 95 % intervals (Wilson 1927)."""

    data: str
    corruption: str | None
    """What was done to the images; None where they are as they are."""
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
    """The accuracy of a loaded bundle on a store's test images; raises UserError as `test_images` and `hits` do."""
    images = test_images(opened, method.backbone.image_size)
    found = hits(method, images, opened.folder, batch_size, corruption)
    return accuracy(found, images, opened.folder, corruption)


def test_images(opened: Store, image_size: int) -> datasets.StoreImages:
    """What a store has to evaluate on. Raises UserError for images that were resized to another size."""
    datasets.check_size(opened, image_size)
    return datasets.store_images(opened, "test" if "test" in opened.splits else "train", image_size)


def hits(
    method: Method,
    images: datasets.Images,
    where: Path,
    batch_size: int = 512,
    corruption: Corruption | None = None,
) -> np.ndarray:
    """Of each image, corrupted at the size that the backbone takes: whether its class comes first, and is among the
    first five; (N, 2) bool. `where` names the images.

    Where they have a part of the bundle's classes only, the others' logits are left out (ImageNet-R and -A, as
    published by their authors). Raises UserError for classes that the bundle doesn't know.
    """
    device = method.backbone.mean.device
    known = torch.from_numpy(class_index(images.class_names, method.class_names, where)).to(device)
    found: list[torch.Tensor] = []
    micro_batches = MicroBatches(batch_size)
    done = 0
    with torch.inference_mode():
        for pixels, labels in loader.batches(images, batch_size, device=device):
            if corruption is not None:
                places = range(done, done + len(labels))
                pixels = corruption(resize(pixels, method.backbone.image_size), places)
            logits = torch.cat(micro_batches.run(method, pixels))[:, known]
            ranked = logits.topk(min(TOP_K, logits.shape[1]), dim=1).indices == labels[:, None]
            found.append(torch.stack([ranked[:, 0], ranked.any(1)], dim=1))
            done += len(labels)
    return torch.cat(found).cpu().numpy()


def accuracy(found: np.ndarray, images: datasets.Images, where: Path, corruption: Corruption | None) -> Accuracy:
    """What `hits` come to."""
    count, (top1, top5) = len(found), found.sum(0).tolist()
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


def class_index(asked: Sequence[str], known: Sequence[str], where: Path) -> np.ndarray:
    """Which of the `known` classes each of the `asked` ones is: by name, or by number where the names are numbers."""
    places = {name: place for place, name in enumerate(known)}
    if all(name.isdigit() and name not in places for name in asked) and max(map(int, asked)) < len(known):
        return np.array([int(name) for name in asked])
    unknown = [name for name in asked if name not in places]
    if unknown:
        raise UserError(f"{where}: {len(unknown)} of its classes are not the bundle's: {', '.join(unknown[:3])}")
    return np.array([places[name] for name in asked])


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count`, in percent."""
    share, z2 = right / count, NORMAL_95**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = NORMAL_95 / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / count / 4)
    return 100 * (centre - half), 100 * (centre + half)


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Of two accuracies on the same images, (N,) bool each: in points, with its 95 % interval.

    Only images on which they differ count (Agresti & Min 2005: half an image is added to each of the four cells).
    """
    count = len(ours)
    gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    size, up, down = count + 2, gained + 0.5, lost + 0.5
    half = NORMAL_95 * math.sqrt((up + down) - (up - down) ** 2 / size) / size
    centre = (up - down) / size
    return 100 * (gained - lost) / count, max(-100.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))


@app.command()
def command(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="the folder of a tuned prompt")],
    stores: Annotated[list[Path], typer.Option("--data", metavar="STORE", help="a prepared dataset; may be repeated")],
    corruptions: Annotated[bool, typer.Option("--corruptions", help="on corrupted images, too")] = False,
    out: Annotated[Path | None, typer.Option(help="a Parquet file to write, too")] = None,
    module: cli.Module = None,
) -> None:
    """Evaluates a bundle on the test images of prepared datasets."""
    opened = [Store.open(path) for path in stores]
    method = bundle.load(folder, "cuda" if torch.cuda.is_available() else "cpu", module)
    ways = [None, *CORRUPTIONS] if corruptions else [None]
    found = [evaluate(method, each, corruption=way) for each in opened for way in ways]
    table = Table(box=None)
    for column in ("data", "corruption", "images", "classes", "top-1 %", "95 %", "top-5 %", "95 %"):
        table.add_column(column, justify="left" if column in ("data", "corruption") else "right")
    for a in found:
        top1, top5 = f"{a.top1_low:.2f} to {a.top1_high:.2f}", f"{a.top5_low:.2f} to {a.top5_high:.2f}"
        corruption = f"{a.corruption} {a.strength}" if a.corruption else ""
        table.add_row(a.data, corruption, f"{a.images:,}", str(a.classes), f"{a.top1:.2f}", top1, f"{a.top5:.2f}", top5)
    console.print(table)
    if out is not None:
        try:
            with replacing(out) as temporary:
                pq.write_table(pa.Table.from_pylist([asdict(a) for a in found], SCHEMA), temporary)
        except OSError as error:
            raise UserError(f"{out}: can't be written ({error.strerror})") from None
        console.print(f"written: {out}", highlight=False)


if __name__ == "__main__":
    cli.run(app)
