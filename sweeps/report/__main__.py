"""python -m sweeps.report SWEEP: what a sweep found, as one HTML file and as pictures, in the sweep's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorvp.errors import UserError
from lorvp.utils import cli
from sweeps.report.page import write
from sweeps.results.outcome import Outcome

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = cli.make_console()


@app.command()
def command(
    folder: Annotated[Path, typer.Argument(metavar="SWEEP", help="the folder of a sweep that has ended")],
) -> None:
    """Writes report.html and report/*.png into a sweep's folder."""
    outcome = Outcome.read(folder)
    try:
        console.print(f"written: {write(outcome)}", highlight=False)
    except OSError as error:
        raise UserError(f"{folder}: the report can't be written ({error.strerror})") from None


if __name__ == "__main__":
    cli.run(app)
