"""No prompt: the backbone sees the image as it is."""

from __future__ import annotations

from typing import Literal

from lorvp.parts import PromptConfig


class NoPromptConfig(PromptConfig):
    """Leave the image as it is."""

    kind: Literal["none"] = "none"
    trained = False
