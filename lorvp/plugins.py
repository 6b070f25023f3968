"""Choices found by file name: `lorvp/prompts/low_rank.py` is `prompt.kind: low_rank`, and so on.

Names are listed without importing anything, so that a spec is checked where there is no torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path


def names(folder: str) -> list[str]:
    """The choices in `lorvp/FOLDER`, a module each."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / folder)]))


def load(folder: str, name: str) -> type:
    """The class that `lorvp/FOLDER/NAME.py` defines: the only one in it without a leading underscore."""
    module = importlib.import_module(f"lorvp.{folder}.{name}")
    (found,) = (
        value
        for key, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__ and not key.startswith("_")
    )
    return found
