"""What a low-rank prompt is worth over a fitted linear probe, on near and far data; prints docs/results.md's table.

    python tests/benchmarks/bench_gain.py --data DATA --weights WEIGHTS --out OUT

DATA holds cifar10.zip, imagenette.zip, mnist.zip and sign_digits.zip, each of train/CLASS/* and test/CLASS/* or
val/CLASS/*; WEIGHTS holds mobilenetv1_025_128.safetensors and mobilenetv2_100.safetensors. scikit-learn's digits are
always among the sets. For each backbone and set two sweeps are run, `gain/ours.yaml` and `gain/published.yaml`, at 64
px and on at most 100 training images of each class; a sweep that has ended is not run again. All of it takes 2 hours on
one core.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lorvp.utils import cli
from sweeps.results.comparison import METRICS, Row
from sweeps.results.leaderboard import number
from sweeps.results.outcome import Outcome

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

HERE = Path(__file__).parent / "gain"
ROOT = Path(__file__).parents[2]
SIDE = 64
FAR, NEAR = ("sign_digits", "digits", "mnist"), ("cifar10", "imagenette")
EPOCHS = {"v1": 40, "v2": 16}
TRIALS = {"v1": 24, "v2": 12}


class Net(StrEnum):
    """MobileNetV1 x0.25 and MobileNetV2, both pretrained on ImageNet-1K."""

    V1 = "v1"
    V2 = "v2"


def backbone(net: Net, weights: Path) -> dict[str, Any]:
    half = [0.5, 0.5, 0.5]
    if net == Net.V1:
        module, file = str(HERE / "backbones.py"), "mobilenetv1_025_128.safetensors"
        own: dict[str, Any] = {"name": "mobilenetv1_025", "module": module}
    else:
        own, file = {"name": "mobilenetv2_100", "kwargs": {"pad_type": "same"}}, "mobilenetv2_100.safetensors"
    return own | {"checkpoint": str(weights / file), "image_size": SIDE, "mean": half, "std": half}


def dataset(name: str, data: Path, out: Path) -> dict[str, Any]:
    """Return the set's key in a spec; its store is made where it is missing."""
    common = {"max_per_class": 100, "val_fraction": 0.3}
    if name == "digits":
        return common | {"name": "digits"}
    store = out / "stores" / f"{name}-{SIDE}"
    if not store.exists():
        raw = out / "raw" / name
        zipfile.ZipFile(data / f"{name}.zip").extractall(raw)
        prepare = ["prepare", "image_folder", "--source", raw, "--out", store.parent, "--size", SIDE, "--name", name]
        subprocess.run([sys.executable, "-m", "lorvp.data", *map(str, prepare)], check=True, cwd=ROOT)
    return common | {"name": "store", "root": str(store)}


def sweep(kind: str, net: Net, name: str, data: Path, weights: Path, out: Path) -> Outcome:
    """Run a sweep to its end and read it."""
    folder = out / "runs" / f"{kind}_{net}_{name}"
    if not (folder / "comparison.parquet").exists():
        values = {
            "name": folder.name,
            "output": folder.parent,
            "trial.backbone": backbone(net, weights),
            "trial.dataset": dataset(name, data, out),
            "trial.epochs": EPOCHS[net],
        }
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


@app.command()
def main(
    data: Annotated[Path, typer.Option(exists=True, resolve_path=True, help="folder of the zip files")],
    weights: Annotated[Path, typer.Option(exists=True, resolve_path=True, help="folder of the two checkpoints")],
    out: Annotated[Path, typer.Option(resolve_path=True, help="folder for stores and sweeps")],
    nets: Annotated[list[Net] | None, typer.Option("--net", help="default: both")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="default: all five")] = None,
) -> None:
    """Prints a Markdown row for each backbone, set and recipe."""
    out.mkdir(parents=True, exist_ok=True)
    columns = ("backbone", "set", "recipe", "control val", "control test", "val", "test", "gain in test", "config")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for net in nets or list(Net):
        for name in sets or [*FAR, *NEAR]:
            for kind in ("ours", "published"):
                outcome = sweep(kind, net, name, data, weights, out)
                print(f"| {' | '.join(cells(kind, net, name, outcome))} |", flush=True)


if __name__ == "__main__":
    cli.run(app)
