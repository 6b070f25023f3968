"""Write files under a temporary name and rename them, so that no reader ever sees half a file."""

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
"""Error numbers of file systems that have no hard links, or no more of them."""


def cache_folder() -> Path:
    """Return the cache folder: LORVP_CACHE, by default ~/.cache/lorvp. All it holds can be computed again.

    If it can't be written, return a temporary folder that lasts until the process ends, and say so once on stderr.
    """
    return _writable_folder(os.environ.get("LORVP_CACHE") or "~/.cache/lorvp")


def give_libraries_caches() -> None:
    """Point each library whose own cache folder can't be made to one in our cache; call it before they are imported.

    An existing folder stays in use, even a read-only one, because it may hold the weights.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folders = {
        "HF_HOME": f"{caches}/huggingface",
        "TORCH_HOME": f"{caches}/torch",
        "MPLCONFIGDIR": f"{os.environ.get('XDG_CONFIG_HOME') or '~/.config'}/matplotlib",
    }
    for name, folder in folders.items():
        if name in os.environ:
            continue
        try:
            Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):
            os.environ[name] = str(cache_folder() / name.lower())


@functools.cache
def _writable_folder(folder: str) -> Path:
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
    """Yield a temporary path for a file or folder; it replaces `path` when the block ends without an error."""
    temporary = _temporary_beside(path)
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
    """Write one line to a new file. Return False and write nothing if the file already exists.

    `read_line` reads it. Raises OSError if the disk fails.
    """
    temporary = _temporary_beside(path)
    temporary.write_text(f"{text}\n")
    try:
        return publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_line(path: Path) -> str | None:
    """Read the line that `create` wrote. Return None if the file is missing or not complete yet."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    return text[:-1] if text.endswith("\n") else None


def publish(temporary: Path, path: Path) -> bool:
    """Link a complete file to its final name. Return False if the name is already taken.

    On a disk without hard links (FAT, some network disks) the file is copied: the name is taken at once, and the
    content is complete soon after.
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
    """Make `target` hold the content of `source`. From then on replace both files, and never write into them."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, in place of the file that may be there."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def _temporary_beside(path: Path) -> Path:
    """Return a temporary name that no other process uses, on this host or another."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
