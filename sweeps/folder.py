"""A sweep's own folder: the record of what it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorvp.errors import UserError
from lorvp.utils.explain import dotted, explain
from sweeps.spec.model import Spec

RECORD = "sweep.json"
"""What a sweep is, in its folder: its id, its spec, and the command that it was started by."""


@dataclass(frozen=True)
class Command:
    """How a sweep was started, or last resumed."""

    file: str
    """The spec's file, from where the user was."""
    overrides: list[str]
    """Of `--set`: KEY=VALUE each."""


def read_command(folder: Path) -> Command | None:
    """Return the command of the sweep in `folder`; None for one of an earlier version, which did not record it."""
    try:
        return Command(**json.loads((folder / RECORD).read_text())["command"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of the sweep from its start: its `id` and its `spec`. Raises UserError."""
    path = folder / RECORD
    try:
        recorded = json.loads(path.read_text())
        return {"id": recorded["id"], "spec": recorded["spec"]}
    except FileNotFoundError:
        raise UserError(f"{folder}: no such sweep; python sweeps/launch.py SPEC starts one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a sweep's record ({type(error).__name__})") from None


def read_spec(folder: Path) -> tuple[str, Spec]:
    """Read a sweep's id and spec from its folder, which may have moved. Raises UserError for another version's."""
    values = read_record(folder)
    try:
        spec = Spec.model_validate(values["spec"])
    except ValidationError as error:
        location, message = explain(error, Spec)
        key = dotted(location)
        raise UserError(f"{folder / RECORD}: {key}: {message}; another version of this project wrote it") from None
    place = folder.absolute()
    return values["id"], spec.model_copy(update={"output": place.parent, "name": place.name})
