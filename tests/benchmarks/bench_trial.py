"""What a fitted head and streamed counts do to a trial; prints the tables of docs/benchmarks.md.

    python tests/benchmarks/bench_trial.py --photos CIFAR10 --photos IMAGENETTE --weights mobilenetv2_100.safetensors
    python tests/benchmarks/bench_trial.py --photos CIFAR10 --photos IMAGENETTE --weights ... --table ilm

All of it takes hours; --table and --row ask for a part.

Each folder holds train/CLASS/* and test/CLASS/* (or val/). scikit-learn's digits, far from any photo, are always among
the sets. Two backbones: the quickstart's at 32 px, and MobileNetV2, pretrained on ImageNet, at 96 px.

warm: epochs that a warm start needs to a cold start's final val accuracy, and its own final one, by how far the head is
fitted first (`head.fit`); the prompt by Adam, all else as published.
ilm: the final val accuracy with counts from the training passes (`head.counting: streamed`), against passes of their
own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lorvp.config import TrialConfig
from lorvp.training import loop
from lorvp.training.shared import SharedResources
from lorvp.utils import cli

SEEDS = (0, 1, 2)
HEAD_LR = 0.1
FITS: tuple[float | str, ...] = (1e-4, 1e-3, 1e-2, "80%", "90%", "best")


def backbones(weights: Path) -> dict[str, dict[str, Any]]:
    half = (0.5, 0.5, 0.5)
    mobile = {"name": "mobilenetv2_100", "checkpoint": str(weights), "kwargs": {"pad_type": "same"}}
    return {
        "tiny (CIFAR-10)": {"name": "lorvp_tiny_32.cifar10"},
        "MobileNetV2 (ImageNet)": mobile | {"image_size": 96, "mean": half, "std": half},
    }


def sets(photos: list[Path], images: int) -> dict[str, dict[str, Any]]:
    few = {"max_per_class": images // 10, "val_fraction": 0.2}
    by_name = {folder.name: {"name": "image_folder", "root": str(folder)} | few for folder in photos}
    return {"digits": {"name": "digits"} | few} | by_name


def curve(values: dict[str, Any], loaded: SharedResources) -> list[float]:
    """Val accuracy, best so far, epoch by epoch."""
    best: list[float] = []
    for result in loop.train(TrialConfig.model_validate(values), shared=loaded):
        best.append(max([result.val_top1, *best[-1:]]))
    return best


def mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def warm(base: dict[str, Any], loaded: SharedResources) -> list[str]:
    """Of one set and backbone: cold, then each fit."""
    cold = [curve(base | {"head": {"lr": HEAD_LR}, "init_seed": s, "order_seed": s}, loaded) for s in SEEDS]
    cells = [mean([each[-1] for each in cold])]
    for fit in FITS:
        warm_start = base | {"head": {"init": "fitted", "fit": fit, "lr": HEAD_LR}}
        started = [curve(warm_start | {"init_seed": s, "order_seed": s}, loaded) for s in SEEDS]
        needed = [
            next((epoch for epoch, got in enumerate(each, 1) if got >= goal[-1]), None)
            for each, goal in zip(started, cold, strict=True)
        ]
        shown = ", ".join("-" if epoch is None else str(epoch) for epoch in needed)
        cells.append(f"{mean([each[-1] for each in started])} ({shown})")
    return cells


def ilm(base: dict[str, Any], loaded: SharedResources) -> list[str]:
    """Of one set and backbone: passes of their own, streamed, and the difference seed by seed."""
    own, streamed = (
        [curve(base | {"head": head, "init_seed": s, "order_seed": s}, loaded)[-1] for s in SEEDS]
        for head in ({"kind": "ilm", "counting": way} for way in ("pass", "streamed"))
    )
    return [mean(own), mean(streamed), mean([ours - theirs for ours, theirs in zip(streamed, own, strict=True)])]


TABLES: dict[str, tuple[list[str], Callable[[dict[str, Any], SharedResources], list[str]]]] = {
    "warm": (["cold", *map(str, FITS)], warm),
    "ilm": (["ilm: pass", "ilm: streamed", "difference"], ilm),
}


def main(
    photos: Annotated[list[Path], typer.Option(exists=True, help="folders of images")],
    weights: Annotated[Path, typer.Option(exists=True, help="of mobilenetv2_100, safetensors")],
    epochs: Annotated[int, typer.Option(min=2)] = 10,
    images: Annotated[int, typer.Option(min=80, help="of ten classes, to train on and to choose by")] = 800,
    tables: Annotated[list[str], typer.Option("--table", help="; ".join(TABLES))] = list(TABLES),  # noqa: B006
    row: Annotated[str, typer.Option(help="only rows whose `set, backbone` has this in it")] = "",
) -> None:
    """Prints the tables."""
    for name in tables:
        columns, cells = TABLES[name]
        print(f"| set, backbone | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}", flush=True)
        for model, backbone in backbones(weights).items():
            for data, dataset in sets(photos, images).items():
                if row not in f"{data}, {model}":
                    continue
                base = {
                    "backbone": backbone,
                    "dataset": dataset,
                    "epochs": epochs,
                    "batch_size": 64,
                    "prompt": {"optimizer": "adam", "lr": 0.01},
                }
                loaded = loop.load(TrialConfig.model_validate(base))
                print(f"| {data}, {model} | {' | '.join(cells(base, loaded))} |", flush=True)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    cli.run(app)
