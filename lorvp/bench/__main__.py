"""Benchmark a trial: python -m lorvp.bench step|pack|augment|memory.

`step` measures the speed of the trial's loop against the published one and a roofline:

ours:       the trial's own loop, data included (`images_per_second` of its epochs).
plain:      ours with every optimization of lorvp/models/speed.py switched off.
published:  the loop of the public code (`lorvp/bench/published.py`).
light:      the roofline: forward and backward to the input, with the same backbone, precision and memory format, on one
            batch that lies on the device.

The images are pixels in memory, as in a small dataset, or with --jpegs files like ImageNet's: the published loop
decodes each in every epoch, and ours reads a store made from them before. All take turns, so that a disturbance of the
machine affects all of them.

`pack` measures trials that share each batch against one alone and as many processes at once. `augment` measures what is
done to training images on the device. `memory` measures the allocator's peak against the prediction of --dry-run.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.table import Table
from torch.utils.data import DataLoader

from lorvp.bench import published
from lorvp.config import DatasetConfig, SpeedConfig, TrialConfig
from lorvp.data import datasets, prepare
from lorvp.data.augment import augment
from lorvp.data.datasets import ArrayImages, Images, Splits
from lorvp.data.store import Store
from lorvp.estimate.memory import predict
from lorvp.models.backbone import Backbone, resolve_precision
from lorvp.models.speed import is_convolutional, keep_memory
from lorvp.result import EpochResult
from lorvp.training.loop import train, train_together
from lorvp.training.shared import SharedResources
from lorvp.training.trainer import Trainer
from lorvp.utils import cli

CLASSES = 10
_barrier: Barrier
PLAIN = SpeedConfig(**dict.fromkeys(SpeedConfig.model_fields, False))

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
console = cli.make_console()


@app.callback()
def main() -> None:
    """Benchmark a trial."""


def rate(trial: published.Trial, loader: published.Loader, images: int) -> float:
    """Measure the images per second of one pass of the public code's loop."""
    start = time.perf_counter()
    trial.epoch(loader)
    return images / (time.perf_counter() - start)


def roofline(backbone: Backbone, batch: int, steps: int) -> float:
    """Measure the images per second of forward and backward to the input alone."""
    device = backbone.mean.device
    size = backbone.image_size
    x = torch.randn(batch, 3, size, size, device=device)
    if is_convolutional(backbone.model):
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    start = time.perf_counter()
    for _ in range(steps):
        with backbone.autocast():
            output = backbone.model.forward_head(backbone.model.forward_features(x), pre_logits=True)
        torch.autograd.backward(output, torch.ones_like(output))
        x.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return batch * steps / (time.perf_counter() - start)


def with_memory_kept(on: bool, run: Callable[[], float]) -> float:
    """Call `run` with freed memory kept in the process or not, and return its result."""
    keep_memory(on)
    return run()


@app.command()
def step(
    backbone: Annotated[str, typer.Option(help="timm model name")] = "resnet18",
    image_size: Annotated[int, typer.Option(min=8)] = 224,
    native_size: Annotated[int, typer.Option(min=8, help="of the images before they are resized")] = 32,
    jpegs: Annotated[bool, typer.Option("--jpegs", help="files of 500 x 375 pixels in place of those images")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    steps: Annotated[int, typer.Option(min=1, help="of a turn")] = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    precision: Annotated[str, typer.Option(help="of ours and of light: auto, fp32, bf16, fp16")] = "auto",
    published_precision: Annotated[str, typer.Option(help="of the published loop")] = "fp32",
    each_optimization: Annotated[
        bool, typer.Option("--levers", help="also each way of lorvp/models/speed.py alone")
    ] = False,
) -> None:
    """Print images per second of ours, of the published loop and of light, and their ratios."""
    config = trial_config(backbone, image_size, batch_size, precision)
    count = batch_size * steps
    with tempfile.TemporaryDirectory(prefix="lorvp-bench-") as folder:
        images, published_images = photos(Path(folder), count, image_size) if jpegs else pixels(count, native_size)
        loader: published.Loader = DataLoader(
            published.Photos(published_images, images.labels, image_size),
            batch_size,
            num_workers=len(os.sched_getaffinity(0)),
            persistent_workers=True,
        )
        ours = load(config, images)
        compare(config, ours, loader, rounds, published_precision, each_optimization)


def compare(
    config: TrialConfig,
    ours: SharedResources,
    loader: published.Loader,
    rounds: int,
    published_precision: str,
    each_optimization: bool,
) -> None:
    """Print the table of `step`. `loader` yields the images for the published loop."""
    device, count = ours.backbone.mean.device, len(ours.splits.train)
    plain = Backbone(config.backbone, resolve_precision(published_precision, device), PLAIN).to(device)
    switched_off = replace(ours, backbone=Backbone(config.backbone, ours.precision, PLAIN).to(device))
    published_trial = published.Trial(plain, CLASSES, "lp", rank=4, prompt_lr=0.02, lr=0.02)
    turns: dict[str, Callable[[], float]] = {
        "ours": partial(with_memory_kept, True, partial(trained, config, ours)),
        "plain": partial(with_memory_kept, False, partial(trained, config, switched_off)),
        "published": partial(with_memory_kept, False, partial(rate, published_trial, loader, count)),
        "light": partial(
            with_memory_kept, True, partial(roofline, ours.backbone, config.batch_size, count // config.batch_size)
        ),
    }
    for key in SpeedConfig.model_fields if each_optimization else ():
        speed = PLAIN.model_copy(update={key: True})
        alone = replace(ours, backbone=Backbone(config.backbone, ours.precision, speed).to(device))
        turns[key] = partial(with_memory_kept, speed.keep_memory, partial(trained, config, alone))
    rates = take_turns(turns, rounds)
    ratios = [("ours", other) for other in ("plain", "published", "light")]
    ratios += [(key, "plain") for key in turns if key in SpeedConfig.model_fields]
    show(rates, ratios, f"{title(config, ours)} (published {published_precision})")


@app.command()
def pack(
    backbone: Annotated[str, typer.Option(help="timm model name")] = "resnet18",
    image_size: Annotated[int, typer.Option(min=8)] = 224,
    native_size: Annotated[int, typer.Option(min=8, help="of the images before they are resized")] = 32,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    steps: Annotated[int, typer.Option(min=1, help="of a turn")] = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16")] = "auto",
    most: Annotated[int, typer.Option(min=2, help="trials at a time, at most")] = 8,
) -> None:
    """Print images per second, times trials, of trials that share each batch and of as many processes at once."""
    config = trial_config(backbone, image_size, batch_size, precision)
    loaded = synthetic(config, native_size, steps)
    counts = [2**n for n in range(most.bit_length()) if 2**n <= most]
    turns = {f"packed {count}": partial(trained, config, loaded, count) for count in counts}
    turns |= {f"processes {count}": partial(side_by_side, config, native_size, steps, count) for count in counts[1:]}
    rates = take_turns(turns, rounds)
    show(rates, [(name, "packed 1") for name in turns if name != "packed 1"], title(config, loaded))


@app.command("augment")
def augmentations(
    image_size: Annotated[int, typer.Option(min=8)] = 224,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    steps: Annotated[int, typer.Option(min=1, help="of a turn")] = 4,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Print images per second of each augmentation alone, and their ratios to crop and flip."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"crop_flip": True, "trivial_augment": True, "color_jitter": 0.4}
    turns: dict[str, Callable[[], float]] = {}
    for key, value in options.items():
        side = datasets.crop_size(image_size) if key == "crop_flip" else image_size
        images = pixels(batch_size, side)[0].read(np.arange(batch_size)).to(device)
        config = DatasetConfig.model_validate({"name": "digits", key: value})
        turns[key] = partial(with_memory_kept, True, partial(augmented, config, images, image_size, steps))
    ratios = [(key, "crop_flip") for key in options if key != "crop_flip"]
    show(take_turns(turns, rounds), ratios, f"at {image_size}, batch {batch_size}, {device_title(device)}")


def augmented(config: DatasetConfig, images: torch.Tensor, size: int, steps: int) -> float:
    """Measure the images per second of an augmentation, each time with other draws."""
    start = time.perf_counter()
    for step in range(steps):
        augment(images, size, config, np.arange(len(images)), step)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return steps * len(images) / (time.perf_counter() - start)


def trial_config(backbone: str, image_size: int, batch_size: int, precision: str) -> TrialConfig:
    """Make the config of a trial with random weights and one epoch."""
    return TrialConfig.model_validate(
        {
            "backbone": {"name": backbone, "pretrained": False, "image_size": image_size},
            "dataset": {"name": "digits"},
            "optimizer": {"lr": 0.02},
            "epochs": 1,
            "batch_size": batch_size,
            "precision": precision,
        }
    )


def pixels(count: int, size: int) -> tuple[Images, np.ndarray]:
    """Draw random images for our loop, and return the same for the published loop, (N, H, W, 3) uint8."""
    drawn = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    names = tuple(map(str, range(CLASSES)))
    return ArrayImages(torch.from_numpy(drawn).permute(0, 3, 1, 2), np.arange(count) % CLASSES, names), drawn


def photos(folder: Path, count: int, size: int) -> tuple[Images, list[Path]]:
    """Make JPEG files in `folder` and a store of them at `size`; return both, in the same order."""
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / "images" / f"class{i % CLASSES}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        jpeg(random, path)
    opened = Store.open(prepare.prepare("image_folder", folder / "images", folder, size=size))
    images = datasets.store_images(opened, "train", size)
    return images, [folder / "images" / name for name in images.split.names]


def jpeg(random: np.random.Generator, path: Path) -> None:
    """Write a JPEG of 500 x 375 pixels and 100 KB, like ImageNet's."""
    small = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC))
    grain = random.normal(0, 16, (375, 500, 1))
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(path, quality=90)


def load(config: TrialConfig, images: Images) -> SharedResources:
    """Load the backbone, with `images` to train on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(config.precision, device)
    few = images.subset(np.arange(2))
    return SharedResources(
        Backbone(config.backbone, precision, config.speed).to(device), Splits(images, few, few), precision
    )


def synthetic(config: TrialConfig, native_size: int, steps: int) -> SharedResources:
    """Load the backbone, with random images for so many steps."""
    return load(config, pixels(config.batch_size * steps, native_size)[0])


def title(config: TrialConfig, loaded: SharedResources) -> str:
    """Return the title of a table: backbone, size, batch, precision and device."""
    name, size = device_title(loaded.backbone.mean.device), loaded.backbone.image_size
    return f"{config.backbone.name} at {size}, batch {config.batch_size}, {loaded.precision}, {name}"


def device_title(device: torch.device) -> str:
    """Return the GPU's name, or the number of the CPU's threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"


def trained(config: TrialConfig, loaded: SharedResources, count: int = 1) -> float:
    """Measure the images per second of an epoch of the trial's loop, times the trials that share it."""
    waiting = [Trainer(config, loaded) for _ in range(count)]
    results = train_together(lambda _: [waiting.pop() for _ in list(waiting)])
    return count * min(result.images_per_second for _, result in results if isinstance(result, EpochResult))


def side_by_side(config: TrialConfig, native_size: int, steps: int, count: int) -> float:
    """Measure the images per second of `count` processes at once, which share the cores; start-up is not counted."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(count)
    threads = max(1, torch.get_num_threads() // count)
    with spawn.Pool(count, _set_barrier, (barrier, threads)) as pool:
        return sum(pool.starmap(_measure_in_process, [(config, native_size, steps)] * count, chunksize=1))


def _set_barrier(barrier: Barrier, threads: int) -> None:
    global _barrier
    _barrier = barrier
    torch.set_num_threads(threads)


def _measure_in_process(config: TrialConfig, native_size: int, steps: int) -> float:
    loaded = synthetic(config, native_size, steps)
    trained(config, loaded)
    _barrier.wait()
    return trained(config, loaded)


@app.command()
def memory(
    backbones: Annotated[list[str], typer.Argument(metavar="BACKBONE...", help="timm model names")],
    method: Annotated[list[str], typer.Option(help="a preset of a trial, one or several")] = ["lorvp"],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=1, help="of vpt and vqt")] = 10,
    optimizer: Annotated[str, typer.Option(help="sgd, adam, adamw")] = "sgd",
    batch_size: Annotated[int, typer.Option(min=1, help="of training and of evaluation")] = 32,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16")] = "auto",
) -> None:
    """Print the peak memory of a trial's tensors, as predicted and as measured on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = resolve_precision(precision, device)
    table = Table(box=None, title=f"MiB, batch {batch_size}, {known}, on the {device.type}", title_justify="left")
    for column in ("", "predicted", "measured", "ratio", "optimizer's"):
        table.add_column(column, justify="left" if not column else "right")
    for name, kind in itertools.product(backbones, method):
        config = TrialConfig.model_validate(
            {
                "method": kind,
                "backbone": {"name": name, "pretrained": False},
                "adapter": {"count": tokens} if kind.endswith(("vpt", "vqt")) else {},
                "optimizer": {"name": optimizer},
                "dataset": {"name": "digits"},
                "epochs": 1,
                "batch_size": batch_size,
                "eval_batch_size": batch_size,
                "precision": known,
            }
        )
        predicted, (measured, state) = predict(config, CLASSES).peak, measured_peak(config, device)
        cells = f"{predicted:.0f}", f"{measured:.0f}", f"{predicted / measured:.2f}", f"{state:.2f}"
        table.add_row(f"{name}, {kind}", *cells)
    console.print(table)


def measured_peak(config: TrialConfig, device: torch.device) -> tuple[float, float]:
    """Measure the peak MiB of torch's allocator, and the MiB of the optimizers' state.

    The trial runs an epoch of two steps and an evaluation on random images.
    """
    backbone = Backbone(config.backbone, resolve_precision(config.precision, device), config.backbone_speed).to(device)
    side = backbone.image_size
    count = max(2 * config.batch_size, config.eval_batch_size)
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    images = ArrayImages(pixels, np.arange(count) % CLASSES, tuple(map(str, range(CLASSES))))
    train_images, few = (images.subset(np.arange(n)) for n in (2 * config.batch_size, config.eval_batch_size))
    loaded = SharedResources(backbone, Splits(train_images, few, few), resolve_precision(config.precision, device))
    frozen = sum(t.nbytes for t in (*backbone.parameters(), *backbone.buffers()))
    if device.type == "cuda":
        others = torch.cuda.memory_allocated(device) - frozen  # memory of earlier runs in this process
        torch.cuda.reset_peak_memory_stats(device)
        (result,) = train(config, shared=loaded)
        return result.peak_memory_mib - others / 2**20, result.optimizer_state_mib
    with torch.autograd.profiler.profile(profile_memory=True) as profiled:
        (result,) = train(config, shared=loaded)
    changes = [event.nbytes() for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    return (frozen + max(itertools.accumulate(changes))) / 2**20, result.optimizer_state_mib


def take_turns(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure the rate of each in every round, after one round that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(rounds + 1):
        for name, run in turns.items():
            rate = run()
            if turn:
                rates[name].append(rate)
    return rates


def show(rates: dict[str, list[float]], ratios: list[tuple[str, str]], heading: str) -> None:
    """Print the median and range of the rates and of their ratios."""
    table = Table(box=None, title=heading, title_justify="left")
    for column in ("", "images/s", "range"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in rates.items():
        table.add_row(name, f"{statistics.median(values):.1f}", f"{min(values):.1f} to {max(values):.1f}")
    for ours, other in ratios:
        values = [one / another for one, another in zip(rates[ours], rates[other], strict=True)]
        table.add_row(
            f"{ours} : {other}", f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"
        )
    console.print(table)


if __name__ == "__main__":
    cli.run(app)
