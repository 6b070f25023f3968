"""What a bundle's folder holds, for those who read it without torch; `lorvp.bundle.io` writes and loads it.

It is laid out as Hugging Face's hub has models, so that `huggingface_hub` uploads it as it is:

    model.safetensors      what was chosen and learned
    config.json            the trial's config, its figures, the classes, what it was tuned on, the digests of the others
    README.md              the model card
    prompt.png             the input prompt, of methods that have one
    example.png            an image of the validation set, as the backbone takes it
    example_prompted.png   and with the prompt
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictStr, ValidationError

from lorvp.config import TrialConfig
from lorvp.errors import UserError
from lorvp.utils.explain import explain

FORMAT_VERSION = 3
SINCE_3 = ("vqt", "ilm_vp", "autovp")
"""Methods that took features or images otherwise in format 2; of the others nothing has changed."""
TENSORS, DESCRIPTION, CARD = "model.safetensors", "config.json", "README.md"
PICTURE, EXAMPLE, PROMPTED = "prompt.png", "example.png", "example_prompted.png"


class _Source(BaseModel):
    digest: StrictStr
    precision: Literal["fp32", "bf16", "fp16"]


class _Description(BaseModel):
    """What must be in the JSON for a bundle to be loaded; there is more in it."""

    config: TrialConfig
    class_names: Annotated[list[StrictStr], Field(min_length=1)]
    source: _Source


def describe(folder: Path) -> dict[str, Any]:
    """The JSON of a bundle. Raises UserError for a folder that isn't one, or is of another version."""
    path = Path(folder) / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        version = description["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a prompt bundle ({type(error).__name__})") from None
    if version not in (2, FORMAT_VERSION):
        raise UserError(f"{path}: bundle format {version}, and this lorvp reads {FORMAT_VERSION}")
    try:
        _Description.model_validate(description)
    except ValidationError as error:
        location, message = explain(error, _Description)
        raise UserError(f"{path}: {'.'.join(map(str, location))}: {message}") from None
    method = description["config"].get("method", "lorvp")
    if version == 2 and set(method.split("+")) & {*SINCE_3}:
        raise UserError(f"{path}: bundle format 2 of {method}, which takes its input otherwise since: tune it again")
    return description


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_tensors(folder: Path, description: dict[str, Any]) -> None:
    """Raises UserError where the tensors are missing, or are not those that the bundle was written with."""
    path = Path(folder) / TENSORS
    try:
        found = digest(path)
    except OSError as error:
        raise UserError(f"{path}: missing from the bundle ({error.strerror})") from None
    if found != description.get("sha256"):
        raise UserError(f"{path}: altered since the bundle was written; copy the bundle again")
