"""Find kinds by the name of their file or folder, and run users' own files.

`lorvp/prompts/low_rank` is `prompt.kind: low_rank`, `sweeps/search/algorithms/tpe.py` is `search.algorithm: tpe`.

Listing names imports nothing, so that a spec can be checked without torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from lorvp.errors import UserError
from lorvp.utils.paths import ROOT

COPIES = ROOT / "own"
"""Folder of the users' files in a copy of this code that was made for jobs."""


SHARED = "base"
"""Name of the module in a package that is no kind, and holds what the kinds share."""


@functools.cache
def names(package: str) -> tuple[str, ...]:
    """List the kinds in a package: its modules, and its folders with a `config.py`. Cached, as every config asks."""
    folder = ROOT.joinpath(*package.split("."))
    files = [path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", SHARED)]
    return tuple(sorted([*files, *(path.parent.name for path in folder.glob("*/config.py"))]))


@functools.cache
def load(module: str) -> type[Any]:
    """Return the class that a module defines: the only one in it without a leading underscore."""
    loaded = importlib.import_module(module)
    (public_class,) = (
        value
        for key, value in vars(loaded).items()
        if isinstance(value, type) and value.__module__ == loaded.__name__ and not key.startswith("_")
    )
    return public_class


def copy_of(path: Path, copies: Path = COPIES) -> Path:
    """Return the path of the copy of a user's file."""
    return copies / hashlib.sha256(str(path).encode()).hexdigest()[:12] / path.name


def run_file(path: Path) -> None:
    """Import a user's file for what it registers, or its copy if this code is a copy that was made for jobs.

    A file runs once in a process, unless its text has changed. Raises UserError for a file that can't be read, and for
    any exception of its own.
    """
    source = copy_of(path) if copy_of(path).exists() else path
    try:
        text = source.read_bytes()
    except OSError as error:
        raise UserError(f"backbone.module: {path} can't be read ({error.strerror})") from None
    name = f"lorvp_own_{hashlib.sha256(text).hexdigest()[:16]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, source)
    if spec is None or spec.loader is None:
        raise UserError(f"backbone.module: {path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # timm looks there for what the file registers
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own code raises
        del sys.modules[name]
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"backbone.module: {path} can't be run: {type(error).__name__}: {reason}") from error
