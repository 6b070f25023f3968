"""Share between commands where they print and how they end on bad input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lorvp.errors import UserError
from lorvp.utils.files import give_libraries_caches

Module = Annotated[Path | None, typer.Option(help="the file that registers the bundle's backbone: it is run")]
NO_TERMINAL = 400
"""Width in columns of output that goes to a file or a pipe, so that no row of a table is folded there."""


def make_console() -> Console:
    """Make the console for a command's output, as wide as its terminal."""
    terminal = sys.stdout.isatty()
    return Console(width=None if terminal else NO_TERMINAL, soft_wrap=not terminal)


def print_error(error: UserError) -> None:
    """Print an error as one red line on stderr."""
    Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)


def run(app: typer.Typer) -> None:
    """Run a command. Bad input becomes one line on stderr and exit code 2."""
    give_libraries_caches()
    try:
        app()
    except UserError as error:
        print_error(error)
        raise SystemExit(2) from None
