"""What a low-rank prompt is worth over a fitted linear probe, on near and far data; prints docs/results.md's table.

    python tests/benchmarks/bench_gain.py --data DATA --weights WEIGHTS --out OUT

DATA holds cifar10.zip, imagenette.zip, mnist.zip and sign_digits.zip, each of train/CLASS/* and test/CLASS/* or
val/CLASS/*; WEIGHTS holds mobilenetv1_025_128.safetensors and mobilenetv2_100.safetensors. scikit-learn's digits are
always among the sets. For each backbone and set two sweeps are run, `gain/ours.yaml` and `gain/published.yaml`, at 64
px and on at most 100 images of each class, 30 of them to choose by; a sweep that has ended is not run again. All of it
takes 2 hours on one core. `--table head` runs `gain/head.yaml` in their place.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from lorvp.utils import cli
from sweeps.results.comparison import METRICS, Row
from sweeps.results.leaderboard import Entry, number
from sweeps.results.outcome import Outcome

COLUMNS = {
    "gain": ["recipe", "control val", "control test", "val", "test", "gain in test", "config"],
    "head": ["head", "n", "val", "test", "gain in test"],
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

HERE = Path(__file__).parent / "gain"
ROOT = Path(__file__).parents[2]
FAR, NEAR = ("sign_digits", "digits", "mnist"), ("cifar10", "imagenette")
SIDE = {"tiny": 32, "v1": 64, "v2": 64}
EPOCHS = {"tiny": 40, "v1": 40, "v2": 16}
TRIALS = {"tiny": 24, "v1": 24, "v2": 12}


class Net(StrEnum):
    """The quickstart's, which has seen CIFAR-10 alone; MobileNetV1 x0.25 and MobileNetV2, pretrained on ImageNet-1K."""

    TINY = "tiny"
    V1 = "v1"
    V2 = "v2"


def backbone(net: Net, weights: Path) -> dict[str, Any]:
    if net == Net.TINY:
        return {"name": "lorvp_tiny_32.cifar10"}
    half = [0.5, 0.5, 0.5]
    if net == Net.V1:
        module, file = str(HERE / "backbones.py"), "mobilenetv1_025_128.safetensors"
        own: dict[str, Any] = {"name": "mobilenetv1_025", "module": module}
    else:
        own, file = {"name": "mobilenetv2_100", "kwargs": {"pad_type": "same"}}, "mobilenetv2_100.safetensors"
    return own | {"checkpoint": str(weights / file), "image_size": SIDE[net], "mean": half, "std": half}


def dataset(name: str, side: int, data: Path, out: Path) -> dict[str, Any]:
    """Return the set's key in a spec; its store is made where it is missing."""
    common = {"max_per_class": 100, "val_fraction": 0.3}
    if name == "digits":
        return common | {"name": "digits"}
    store = out / "stores" / f"{name}-{side}"
    if not store.exists():
        raw = out / "raw" / name
        zipfile.ZipFile(data / f"{name}.zip").extractall(raw)
        prepare = ["prepare", "image_folder", "--source", raw, "--out", store.parent, "--size", side, "--name", name]
        subprocess.run([sys.executable, "-m", "lorvp.data", *map(str, prepare)], check=True, cwd=ROOT)
    return common | {"name": "store", "root": str(store)}


def sweep(kind: str, net: Net, name: str, data: Path, weights: Path, out: Path) -> Outcome:
    """Run a sweep to its end and read it."""
    folder = out / "runs" / f"{kind}_{net}_{name}"
    if not (folder / "results.parquet").exists():
        values = {
            "name": folder.name,
            "output": folder.parent,
            "trial.backbone": backbone(net, weights),
            "trial.dataset": dataset(name, SIDE[net], data, out),
        }
        if kind != "head":
            values["trial.epochs"] = EPOCHS[net]
        if kind == "ours":
            values["search.trials"] = TRIALS[net]
        options = [f"--set={key}={json.dumps(value, default=str)}" for key, value in values.items()]
        command = [sys.executable, "sweeps/launch.py", str(HERE / f"{kind}.yaml"), *options]
        with (out / f"{folder.name}.log").open("w") as log:
            subprocess.run(command, check=True, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    return Outcome.read(folder)


def cells(kind: str, net: Net, name: str, outcome: Outcome) -> list[str]:
    """Return a row of the table: the confirmed best, and its test top-1 less the control's."""
    comparison = outcome.comparison
    assert comparison is not None  # both specs confirm
    best, control = comparison.best_row(), comparison.control
    assert best is not None
    assert control is not None
    val, test = METRICS["val"], METRICS["test"]
    shown = [control.spread(val), control.spread(test), best.spread(val), best.spread(test)]
    return [net, name, kind, *map(str, shown), str(best.difference(control, test)), short(outcome, best)]


def short(outcome: Outcome, best: Row) -> str:
    """Return the values of a config on the axes of its sweep."""
    names, params = outcome.spec.short_names(), best.entries[0].params
    return " ".join(f"{names[axis]}={number(params[axis])}" for axis in outcome.spec.space if axis in params)


def head_rows(net: Net, name: str, outcome: Outcome) -> Iterator[list[str]]:
    """Yield a row for each start of the head: means over seeds of val and test top-1, and test less the control's."""
    variants: dict[str, list[Entry]] = {}
    for entry in outcome.board.search_entries():
        values = {key: value for key, value in entry.params.items() if key != "init_seed"}
        shown = " ".join(f"{outcome.spec.short_names()[key]}={number(value)}" for key, value in values.items())
        variants.setdefault(shown, []).append(entry)
    control = outcome.board.best(control=True)
    assert control is not None
    for shown, entries in sorted(variants.items()):
        val, test = (fmean(METRICS[metric](entry) or 0.0 for entry in entries) for metric in ("val", "test"))
        gain = test - (METRICS["test"](control) or 0.0)
        yield [net, name, shown, str(len(entries)), f"{val:.2f}", f"{test:.2f}", f"{gain:+.2f}"]


class Part(StrEnum):
    """The table to print."""

    GAIN = "gain"
    HEAD = "head"


@app.command()
def main(
    data: Annotated[Path, typer.Option(exists=True, resolve_path=True, help="folder of the zip files")],
    weights: Annotated[Path, typer.Option(exists=True, resolve_path=True, help="folder of the two checkpoints")],
    out: Annotated[Path, typer.Option(resolve_path=True, help="folder for stores and sweeps")],
    nets: Annotated[list[Net] | None, typer.Option("--net", help="default: v1 and v2")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="default: all five")] = None,
    part: Annotated[Part, typer.Option("--table")] = Part.GAIN,
) -> None:
    """Prints a Markdown row for each backbone, set and recipe, or start of the head."""
    out.mkdir(parents=True, exist_ok=True)
    columns = ["backbone", "set", *COLUMNS[part]]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for net, name in itertools.product(nets or [Net.V1, Net.V2], sets or [*FAR, *NEAR]):
        if part == Part.HEAD:
            rows = [*head_rows(net, name, sweep("head", net, name, data, weights, out))]
        else:
            kinds = ("ours", "published")
            rows = [cells(kind, net, name, sweep(kind, net, name, data, weights, out)) for kind in kinds]
        for row in rows:
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    cli.run(app)
