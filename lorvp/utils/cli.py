"""What the commands have in common: where they print, and how bad input ends them."""

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
"""Columns of a file or a pipe: no row of a table is folded there."""


def make_console() -> Console:
    """Of a command's output, which is as wide as its terminal."""
    terminal = sys.stdout.isatty()
    return Console(width=None if terminal else NO_TERMINAL, soft_wrap=not terminal)


def say(error: UserError) -> None:
    Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)


def run(app: typer.Typer) -> None:
    """Carries out a command; bad input is one line on stderr, with exit code 2."""
    give_libraries_caches()
    try:
        app()
    except UserError as error:
        say(error)
        raise SystemExit(2) from None
