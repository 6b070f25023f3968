"""Where a trial is within an epoch: what a checkpoint holds of it, so that a stop at any point repeats no batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lorvp.methods.base import Method
from lorvp.utils import distributed


class Evaluation(NamedTuple):
    """How far a split is evaluated in an epoch; the tensors are this process's own, and those of all are to be added.

    Nothing in it is changed in place.
    """

    images: int
    """That are done, by all processes together."""
    sums: torch.Tensor
    """Of the images' metrics: (3,) float64."""
    classes: torch.Tensor
    """The class that comes first, (N,) int32; 0 for images that are another process's, or not done."""


@dataclass
class EpochState:
    """The progress of the epoch under way.

    Sums are this process's own: `state_dict` adds up those of all processes, and `from_state_dict` gives them back to
    the first one alone.
    """

    device: torch.device
    shuffle_epoch: int | None = None
    """The epoch whose order of the data is taken; None before the first batch, and between two epochs."""
    step: int = 0
    """Batches that are done."""
    elapsed: float = 0.0
    """Seconds of training, without validation."""
    lr: dict[str, float] = field(default_factory=dict)
    """The learning rate of each group at the epoch's first step."""
    total_loss: torch.Tensor = field(init=False)
    """The sum of the losses of all images, in nats: () float64."""
    skipped: torch.Tensor = field(init=False)
    """Steps that fp16 skipped: () int64."""
    evaluated: dict[str, Evaluation] = field(default_factory=dict)
    """By split."""
    recounted: int = 0
    """Images that the pass for the next label mapping has counted, before the first batch."""

    def __post_init__(self) -> None:
        self.total_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def phase(self) -> str:
        """The point that the epoch is at: between epochs, mapping, train or evaluate."""
        if self.shuffle_epoch is None:
            return "mapping" if self.recounted else "between"
        return "evaluate" if self.evaluated else "train"

    def state_dict(self, method: Method) -> dict[str, Any]:
        """Return plain values and CPU tensors for a checkpoint; every process must call it."""
        recount = method.recounting
        return {
            "phase": self.phase,
            "shuffle_epoch": self.shuffle_epoch,
            "step": self.step,
            "elapsed": self.elapsed,
            "lr": self.lr,
            "total_loss": distributed.all_reduce_sum(self.total_loss).cpu(),
            "skipped": self.skipped.cpu(),
            "evaluated": {
                split: (done, *(distributed.all_reduce_sum(own).cpu() for own in tensors))
                for split, (done, *tensors) in self.evaluated.items()
            },
            "recounted": self.recounted,
            "recounting": None if recount is None else distributed.all_reduce_sum(recount).cpu(),
        }

    @classmethod
    def from_state_dict(cls, values: dict[str, Any], method: Method, device: torch.device, first: bool) -> EpochState:
        """Return the state that `state_dict` gave; its counts for the next mapping go into `method`."""

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device) * first

        state = cls(device, values["shuffle_epoch"], values["step"], values["elapsed"], values["lr"])
        state.total_loss, state.skipped = own(values["total_loss"]), values["skipped"].to(device)
        state.evaluated = {
            split: Evaluation(done, *map(own, tensors)) for split, (done, *tensors) in values["evaluated"].items()
        }
        state.recounted = values["recounted"]
        if values["recounting"] is not None:
            method.recounting = own(values["recounting"])
        return state
