"""python -m lorvp.bench step: how fast the trial's loop is, beside the published one and the speed of light.

plain:      ours, with every way of lorvp/speed.py switched off.
light:      forward and backward to the input, of the same backbone, precision and memory format, on one batch
            that lies on the device, and nothing else.
ours:       the trial's own loop, data included (`images_per_second` of its epochs).
published:  the loop of the public code (`lorvp/published.py`).

All take turns, so that what disturbs the machine disturbs all of them.

python -m lorvp.bench memory: what the allocator gave a trial at most, beside what --dry-run predicts.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from lorvp import cli, published
from lorvp.backbone import Backbone, resolve_precision
from lorvp.config import SpeedConfig, TrialConfig
from lorvp.datasets import ArrayImages, Splits
from lorvp.memory import predict
from lorvp.speed import is_convolutional
from lorvp.training import Loaded, train

CLASSES = 10
PLAIN = SpeedConfig(**dict.fromkeys(SpeedConfig.model_fields, False))

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
console = Console(soft_wrap=True)


@app.callback()
def main() -> None:
    """Benchmarks of a trial."""


def rate(trial: published.Trial, loader: DataLoader) -> float:
    """Images per second of one pass, by the public code's loop."""
    start = time.perf_counter()
    trial.epoch(loader)
    return len(loader.dataset) / (time.perf_counter() - start)


def light(backbone: Backbone, batch: int, steps: int) -> float:
    """Images per second of forward and backward to the input, and nothing else."""
    device = backbone.mean.device
    size = backbone.image_size
    x = torch.randn(batch, 3, size, size, device=device)
    if is_convolutional(backbone.model):
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    start = time.perf_counter()
    for _ in range(steps):
        with torch.autocast(device.type, dtype=backbone.dtype, enabled=backbone.dtype != torch.float32):
            output = backbone.model.forward_head(backbone.model.forward_features(x), pre_logits=True)
        output.backward(torch.ones_like(output))
        x.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return batch * steps / (time.perf_counter() - start)


@app.command()
def step(
    backbone: Annotated[str, typer.Option(help="timm model name")] = "resnet18",
    image_size: Annotated[int, typer.Option(min=8)] = 224,
    native_size: Annotated[int, typer.Option(min=8, help="of the images before they are resized")] = 32,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    steps: Annotated[int, typer.Option(min=1, help="of a turn")] = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    precision: Annotated[str, typer.Option(help="of ours and of light: auto, fp32, bf16, fp16")] = "auto",
    published_precision: Annotated[str, typer.Option(help="of the published loop")] = "fp32",
) -> None:
    """Prints images per second of ours, of the published loop and of light, and their ratios."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TrialConfig.model_validate(
        {
            "backbone": {"name": backbone, "pretrained": False, "image_size": image_size},
            "dataset": {"name": "digits"},
            "optimizer": {"lr": 0.02},
            "epochs": 1,
            "batch_size": batch_size,
            "precision": precision,
        }
    )
    count = batch_size * steps
    pixels = np.random.default_rng(0).integers(0, 256, (count, native_size, native_size, 3), dtype=np.uint8)
    ours = Backbone(config.backbone, resolve_precision(precision, device), config.speed).to(device)
    plain = Backbone(config.backbone, resolve_precision(published_precision, device), PLAIN).to(device)
    names = tuple(map(str, range(CLASSES)))
    images = ArrayImages(torch.from_numpy(pixels).permute(0, 3, 1, 2), np.arange(count) % CLASSES, names)
    few = images.subset(np.arange(2))
    splits, in_precision = Splits(images, few, few), resolve_precision(precision, device)
    loaded = Loaded(ours, splits, in_precision)
    switched_off = Loaded(Backbone(config.backbone, in_precision, PLAIN).to(device), splits, in_precision)
    workers = len(os.sched_getaffinity(0))
    photos = published.Photos(pixels, np.arange(count) % CLASSES, image_size)
    loader = DataLoader(photos, batch_size, num_workers=workers, persistent_workers=True)
    theirs = published.Trial(plain, CLASSES, "lp", rank=4, prompt_lr=0.02, lr=0.02)
    turns: dict[str, Callable[[], float]] = {
        "ours": lambda: next(iter(train(config, loaded=loaded))).images_per_second,
        "plain": lambda: next(iter(train(config, loaded=switched_off))).images_per_second,
        "published": lambda: rate(theirs, loader),
        "light": lambda: light(ours, batch_size, steps),
    }
    rates = take_turns(turns, rounds)
    show(rates, f"{backbone} at {image_size}, batch {batch_size}, {loaded.precision} (published {published_precision})")


@app.command()
def memory(
    backbones: Annotated[list[str], typer.Argument(metavar="BACKBONE...", help="timm model names")],
    batch_size: Annotated[int, typer.Option(min=1, help="of training and of evaluation")] = 32,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16")] = "auto",
) -> None:
    """Prints the memory of a trial's tensors at its peak, as predicted and as measured on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = resolve_precision(precision, device)
    table = Table(box=None, title=f"MiB, batch {batch_size}, {known}, on the {device.type}", title_justify="left")
    for column in ("", "predicted", "measured", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for name in backbones:
        config = TrialConfig.model_validate(
            {
                "backbone": {"name": name, "pretrained": False},
                "dataset": {"name": "digits"},
                "epochs": 1,
                "batch_size": batch_size,
                "eval_batch_size": batch_size,
                "precision": known,
            }
        )
        predicted, measured = predict(config, CLASSES).peak, measured_peak(config, device)
        table.add_row(name, f"{predicted:.0f}", f"{measured:.0f}", f"{predicted / measured:.2f}")
    console.print(table)


def measured_peak(config: TrialConfig, device: torch.device) -> float:
    """MiB that torch's allocator has given at most, in an epoch of two steps and an evaluation on random images."""
    backbone = Backbone(config.backbone, resolve_precision(config.precision, device), config.speed).to(device)
    side = backbone.image_size
    count = max(2 * config.batch_size, config.eval_batch_size)
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    images = ArrayImages(pixels, np.arange(count) % CLASSES, tuple(map(str, range(CLASSES))))
    train_images, few = (images.subset(np.arange(n)) for n in (2 * config.batch_size, config.eval_batch_size))
    loaded = Loaded(backbone, Splits(train_images, few, few), resolve_precision(config.precision, device))
    frozen = sum(t.nbytes for t in (*backbone.parameters(), *backbone.buffers()))
    if device.type == "cuda":
        others = torch.cuda.memory_allocated(device) - frozen  # of what ran before in this process
        torch.cuda.reset_peak_memory_stats(device)
        (result,) = train(config, loaded=loaded)
        return result.peak_memory_mib - others / 2**20
    with torch.autograd.profiler.profile(profile_memory=True) as profiled:
        (_,) = train(config, loaded=loaded)
    changes = [event.nbytes() for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    return (frozen + max(itertools.accumulate(changes))) / 2**20


def take_turns(turns: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The rate of each in every round; one round before them is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(rounds + 1):
        for name, run in turns.items():
            rate = run()
            if turn:
                rates[name].append(rate)
    return rates


def show(rates: dict[str, list[float]], title: str) -> None:
    table = Table(box=None, title=title, title_justify="left")
    for column in ("", "images/s", "range"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in rates.items():
        table.add_row(name, f"{statistics.median(found):.1f}", f"{min(found):.1f} to {max(found):.1f}")
    for other in ("plain", "published", "light"):
        ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates[other], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(f"ours : {other}", f"{statistics.median(ratios):.2f}", spread)
    console.print(table)


if __name__ == "__main__":
    cli.run(app)
