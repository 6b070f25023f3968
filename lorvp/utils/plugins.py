"""Choices found by file name: `lorvp/prompts/low_rank.py` is `prompt.kind: low_rank`, and so on; and files of the
user's own.

Names are listed without importing anything, so that a spec is checked where there is no torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

from lorvp.errors import UserError
from lorvp.utils.paths import ROOT

COPIES = ROOT / "own"
"""Where a copy of this code that was made for jobs has the files that they are to run."""


SHARED = "base"
"""The module of such a folder that is no choice, and holds what the others share."""


@functools.cache
def names(folder: str) -> tuple[str, ...]:
    """The choices in `lorvp/FOLDER`, a module each; asked for with every config."""
    modules = pkgutil.iter_modules([str(ROOT / "lorvp" / folder)])
    return tuple(sorted(module.name for module in modules if module.name != SHARED))


def load(folder: str, name: str) -> type:
    """The class that `lorvp/FOLDER/NAME.py` defines: the only one in it without a leading underscore."""
    module = importlib.import_module(f"lorvp.{folder}.{name}")
    (found,) = (
        value
        for key, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__ and not key.startswith("_")
    )
    return found


def copy_of(path: Path, copies: Path = COPIES) -> Path:
    """Where the copy of a user's file belongs."""
    return copies / hashlib.sha256(str(path).encode()).hexdigest()[:12] / path.name


def run_file(path: Path) -> None:
    """Imports a user's file, for what it registers: the copy of it, where this code is one that was made for jobs.

    Once in a process, unless its text has changed. Raises UserError for a file that can't be read, and for what it
    raises.
    """
    found = copy_of(path) if copy_of(path).exists() else path
    try:
        text = found.read_bytes()
    except OSError as error:
        raise UserError(f"backbone.module: {path} can't be read ({error.strerror})") from None
    name = f"lorvp_own_{hashlib.sha256(text).hexdigest()[:16]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, found)
    if spec is None or spec.loader is None:
        raise UserError(f"backbone.module: {path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where timm looks for what it registers
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own code raises
        del sys.modules[name]
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"backbone.module: {path} can't be run: {type(error).__name__}: {reason}") from error
