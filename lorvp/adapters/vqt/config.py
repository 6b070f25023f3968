"""Visual query tuning, query tokens that read every layer: its options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from lorvp.parts import AdapterConfig, Fraction, TrainedByOptimizer, Trial


class VQTConfig(AdapterConfig, TrainedByOptimizer):
    """Let trained queries read every layer, and the head read their answers (Tu et al. 2023, andytu28/VQT)."""

    kind: Literal["vqt"] = "vqt"
    method = "vqt"
    has_one_size = True

    count: Annotated[int, Field(ge=1, le=200)] = Field(10, description="queries per layer")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout rate of the queries")
    keep: Fraction | None = Field(
        None,
        description="fraction of features (largest weights) that the final head reads; default: all, in one training. "
        "One third of the epochs trains queries and head, one a new head under group_lasso, and one a new head on the "
        "features it chose",
    )
    group_lasso: PositiveFloat | None = Field(
        None, description="with keep: penalty on the norm of each feature's weights; published: 0.0001"
    )

    @property
    def stages(self) -> int:
        """Number of trainings: three where features are chosen."""
        return 3 if self.keep else 1

    @property
    def draws_at_random(self) -> bool:
        """Whether queries are dropped at random."""
        return self.dropout > 0

    def check(self, trial: Trial) -> None:
        """Raise ValueError for a head other than lp, and for a choice of features that can't be carried out."""
        if trial.head.kind != "lp":
            raise ValueError("adapter vqt has features of its own: head.kind must be lp")
        if self.group_lasso and not self.keep:
            raise ValueError("adapter.group_lasso chooses the features for adapter.keep, which must be given")
        if not self.keep:
            return
        if not self.group_lasso:
            raise ValueError("adapter.keep chooses by adapter.group_lasso, which must be given")
        if trial.epochs % self.stages:
            raise ValueError(f"adapter.keep trains three times: epochs must be a multiple of 3, not {trial.epochs}")
        if trial.warmup_epochs >= trial.epochs // self.stages:
            raise ValueError("adapter.keep trains three times: schedule.warmup_epochs must be below a third of epochs")
        if trial.head.fitted:
            raise ValueError("adapter.keep trains two heads anew: head.init must be random")
        if trial.rungs:
            raise ValueError("adapter.keep trains three times: leave rungs out")

    def backbone_problem(self, name: str, family: str, prompted: bool) -> tuple[str, str] | None:
        """Return the reason why a backbone has no layers to ask; None if it has."""
        if family != "vit":
            return "", f"vqt asks the layers of a vision transformer (vit_*, deit_*), not of {name}"
        return None
