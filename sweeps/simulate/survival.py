"""python -m sweeps.simulate.survival FOLDER...: which early stopping keeps the best trial of recorded sweeps."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.table import Table

from lorvp.errors import UserError
from lorvp.utils import cli
from sweeps.report.stopping import score_curves
from sweeps.results.outcome import Outcome
from sweeps.search.survival import Survival, survival
from sweeps.spec.model import EarlyStopping, Spec

SHARES, FACTORS = (0.125, 0.25, 0.375, 0.5), (2, 3)
"""Of the table's rows: the fraction of the epochs before the first decision, and asha's reduction factor."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = cli.make_console()


def candidates(epochs: int) -> dict[str, EarlyStopping]:
    """Return the rules that are compared for trials of so many epochs, by what they are called in the table."""
    rules = {}
    for share in SHARES:
        grace = max(1, math.ceil(share * epochs))
        for factor in FACTORS:
            rules[f"asha, first decision at {share:g}, factor {factor}"] = EarlyStopping(
                rule="asha", grace_epochs=grace, reduction_factor=factor
            )
        rules[f"forecast, first decision at {share:g}"] = EarlyStopping(rule="forecast", grace_epochs=grace)
        rules[f"median, first decision at {share:g}"] = EarlyStopping(rule="median", grace_epochs=grace)
    return rules


@app.command()
def main(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="folders of sweeps without early stopping")
    ],
    orders: Annotated[int, typer.Option(min=20, help="random orders of each sweep's trials")] = 200,
    concurrent: Annotated[int, typer.Option(min=1, help="trials at a time")] = 4,
) -> None:
    """Replays the trials of each sweep in random orders under several rules of early stopping."""
    outcomes = [Outcome.read(folder) for folder in folders]
    found: dict[str, list[Survival]] = {}
    for outcome in outcomes:
        if outcome.spec.early_stopping.rule != "none":
            raise UserError(f"{outcome.spec.folder}: its trials were stopped early; early_stopping.rule must be none")
        curves = score_curves(outcome.board)
        for name, rule in candidates(outcome.spec.max_epochs()).items():
            changes = {
                "early_stopping": rule,
                "search": outcome.spec.search.model_copy(update={"concurrent": concurrent}),
            }
            spec: Spec = outcome.spec.model_copy(update=changes)
            found.setdefault(name, []).append(survival(spec, curves, orders))
    console.print(table(found, len(outcomes)))


def table(found: dict[str, list[Survival]], sweeps: int) -> Table:
    """Return a row for each rule: means over the sweeps, and the worst of them."""
    shown = Table(title=f"early stopping replayed on {sweeps} sweeps", title_justify="left", box=None)
    shown.add_column("rule")
    for column in ("best kept", "worst sweep", "one of two kept", "points lost", "epochs trained"):
        shown.add_column(column, justify="right")
    for name, rows in found.items():
        kept = [row.best for row in rows]
        shown.add_row(
            name,
            f"{100 * fmean(kept):.0f} %",
            f"{100 * min(kept):.0f} %",
            f"{100 * fmean(row.one_of_two for row in rows):.0f} %",
            f"{fmean(row.loss for row in rows):.2f}",
            f"{100 * fmean(row.cost for row in rows):.0f} %",
        )
    return shown


if __name__ == "__main__":
    cli.run(app)
