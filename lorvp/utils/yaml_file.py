"""A YAML file that a user wrote, read so that every error names file, line, key and what would be right."""

from __future__ import annotations

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
"""The tags that are read, of each kind of node."""
MOST_VALUES = 100_000
"""In a file: a few lines of anchors can stand for billions."""


class YamlFile:
    """The mapping in a YAML file: plain `values`, to be changed at will, and the line of each key and item.

    Raises UserError for a file that can't be read, is not YAML, or holds no mapping.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        document, self.lines = self._parse()
        if not isinstance(document, dict):
            found = "empty" if document is None else f"a {type(document).__name__}"
            raise UserError(f"{path}:1: must be a mapping of keys, and is {found}")
        self.values: dict[str, Any] = document

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

    def _parse(self) -> tuple[Any, dict[Location, int]]:
        try:
            return _read(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        except IsADirectoryError:
            raise UserError(f"{self.path}: a folder; name a YAML file in it") from None
        except (OSError, ValueError) as error:  # not UTF-8, or a path with a null in it
            raise UserError(f"{self.path}: can't be read ({error})") from None
        except _Refused as error:
            line = "" if error.line is None else f":{error.line}"
            raise UserError(f"{self.path}{line}: not valid YAML: {error}") from None


def parse_value(text: str) -> Any:
    """A value as it would be read from YAML: numbers, lists, null. Raises UserError."""
    try:
        return _read(text)[0]
    except _Refused:
        raise UserError(f"not a YAML value: {text!r}") from None


class _Refused(Exception):
    """Text that is not YAML, or more of YAML than a file of values needs; `line` says where, from 1 on."""

    def __init__(self, problem: str, line: int | None) -> None:
        super().__init__(problem)
        self.line = line


def _read(text: str) -> tuple[Any, dict[Location, int]]:
    """The value that YAML 1.2 text holds, and the line of each key and item. Raises _Refused."""
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
        reader = _Reader(yaml.constructor)
        return None if root is None else reader.value(root, ()), reader.lines
    except MarkedYAMLError as error:
        mark = error.problem_mark
        raise _Refused((error.problem or "unreadable").splitlines()[0], mark.line + 1 if mark else None) from None
    except YAMLError as error:
        raise _Refused(str(error).splitlines()[0], None) from None
    except RecursionError:
        raise _Refused("lists or mappings in one another, too many deep", None) from None


class _Reader:
    """Makes plain values of YAML's nodes: mappings with keys of text, lists, text, numbers, true, false and null.

    Tags of any other kind are refused, so that no text can name what Python shall make; a date stays as it is written.
    An anchor's values are repeated where its name stands, and a merge key's are put in below the mapping's own.
    """

    def __init__(self, constructor: Any) -> None:
        self.lines: dict[Location, int] = {}
        self._constructor = constructor
        self._around: list[Node] = []
        self._values = 0

    def value(self, node: Node, location: Location) -> Any:
        """The value of a node that is found at `location`. Raises _Refused."""
        self._values += 1
        if self._values > MOST_VALUES:
            raise _refused(node, f"more than {MOST_VALUES} values, repeated ones counted as often")
        tag = str(node.tag)
        kind = tag.removeprefix(STANDARD)
        if kind not in KINDS.get(type(node), ()):
            raise _refused(node, f"no value here has the tag {tag.replace(STANDARD, '!!')}; leave it out")
        if isinstance(node, ScalarNode):
            return self._scalar(node, kind)
        if any(node is other for other in self._around):
            raise _refused(node, "an anchor that holds itself")
        self._around.append(node)
        found = self._mapping(node, location) if isinstance(node, MappingNode) else self._list(node, location)
        self._around.pop()
        return found

    def _scalar(self, node: ScalarNode, kind: str) -> Any:
        if kind in ("str", "timestamp"):
            return node.value
        try:
            return self._constructor.construct_object(node)
        except (ValueError, KeyError):  # of a tag that does not fit, or a number of thousands of digits
            raise _refused(node, f"{node.value[:20]!r} can't be read as {kind}") from None

    def _list(self, node: Node, location: Location) -> list[Any]:
        self.lines |= {(*location, i): item.start_mark.line + 1 for i, item in enumerate(node.value)}
        return [self.value(item, (*location, i)) for i, item in enumerate(node.value)]

    def _mapping(self, node: MappingNode, location: Location) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key, value in sorted(node.value, key=lambda pair: pair[0].tag != MERGE):
            if not isinstance(key, ScalarNode):
                raise _refused(key, "a key must be a word, not a list or a mapping")
            if key.tag == MERGE:
                for other in reversed(value.value if isinstance(value, SequenceNode) else [value]):
                    if not isinstance(other, MappingNode):
                        raise _refused(key, "a merge key takes a mapping, or a list of them")
                    merged |= self.value(other, location)
                continue
            if key.value in own:
                raise _refused(key, f"the key {key.value} is there twice")
            self.lines[(*location, key.value)] = key.start_mark.line + 1
            own[key.value] = self.value(value, (*location, key.value))
        return merged | own


def _refused(node: Node, problem: str) -> _Refused:
    return _Refused(problem, node.start_mark.line + 1)
