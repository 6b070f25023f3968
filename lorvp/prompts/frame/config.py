"""ILM-VP's prompt, a frame around the shrunken image: its options."""

from __future__ import annotations

from typing import Literal

from lorvp.parts import FramedPromptConfig


class FrameConfig(FramedPromptConfig):
    """Shrink the image and learn the frame around it (Chen et al. 2023, OPTML-Group/ILM-VP)."""

    kind: Literal["frame"] = "frame"
    method = "ilm_vp"
