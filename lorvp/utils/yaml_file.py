"""Read a user's YAML file so that every error names file, line and key, and says what would be right."""

from __future__ import annotations

import sys
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lorvp.errors import UserError
from lorvp.utils.explain import Location, explain

Model = TypeVar("Model", bound=BaseModel)
STANDARD = "tag:yaml.org,2002:"
MERGE = f"{STANDARD}merge"
KINDS = {
    ScalarNode: ("str", "int", "float", "bool", "null", "timestamp"),
    SequenceNode: ("seq",),
    MappingNode: ("map",),
}
"""Accepted tags of each kind of node."""
MOST_VALUES = 100_000
"""Largest number of values in a file, because a few lines of anchors can stand for billions."""


class YamlFile:
    """Hold the mapping in a YAML file as plain `values`, which may be changed, and the line of each key and item.

    Raises UserError for a file that can't be read, is not YAML, or holds no mapping.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        document, self.lines = self._parse()
        if not isinstance(document, dict):
            kind = "empty" if document is None else f"a {type(document).__name__}"
            raise UserError(f"{path}:1: must be a mapping of keys, and is {kind}")
        self.values: dict[str, Any] = document

    def validate(self, model: type[Model]) -> Model:
        """Validate the values as a `model` and return it. Raises UserError about the first value that doesn't fit."""
        try:
            return model.model_validate(self.values)
        except ValidationError as error:
            self.fail(*explain(error, model))

    def fail(self, location: Location, message: str) -> NoReturn:
        """Raise UserError about the key at `location`, with the line of that key or of its nearest parent."""
        known = [self.lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in self.lines]
        where = f"{self.path}:{known[0]}" if known else str(self.path)
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}")

    def _parse(self) -> tuple[Any, dict[Location, int]]:
        try:
            return _read(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        except IsADirectoryError:
            raise UserError(f"{self.path}: a folder; name a YAML file in it") from None
        except (OSError, ValueError) as error:  # not UTF-8, or a path with a null in it
            raise UserError(f"{self.path}: can't be read ({error})") from None
        except _InvalidYaml as error:
            line = "" if error.line is None else f":{error.line}"
            raise UserError(f"{self.path}{line}: not valid YAML: {error}") from None


def parse_value(text: str) -> Any:
    """Parse text as one YAML value: a number, a list, null and so on. Raises UserError if it is not YAML."""
    try:
        return _read(text)[0]
    except _InvalidYaml:
        raise UserError(f"not a YAML value: {text!r}") from None


def format_value(value: Any) -> str:
    """Write a value on one line of YAML, as `parse_value` reads it."""
    yaml, text = YAML(typ="safe", pure=True), StringIO()
    yaml.default_flow_style, yaml.width = True, sys.maxsize
    yaml.dump(value, text)
    return text.getvalue().removesuffix("...\n").strip()  # the dots end a document that is a scalar


class _InvalidYaml(Exception):
    """Report text that is not YAML, or uses more of YAML than a file of values needs, at `line` (from 1)."""

    def __init__(self, problem: str, line: int | None) -> None:
        super().__init__(problem)
        self.line = line


def _read(text: str) -> tuple[Any, dict[Location, int]]:
    """Parse YAML 1.2 text into its value and the line of each key and item. Raises _InvalidYaml."""
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
        reader = _Reader(yaml.constructor)
        return None if root is None else reader.value(root, ()), reader.lines
    except MarkedYAMLError as error:
        mark = error.problem_mark
        raise _InvalidYaml((error.problem or "unreadable").splitlines()[0], mark.line + 1 if mark else None) from None
    except YAMLError as error:
        raise _InvalidYaml(str(error).splitlines()[0], None) from None
    except RecursionError:
        raise _InvalidYaml("lists or mappings in one another, too many deep", None) from None


class _Reader:
    """Convert YAML nodes to plain values: mappings with text keys, lists, text, numbers, true, false and null.

    Other tags are refused, so that no text can make Python construct an object. A date stays text. An alias repeats
    its anchor's values, and a merge key adds its values below the mapping's own.
    """

    def __init__(self, constructor: Any) -> None:
        self.lines: dict[Location, int] = {}
        self._constructor = constructor
        self._ancestors: list[Node] = []
        self._values = 0

    def value(self, node: Node, location: Location) -> Any:
        """Convert the node at `location` to its value. Raises _InvalidYaml."""
        self._values += 1
        if self._values > MOST_VALUES:
            raise _invalid(node, f"more than {MOST_VALUES} values, repeated ones counted as often")
        tag = str(node.tag)
        kind = tag.removeprefix(STANDARD)
        if kind not in KINDS.get(type(node), ()):
            raise _invalid(node, f"no value here has the tag {tag.replace(STANDARD, '!!')}; leave it out")
        if isinstance(node, ScalarNode):
            return self._scalar(node, kind)
        if any(node is other for other in self._ancestors):
            raise _invalid(node, "an anchor that holds itself")
        self._ancestors.append(node)
        value = self._mapping(node, location) if isinstance(node, MappingNode) else self._list(node, location)
        self._ancestors.pop()
        return value

    def _scalar(self, node: ScalarNode, kind: str) -> Any:
        if kind in ("str", "timestamp"):
            return node.value
        try:
            return self._constructor.construct_object(node)
        except (ValueError, KeyError):  # of a tag that does not fit, or a number of thousands of digits
            raise _invalid(node, f"{node.value[:20]!r} can't be read as {kind}") from None

    def _list(self, node: Node, location: Location) -> list[Any]:
        self.lines |= {(*location, i): item.start_mark.line + 1 for i, item in enumerate(node.value)}
        return [self.value(item, (*location, i)) for i, item in enumerate(node.value)]

    def _mapping(self, node: MappingNode, location: Location) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key, value in sorted(node.value, key=lambda pair: pair[0].tag != MERGE):
            if not isinstance(key, ScalarNode):
                raise _invalid(key, "a key must be a word, not a list or a mapping")
            if key.tag == MERGE:
                for other in reversed(value.value if isinstance(value, SequenceNode) else [value]):
                    if not isinstance(other, MappingNode):
                        raise _invalid(key, "a merge key takes a mapping, or a list of them")
                    merged |= self.value(other, location)
                continue
            if key.value in own:
                raise _invalid(key, f"the key {key.value} is there twice")
            self.lines[(*location, key.value)] = key.start_mark.line + 1
            own[key.value] = self.value(value, (*location, key.value))
        return merged | own


def _invalid(node: Node, problem: str) -> _InvalidYaml:
    return _InvalidYaml(problem, node.start_mark.line + 1)
