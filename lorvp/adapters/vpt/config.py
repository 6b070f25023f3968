"""Visual prompt tuning, tokens beside the image's: its options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from lorvp.parts import AdapterConfig, TrainedByOptimizer


class VPTConfig(AdapterConfig, TrainedByOptimizer):
    """Add trained tokens to the input of the first layer, or of each (Jia et al. 2022, KMnP/vpt)."""

    kind: Literal["vpt"] = "vpt"
    method = "vpt"
    has_one_size = True

    count: Annotated[int, Field(ge=1, le=200)] = Field(
        10, description="tokens per layer; on a convolutional net, the width of the padding in pixels"
    )
    deep: bool = Field(True, description="new tokens at every layer; false: at the first layer only")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout rate of the tokens")
    project: PositiveInt | None = Field(
        None, description="width of the tokens before a linear layer projects them; default: no projection"
    )

    @property
    def draws_at_random(self) -> bool:
        """Whether tokens are dropped at random."""
        return self.dropout > 0

    def backbone_problem(self, name: str, family: str, prompted: bool) -> tuple[str, str] | None:
        """Return the option that does not go with a backbone, and the reason; None if all of them do."""
        if self.deep and family != "vit":
            return "deep", f"vpt is deep on vision transformers (vit_*, deit_*) alone: it must be false for {name}"
        if family == "other" and prompted:
            return "", f"vpt beside a prompt needs a backbone with tokens; of {name} it pads the images"
        if family == "other" and self.project:
            return "project", f"{name} has no tokens to project, vpt pads its images: leave it out"
        if family == "other" and self.dropout:
            return "dropout", f"{name} has no tokens to drop, vpt pads its images: leave it out"
        return None
