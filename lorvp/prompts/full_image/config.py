"""A prompt with a free value for every pixel: its options."""

from __future__ import annotations

from typing import Literal

from lorvp.parts import OneTensorPromptConfig


class FullImageConfig(OneTensorPromptConfig):
    """Add a free value for every pixel."""

    kind: Literal["full_image"] = "full_image"
    method = "full_image"
