"""What is wrong with values that a model refuses, in words: where, and what would be right."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

Location = tuple[str | int, ...]


def explain(error: ValidationError, model: type[BaseModel]) -> tuple[Location, str]:
    """Where the first error is and what would be right."""
    # a misspelt key is told before the one that is missing for it
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    location = tuple(part for part in first["loc"] if part != "[key]")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return location, f"no such key{closest(str(location[-1]), _siblings(model, location[:-1]))}"
    if first["type"] == "missing":
        return location, "this key is missing"
    given = first["input"]
    if first["type"] != "value_error" and not isinstance(given, dict):
        message += f", not {given!r}"
    return location, message


def closest(word: str, known: list[str]) -> str:
    """The end of an error about `word`: the known one that it looks like, or all of them where they are few."""
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; one of {', '.join(known)}" if 0 < len(known) <= 12 else ""


def _siblings(model: Any, location: Location) -> list[str]:
    """The keys that a model has at `location`."""
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation if part in model.model_fields else None
        else:
            model = get_args(model)[1] if get_origin(model) is dict else None
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return []
    return [field.alias or name for name, field in model.model_fields.items()]


_PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s]+@")


def without_passwords(text: str) -> str:
    """A URI, or text with URIs in it, as screens, logs and files may have it."""
    return _PASSWORD.sub(r"\1:***@", text)
