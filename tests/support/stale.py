"""A network disk as another machine sees it, which remembers for a while what was there before."""

from __future__ import annotations

import builtins
import io
import os
from pathlib import Path
from typing import Any

import pytest


class Stale:
    """Hides names from this process, and whatever is in them, until they are shown.

    With `until_listed` a name is hidden until its folder is listed, as NFS does; else listings lack it, too.
    """

    def __init__(self, patch: pytest.MonkeyPatch, until_listed: bool = False) -> None:
        self._hidden: set[Path] = set()
        self._old: dict[Path, os.stat_result] = {}
        self._until_listed = until_listed
        self._stat, self._listdir, self._open = os.stat, os.listdir, io.open
        patch.setattr(os, "stat", self._seen_stat)
        patch.setattr(os, "listdir", self._seen_listdir)
        for module in (io, builtins):
            patch.setattr(module, "open", self._seen_open)

    def hide(self, path: Path) -> None:
        """From now on, what lies there is not seen."""
        assert path.exists()
        self._hidden.add(path)

    def keep(self, path: Path) -> None:
        """From now on, a file is seen to have the size and time that it has now."""
        self._old[path] = self._stat(path)

    def show(self) -> None:
        """All that is there."""
        self._hidden.clear()
        self._old.clear()

    def _check(self, path: Any) -> None:
        if isinstance(path, str | os.PathLike) and self._hidden & {Path(path), *Path(path).parents}:
            raise FileNotFoundError(2, "No such file or directory", str(path))

    def _seen_stat(self, path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        self._check(path)
        if not isinstance(path, int) and Path(path) in self._old:
            return self._old[Path(path)]
        return self._stat(path, *arguments, **options)

    def _seen_listdir(self, path: Any = ".") -> list[str]:
        self._check(path)
        if self._until_listed:
            self._hidden = {each for each in self._hidden if each.parent != Path(path)}
        return [name for name in self._listdir(path) if Path(path) / name not in self._hidden]

    def _seen_open(self, path: Any, *arguments: Any, **options: Any) -> Any:
        self._check(path)
        return self._open(path, *arguments, **options)
