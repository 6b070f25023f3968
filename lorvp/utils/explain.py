"""Explain in one line what is wrong with values that a pydantic model refuses: where, and what would be right."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Location = tuple[str | int, ...]


def explain(error: ValidationError, model: type[BaseModel]) -> tuple[Location, str]:
    """Return the location of the first validation error, and a message that says what would be right."""
    # a misspelt key comes before the key that is missing because of it, and a wrong one before one without effect
    first = min(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", e["type"] == "no_effect"))
    location, value = located(first, model), first["input"]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return location, f"no such key{closest(str(location[-1]), _siblings(model, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return location, "this key is missing"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        known = [tag.strip("'") for tag in first["ctx"].get("expected_tags", "").split(", ")]
        message = f"unknown name {first['ctx'].get('tag')!r}{closest(str(first['ctx'].get('tag')), known)}"
        return (*location, first["ctx"]["discriminator"].strip("'")), message
    if first["type"] != "value_error" and not isinstance(value, dict) and "key" not in first.get("ctx", {}):
        message += f", not {value!r}"
    return location, message


def located(error: ErrorDetails, model: type[BaseModel]) -> Location:
    """Return the keys that lead to what is wrong: without the tags of unions, and with the key that the error names."""
    keys: list[str | int] = []
    node: Any = model
    for part in error["loc"]:
        if part == "[key]":
            continue
        tags = _tags(node)
        if part in tags:
            node = tags[str(part)]
        else:
            keys.append(part)
            node = _child(node, part)
    named = error.get("ctx", {}).get("key")
    return (*keys, *(named.split(".") if isinstance(named, str) else ()))


def dotted(location: Location) -> str:
    """Return a location as a dotted path."""
    return ".".join(map(str, location))


def closest(word: str, known: list[str]) -> str:
    """Return the end of an error about `word`: the most similar known word, or all of them if there are at most 12."""
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; one of {', '.join(known)}" if 0 < len(known) <= 12 else ""


def _tags(node: Any) -> dict[str, type[BaseModel]]:
    """Return the models that a field with a discriminator may have, by tag; none for another node."""
    key = getattr(node, "discriminator", None)
    if key is None:
        return {}
    models = get_args(node.annotation) or (node.annotation,)
    return {model.model_fields[key].default: model for model in models}


def _child(node: Any, part: str | int) -> Any:
    """Return what a model, a field or a type holds at a key: a field, or a type."""
    kind = getattr(node, "annotation", node)
    for option in (kind, *get_args(kind)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            names = {field.alias or name: field for name, field in option.model_fields.items()}
            if part in names:
                return names[str(part)]
    return get_args(kind)[1] if get_origin(kind) is dict else None


def _siblings(model: Any, location: Location) -> list[str]:
    """Return the keys that a model has at `location`, which may have tags of unions in it."""
    node = model
    for part in location:
        node = _tags(node).get(str(part)) or _child(node, part)
    kind = getattr(node, "annotation", node)
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return []
    return [field.alias or name for name, field in kind.model_fields.items()]


_PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s]+@")


def without_passwords(text: str) -> str:
    """Mask the passwords in a URI, or in text that holds URIs, before it is shown or stored."""
    return _PASSWORD.sub(r"\1:***@", text)
