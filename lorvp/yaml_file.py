"""A YAML file that a user wrote, read so that every error names file, line, key and what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lorvp.errors import UserError
from lorvp.explain import Location, explain

Model = TypeVar("Model", bound=BaseModel)


class YamlFile:
    """The mapping in a YAML file: plain `values`, to be changed at will, and the line of each key and item.

    Raises UserError for a file that can't be read, is not YAML, or holds no mapping.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Location, int] = {}
        document = self._parse()
        if not isinstance(document, dict):
            found = "empty" if document is None else f"a {type(document).__name__}"
            raise UserError(f"{path}:1: must be a mapping of keys, and is {found}")
        self._collect_lines(document, ())
        self.values: dict[str, Any] = _plain(document)

    def validate(self, model: type[Model]) -> Model:
        """The values as a `model`. Raises UserError about the first that doesn't fit."""
        try:
            return model.model_validate(self.values)
        except ValidationError as error:
            self.fail(*explain(error, model))

    def fail(self, location: Location, message: str) -> NoReturn:
        """Raises UserError about the key at `location`, with the line of what comes nearest to it."""
        known = [self.lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in self.lines]
        where = f"{self.path}:{known[0]}" if known else str(self.path)
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}")

    def _parse(self) -> Any:
        try:
            return YAML().load(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        except IsADirectoryError:
            raise UserError(f"{self.path}: a folder; name a YAML file in it") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: can't be read ({error})") from None
        except YAMLError as error:
            mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
            line = f":{mark.line + 1}" if mark else ""
            problem = (error.problem if isinstance(error, MarkedYAMLError) else str(error)).splitlines()[0]
            raise UserError(f"{self.path}{line}: not valid YAML: {problem}") from None

    def _collect_lines(self, node: Any, location: Location) -> None:
        if isinstance(node, CommentedMap):
            places = [(key, node.lc.key(key)) for key in node]
        elif isinstance(node, CommentedSeq):
            places = [(i, node.lc.item(i)) for i in range(len(node))]
        else:
            return
        for key, place in places:
            self.lines[(*location, key)] = place[0] + 1
            self._collect_lines(node[key], (*location, key))


def parse_value(text: str) -> Any:
    """A value as it would be read from YAML: numbers, lists, null. Raises UserError."""
    try:
        return _plain(YAML().load(text))
    except YAMLError:
        raise UserError(f"not a YAML value: {text!r}") from None


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
