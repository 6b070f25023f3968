"""A stage of a trial: what is trained together, from one point of the trial to another.

A trial has one stage, unless its config names cheaper first epochs (`rungs`: smaller images, or a part of them), or its
method trains several times over (`TrialConfig.stages`). Each stage has a method and optimizers of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from lorvp import methods
from lorvp.config import Rung, TrialConfig
from lorvp.data import datasets
from lorvp.methods.base import Method
from lorvp.models.backbone import Backbone
from lorvp.training.shared import SharedResources
from lorvp.utils import distributed
from lorvp.utils.device import MicroBatches

LATER_STAGES_LR = 0.5
"""Share of the learning rate after a method's first stage, as VQT's public code has it."""


@dataclass(frozen=True)
class Stage:
    """What is trained in one stage, at one image size and on one set of images."""

    rung: Rung | None
    """None at full size and on all images."""
    number: int
    """Of the method's trainings (`TrialConfig.stages`), from 0."""
    shared: SharedResources
    """Backbone and images of this stage's size."""
    splits: datasets.Splits
    """What the model reads: the images, or the backbone's features of them where only a head is trained."""
    method: Method
    model: nn.Module
    """The method; or its head alone, where it reads cached features."""
    ddp_model: nn.Module
    """`model`, with its gradients averaged over the processes."""
    groups: dict[str, list[nn.Parameter]]
    """Trainable parameters by part: prompt, adapter, head."""
    optimizers: dict[str, torch.optim.Optimizer]
    base_lr: dict[str, float]
    """The learning rate of each group before the schedule's factor."""

    @property
    def reads_features(self) -> bool:
        """Whether the model reads cached features in place of images."""
        return self.model is not self.method

    @property
    def features_are_read(self) -> bool:
        """Whether `splits` holds the features already."""
        return self.splits is not self.shared.splits

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches in an epoch of this stage's training images."""
        return math.ceil(len(self.splits.train) / batch_size)

    def full_fidelity(self, config: TrialConfig) -> bool:
        """Return whether the trial's result may come from an epoch of this stage."""
        return self.rung is None and self.number == config.stages - 1


def build_stage(
    config: TrialConfig, shared: SharedResources, rung: Rung | None, number: int, micro_batches: MicroBatches
) -> Stage:
    """Build what is trained at the size and on the images of `rung`, as the method's training `number`."""
    shared = _at_rung(config, shared, rung)
    method = methods.make(config, shared.backbone, len(shared.splits.class_names)).to(shared.device)
    method.micro_batches = micro_batches
    method.stage = number
    groups = method.groups()
    if number:  # what the first training has learned is frozen
        for parameter in (parameter for name, group in groups.items() if name != "head" for parameter in group):
            parameter.requires_grad_(False)
        groups = {"head": groups["head"]}
    optimizers = {name: method.make_optimizer(name, group, shared.precision) for name, group in groups.items()}
    factor = LATER_STAGES_LR if number else 1.0
    model = method.mapping if method.trains_head_only and not config.dataset.augments else method
    return Stage(
        rung=rung,
        number=number,
        shared=shared,
        splits=shared.splits,
        method=method,
        model=model,
        ddp_model=distributed.wrap_ddp(model),
        groups=groups,
        optimizers=optimizers,
        base_lr={name: factor * optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()},
    )


def _at_rung(config: TrialConfig, shared: SharedResources, rung: Rung | None) -> SharedResources:
    backbone, splits = shared.backbone, shared.splits
    if rung and rung.image_size:
        smaller = config.backbone.model_copy(update={"image_size": rung.image_size})
        backbone = Backbone(smaller, shared.precision, config.backbone_speed, shared.device)
    if rung and rung.train_share:
        count = max(1, round(rung.train_share * len(splits.train)))
        _, places = datasets.stratified_sample(splits.train.labels, count, config.dataset.split_seed)
        splits = replace(splits, train=splits.train.subset(places))
    return replace(shared, backbone=backbone, splits=splits)


def carry_over(before: Stage, after: Stage) -> None:
    """Put what an earlier rung has learned into the next one's method; prompts are interpolated to their new size.

    The optimizers' state is kept where nothing has changed its shape.
    """
    shapes = {name: tensor.shape for name, tensor in after.method.trainable_state_dict().items()}
    learned = before.method.trainable_state_dict()
    after.method.load_trainable_state_dict(
        {
            name: tensor if tensor.shape == shapes[name] else resized(tensor, shapes[name])
            for name, tensor in learned.items()
        }
    )
    after.method.counts = before.method.counts
    if all(tensor.shape == shapes[name] for name, tensor in learned.items()):
        for name, optimizer in after.optimizers.items():
            optimizer.load_state_dict(before.optimizers[name].state_dict())


def resized(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Interpolate a part of a prompt, (channels, rows, columns), to another image size: B's rows and A's columns."""
    return F.interpolate(tensor[None], shape[-2:], mode="bilinear")[0]
