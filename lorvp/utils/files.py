"""Files that someone will read back: written under a temporary name, then renamed, so that none is ever half there."""

from __future__ import annotations

import atexit
import errno
import functools
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
"""What disks say that have no hard links, or no more of them."""


def cache_folder() -> Path:
    """Find where is kept what can be made again: LORVP_CACHE, by default ~/.cache/lorvp.

    Where that can't be written it is a temporary folder until the process ends, and stderr says so, once.
    """
    return _written(os.environ.get("LORVP_CACHE") or "~/.cache/lorvp")


def give_libraries_caches() -> None:
    """Name a folder in the cache to each library whose own can't be made, before it is imported.

    One that is there is left alone, read-only or not: it may hold the weights.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    own = {
        "HF_HOME": f"{caches}/huggingface",
        "TORCH_HOME": f"{caches}/torch",
        "MPLCONFIGDIR": f"{os.environ.get('XDG_CONFIG_HOME') or '~/.config'}/matplotlib",
    }
    for name, folder in own.items():
        if name in os.environ:
            continue
        try:
            Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):
            os.environ[name] = str(cache_folder() / name.lower())


@functools.cache
def _written(folder: str) -> Path:
    try:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except (OSError, RuntimeError) as error:  # a disk that takes nothing; no home folder
        reason = getattr(error, "strerror", None) or str(error)
    temporary = tempfile.mkdtemp(prefix="lorvp-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    print(f"the cache {folder} can't be written ({reason}): a temporary one takes its place", file=sys.stderr)
    return Path(temporary)


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
    """Write a line to a file that is not there yet; False, and nothing done, if somebody has been faster.

    `read_line` reads it. Raises OSError where the disk does.
    """
    temporary = _beside(path)
    temporary.write_text(f"{text}\n")
    try:
        return publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_line(path: Path) -> str | None:
    """Read what `create` wrote; None while it is not there whole."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    return text[:-1] if text.endswith("\n") else None


def publish(temporary: Path, path: Path) -> bool:
    """Give a whole file its name, unless that is taken; whether it was free.

    A disk without hard links (FAT, some network disks) gets a copy: its name is taken at once, it is whole soon after.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            with open(temporary, "rb") as source, open(path, "xb") as target:
                shutil.copyfileobj(source, target)
        except FileExistsError:
            return False
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """Have `target` hold what `source` holds; both must be replaced from then on, never written into."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def _beside(path: Path) -> Path:
    """A name that no other process takes, on this host or another."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
