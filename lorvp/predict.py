"""Predict the classes of images with a tuned prompt: python -m lorvp.predict BUNDLE IMAGE..."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.table import Table

from lorvp.bundle import io as bundle
from lorvp.data import decode
from lorvp.data.store import batched
from lorvp.methods.base import Method
from lorvp.utils import cli

AT_ONCE = 64
"""Number of images that go through the backbone together."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
console = cli.make_console()


@dataclass(frozen=True)
class Prediction:
    """Hold the likeliest classes of an image with their probabilities."""

    image: Path
    classes: list[tuple[str, float]]


def predict(method: Method, paths: Sequence[Path], top: int = 5) -> Iterator[Prediction]:
    """Yield the `top` likeliest classes of each image file, by a loaded bundle.

    Images are decoded and resized as the trial's were (`lorvp.data.decode`). Raises UserError naming an image that
    can't be read.
    """
    device = method.backbone.mean.device
    for batch in batched(paths, AT_ONCE):
        decoded = np.stack([decode.decode(path, method.side) for path in batch])
        pixels = torch.from_numpy(decoded).permute(0, 3, 1, 2).to(device)
        with torch.inference_mode():
            probabilities = method(pixels).softmax(1)
        values, places = probabilities.topk(min(top, method.classes), dim=1)
        for path, row, indices in zip(batch, values.tolist(), places.tolist(), strict=True):
            yield Prediction(
                path, [(method.class_names[place], value) for place, value in zip(indices, row, strict=True)]
            )


@app.command()
def command(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="the folder of a tuned prompt")],
    paths: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="image files")],
    top: Annotated[int, typer.Option(min=1, help="classes of each image")] = 3,
    module: cli.Module = None,
) -> None:
    """Print the likeliest classes of images."""
    method = bundle.load(folder, "cuda" if torch.cuda.is_available() else "cpu", module)
    table = Table("image", "class", "probability", box=None)
    table.columns[0].overflow, table.columns[-1].justify = "fold", "right"
    for prediction in list(predict(method, paths, top)):  # all of them, or the error alone
        for place, (name, probability) in enumerate(prediction.classes):
            table.add_row("" if place else str(prediction.image), name, f"{probability:.4f}")
    console.print(table, markup=False)


if __name__ == "__main__":
    cli.run(app)
