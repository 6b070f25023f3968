"""What the control costs; prints a table of docs/benchmarks.md.

    python tests/benchmarks/bench_probe.py [--images N] [--features D] [--classes K] [--threads T] [--rounds R]

new: `probe.head` with fit "best": 50 values of C, as far as val does not fall.
all: the same without an early end.
old: the 50 heads by L-BFGS in the features' own coordinates, each from the one before, at most 100 iterations each.

The features are made here: rectified Gaussians whose deviations fall as the spectrum of a backbone's features does,
with a tenth of the labels changed. A ninth more images are made for val. All take turns, on a GPU where there is one.
Seconds are those of the CPU, so that other jobs on the machine hardly change them, and on a GPU those that pass.
With --only-new the others are left out: `old` takes hours where there are many images and classes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import functional as F

from lorvp.data.datasets import ArrayImages
from lorvp.features import probe


def features(images: int, width: int, classes: int) -> tuple[ArrayImages, ArrayImages]:
    """Make training and validation features."""
    random = torch.Generator().manual_seed(0)
    count = images + images // 9
    deviations = torch.arange(1, width + 1).float().pow(-0.6)
    centres = 0.5 * torch.randn(classes, width, generator=random) * deviations
    labels = torch.randint(classes, (count,), generator=random)
    x = centres[labels] + torch.randn(count, width, generator=random) * deviations
    x = 3 * x.add_(0.1).relu_()
    changed = torch.rand(count, generator=random) < 0.1
    labels[changed] = torch.randint(classes, (int(changed.sum()),), generator=random)
    every = ArrayImages(x, labels.numpy(), tuple(map(str, range(classes))))
    return every.subset(np.arange(images)), every.subset(np.arange(images, count))


def by_plain_lbfgs(train: ArrayImages, val: ArrayImages, device: torch.device) -> float:
    """Fit a head for each C from the one before; return the best top-1 on val."""
    x, labels = train.pixels.to(device), torch.from_numpy(train.labels).to(device)
    val_x, val_labels = val.pixels.to(device), torch.from_numpy(val.labels).to(device)
    mean = x.mean(0)
    weight = x.new_zeros(len(train.class_names), x.shape[1]).requires_grad_()
    bias = x.new_zeros(len(train.class_names)).requires_grad_()
    best = 0.0
    for c in probe.CS:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=probe.ITERATIONS, line_search_fn="strong_wolfe")

        def objective(c: float = c, optimizer: torch.optim.LBFGS = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            total = weight.square().sum() / (2 * c * len(x))
            torch.autograd.backward(total)
            for rows, row_labels in zip(x.split(probe.ROWS_AT_ONCE), labels.split(probe.ROWS_AT_ONCE), strict=True):
                loss = F.cross_entropy(F.linear(rows - mean, weight, bias), row_labels, reduction="sum") / len(x)
                torch.autograd.backward(loss)
                total = total + loss
            return total.detach()

        optimizer.step(objective)
        with torch.no_grad():
            best = max(best, probe.accuracy((weight, bias - weight @ mean), val_x, val_labels))
    return best


def by_head(train: ArrayImages, val: ArrayImages, device: torch.device, to_the_end: bool) -> float:
    """Choose the head among all values of C; return its top-1 on val."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, LORVP_CACHE=folder):
        has_fallen = (lambda *_: False) if to_the_end else probe.Scan.has_fallen
        with patch.object(probe.Scan, "has_fallen", has_fallen):
            head = probe.head(train, val, "best", device)
    return probe.accuracy(head, val.pixels.to(device), torch.from_numpy(val.labels).to(device))


def counted(run: Callable[[], float], device: torch.device) -> tuple[float, float, int]:
    """Return the top-1 that `run` gives, its seconds, and how often it went through the features."""
    passes = 0
    one_pass, cross_entropy = probe.HeadPath._pass, F.cross_entropy

    def count(what: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            nonlocal passes
            passes += what is one_pass or options.get("reduction") == "sum"
            return what(*args, **options)

        return call

    with patch.object(probe.HeadPath, "_pass", count(one_pass)), patch.object(F, "cross_entropy", count(cross_entropy)):
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        start = clock()
        top1 = run()
        seconds = clock() - start
    return top1, seconds, passes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 20_000), ("features", 512), ("classes", 200), ("threads", 1), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only-new", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, val = features(options.images, options.features, options.classes)
    turns: dict[str, Callable[[], float]] = {"new": lambda: by_head(train, val, device, to_the_end=False)}
    if not options.only_new:
        turns["all"] = lambda: by_head(train, val, device, to_the_end=True)
        turns["old"] = lambda: by_plain_lbfgs(train, val, device)
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in turns}
    for _ in range(options.rounds):
        for name, run in turns.items():
            found[name].append(counted(run, device))
    place = device.type if device.type == "cuda" else f"{options.threads} threads"
    print(f"{options.images:,} images, {options.features} features, {options.classes} classes, {place}")
    print("| | seconds | passes | val top-1 | old / this |\n|---|---|---|---|---|")
    for name, runs in found.items():
        top1, _, passes = runs[0]
        seconds = [run[1] for run in runs]
        ratios = [old[1] / run[1] for old, run in zip(found.get("old", []), runs, strict=False)]
        ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})" if ratios else "-"
        print(f"| {name} | {statistics.median(seconds):.1f} | {passes} | {top1:.2f} | {ratio} |")


if __name__ == "__main__":
    main()
