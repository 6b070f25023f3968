"""GaLore, fine-tuning by gradients of low rank: its options."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from lorvp.parts import AdapterConfig, Trained, Trial


class GaLoreConfig(AdapterConfig, Trained):
    """Train all of the backbone's weights by Adam on low-rank projected gradients (Zhao et al. 2024)."""

    kind: Literal["galore"] = "galore"
    method = "galore"
    trains_backbone = True

    rank: PositiveInt = Field(128, description="rank of the projected gradients")
    update_gap: PositiveInt = Field(200, description="steps between two computations of the projection")
    scale: PositiveFloat = Field(0.25, description="factor of the update when it is projected back")
    bits: Literal[8, 32] = Field(32, description="bits of each value of the moments")
    per_layer: bool = Field(
        False, description="update each parameter as soon as its gradient is computed, and free the gradient"
    )

    @property
    def steps_per_layer(self) -> bool:
        """Whether each gradient is freed before the step has all gradients."""
        return self.per_layer

    def check(self, trial: Trial) -> None:
        """Raise ValueError for what needs all gradients of the backbone at the same time."""
        if self.per_layer and self.clip_grad_norm is not None:
            raise ValueError("adapter.per_layer frees each gradient at once: adapter.clip_grad_norm must be null")
        if self.per_layer and trial.precision in ("auto", "fp16"):
            raise ValueError("adapter.per_layer can't skip a step of fp16: precision must be bf16 or fp32")
