"""EVP's prompt, an added frame around the shrunken image: its options."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from lorvp.parts import FramedPromptConfig


class EnhancedPromptConfig(FramedPromptConfig):
    """Shrink the image and learn free values around it, from zero (Wu et al. 2022, UCSC-VLAA/EVP)."""

    kind: Literal["evp"] = "evp"
    method = "evp"

    inner: PositiveInt = Field(
        164, description="side of the image within the frame, in pixels at L = 224; scaled to other sizes"
    )
