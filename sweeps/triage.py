"""--triage: whether a prompt is worth it here, said before a sweep and checked after it."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lorvp.files import write_json
from sweeps.spec import Spec

YES = "a prompt is likely to beat a linear probe here"
NO = "a prompt is not likely to beat a linear probe here: the control alone takes seconds"


def record(spec: Spec) -> Path:
    return spec.folder / "triage.json"


def show(spec: Spec, console: Console) -> None:
    """Scores the example config's data and backbone on this machine, prints that, and leaves it for the sweep's end.

    Raises UserError where backbone or data can't be had.
    """
    from lorvp import training, triage  # with torch

    config = spec.trial_config(spec.example())
    found = triage.triage(config, training.load(config))
    table = Table("prompt", "LogME", "against none", box=None)
    table.add_row("none", f"{found.plain:.4f}", "")
    for name, score in found.prompted.items():
        table.add_row(name, f"{score:.4f}", f"{score - found.plain:+.4f}")
    console.print(table)
    console.print(f"log ratio of the evidences, an image: {found.log_ratio:+.4f}: {YES if found.log_ratio > 0 else NO}")
    spec.folder.mkdir(parents=True, exist_ok=True)
    write_json(record(spec), {"plain": found.plain, "prompted": found.prompted, "log_ratio": found.log_ratio})


def checked(spec: Spec, gain: float) -> list[str]:
    """What triage had said, beside the best trial's gain over the control in points of val accuracy."""
    try:
        ratio = json.loads(record(spec).read_text())["log_ratio"]
    except FileNotFoundError:
        return []
    right = (ratio > 0) == (gain > 0)
    said = "beat" if ratio > 0 else "not beat"
    outcome = f"the best prompt is {gain:+.2f} points from the control: {'right' if right else 'wrong'}"
    return [f"triage said that a prompt would {said} the linear probe ({ratio:+.4f}); {outcome}"]
