"""How the package's commands end: bad input in one line on stderr, with exit code 2."""

from __future__ import annotations

import typer
from rich.console import Console

from lorvp.errors import UserError


def run(app: typer.Typer) -> None:
    try:
        app()
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise SystemExit(2) from None
