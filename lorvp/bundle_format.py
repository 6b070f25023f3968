"""What a bundle's folder holds, for those who read it without torch; `lorvp.bundle` writes and loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorvp.errors import UserError

FORMAT_VERSION = 1
TENSORS, DESCRIPTION, PICTURE = "tuned.safetensors", "bundle.json", "prompt.png"


def describe(folder: Path) -> dict[str, Any]:
    """The JSON of a bundle. Raises UserError for a folder that isn't one, or is of a newer version."""
    path = Path(folder) / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        version = description["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a prompt bundle ({type(error).__name__})") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: bundle format {version}, and this lorvp reads {FORMAT_VERSION}")
    return description
