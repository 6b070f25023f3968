"""Explain in one line what is wrong with values that a pydantic model refuses: where, and what would be right."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

Location = tuple[str | int, ...]


def explain(error: ValidationError, model: type[BaseModel]) -> tuple[Location, str]:
    """Return the location of the first validation error, and a message that says what would be right."""
    # a misspelt key comes before the key that is missing because of it
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    location = tuple(part for part in first["loc"] if part != "[key]")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return location, f"no such key{closest(str(location[-1]), _siblings(model, location[:-1]))}"
    if first["type"] == "missing":
        return location, "this key is missing"
    value = first["input"]
    if first["type"] != "value_error" and not isinstance(value, dict):
        message += f", not {value!r}"
    return location, message


def closest(word: str, known: list[str]) -> str:
    """Return the end of an error about `word`: the most similar known word, or all of them if there are at most 12."""
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; one of {', '.join(known)}" if 0 < len(known) <= 12 else ""


def _siblings(model: Any, location: Location) -> list[str]:
    """Return the keys that a model has at `location`."""
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
    """Mask the passwords in a URI, or in text that holds URIs, before it is shown or stored."""
    return _PASSWORD.sub(r"\1:***@", text)
