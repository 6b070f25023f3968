"""A YAML file as plain values, with the line that each key stands on, so that an error can name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lorvp.errors import UserError

Location = tuple[str | int, ...]


def read(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    """The mapping in `path` and the line (from 1) of each of its keys and items. Raises UserError in one line."""
    try:
        document = YAML().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; name a YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        line = f":{mark.line + 1}" if mark else ""
        problem = (error.problem if isinstance(error, MarkedYAMLError) else str(error)).splitlines()[0]
        raise UserError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(document, dict):
        found = "empty" if document is None else f"a {type(document).__name__}"
        raise UserError(f"{path}:1: must be a mapping of keys (name, trial, space, search, ...), and is {found}")
    lines: dict[Location, int] = {}
    _collect_lines(document, (), lines)
    return _plain(document), lines


def parse_value(text: str) -> Any:
    """A value as it would be read from YAML: numbers, lists, null. Raises UserError."""
    try:
        return _plain(YAML().load(text))
    except YAMLError:
        raise UserError(f"not a YAML value: {text!r}") from None


def _collect_lines(node: Any, location: Location, lines: dict[Location, int]) -> None:
    if isinstance(node, CommentedMap):
        for key, value in node.items():
            lines[(*location, key)] = node.lc.key(key)[0] + 1
            _collect_lines(value, (*location, key), lines)
    elif isinstance(node, CommentedSeq):
        for i, value in enumerate(node):
            lines[(*location, i)] = node.lc.item(i)[0] + 1
            _collect_lines(value, (*location, i), lines)


def _plain(node: Any) -> Any:
    """Without ruamel's own types, which remember how a value was written."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node
