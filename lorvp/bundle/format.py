"""Define the files of a bundle and read its description without torch; `lorvp.bundle.io` writes and loads bundles.

The layout is that of a model on Hugging Face's hub, so that `huggingface_hub` uploads the folder as it is:

    model.safetensors      the trained parameters and the label mapping
    config.json            the trial's config, metrics, class names, source backbone, and the digest of the tensors
    README.md              the model card
    prompt.png             the input prompt, for methods that have one
    example.png            an image of the validation set at the backbone's input size
    example_prompted.png   the same image with the prompt
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictStr, ValidationError

from lorvp.config import TrialConfig
from lorvp.errors import UserError
from lorvp.utils.explain import dotted, explain

FORMAT_VERSION = 4
TENSORS, DESCRIPTION, CARD = "model.safetensors", "config.json", "README.md"
PICTURE, EXAMPLE, PROMPTED = "prompt.png", "example.png", "example_prompted.png"


class _Source(BaseModel):
    digest: StrictStr
    precision: Literal["fp32", "bf16", "fp16"]


class _Description(BaseModel):
    """Define the keys that a bundle needs to be loaded; its JSON has more."""

    config: TrialConfig
    class_names: Annotated[list[StrictStr], Field(min_length=1)]
    source: _Source


def describe(folder: Path) -> dict[str, Any]:
    """Read and check the JSON of a bundle. Raises UserError if the folder is no bundle or of another version."""
    path = Path(folder) / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        version = description["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a prompt bundle ({type(error).__name__})") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: bundle format {version}, and this lorvp reads {FORMAT_VERSION}: tune it again, "
            "or load it with the lorvp that wrote it"
        )
    try:
        _Description.model_validate(description)
    except ValidationError as error:
        location, message = explain(error, _Description)
        raise UserError(f"{path}: {dotted(location)}: {message}") from None
    contents: dict[str, Any] = description
    return contents


def digest(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_tensors(folder: Path, description: dict[str, Any]) -> None:
    """Raise UserError if the tensors are missing, or are not those that the bundle was written with."""
    path = Path(folder) / TENSORS
    try:
        actual = digest(path)
    except OSError as error:
        raise UserError(f"{path}: missing from the bundle ({error.strerror})") from None
    if actual != description.get("sha256"):
        raise UserError(f"{path}: altered since the bundle was written; copy the bundle again")
