"""Files that someone will read back: written under a temporary name, then renamed, so that none is ever half there."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where is kept what can be made again: LORVP_CACHE, by default ~/.cache/lorvp."""
    return Path(os.environ.get("LORVP_CACHE") or Path.home() / ".cache" / "lorvp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, a file or a folder, that takes its place when the block ends without an error."""
    temporary = _beside(path)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def create(path: Path, text: str) -> bool:
    """Writes a file that is not there yet, whole at once; False, and nothing done, if somebody has been faster."""
    temporary = _beside(path)
    temporary.write_text(text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def _beside(path: Path) -> Path:
    """A name that no other process takes, on this host or another."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
