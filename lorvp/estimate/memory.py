"""How much of a GPU's memory a trial will take, told without the GPU, the weights or the data.

The trial's own forward and backward run on fake tensors, which have a shape and a type but no numbers: nothing is
computed, and the bytes of what is alive at the same time are added up.

Not in it: the workspaces of cuDNN and cuBLAS, the CUDA context, what the allocator loses between its blocks, a dataset
that is kept on the device, and resizing, which is through before a step takes the most.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lorvp import methods
from lorvp.config import TrialConfig
from lorvp.models.backbone import Backbone
from lorvp.optim.galore import state_bytes
from lorvp.optim.optimizers import make_optimizer

CLASSES = 1000
"""Taken for a dataset that isn't there yet."""
IN_FP32 = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax}
"""What autocast computes in fp32 on a GPU, but in the type that comes on the CPU, where the fake tensors are."""


@dataclass(frozen=True)
class Prediction:
    """The most that is allocated on one GPU, in MiB."""

    training: float
    """In a step at batch_size."""
    evaluation: float
    """In a batch of eval_batch_size."""

    @property
    def peak(self) -> float:
        return max(self.training, self.evaluation)


def predict(config: TrialConfig, classes: int | None = None, gpus: int = 1) -> Prediction:
    """What the trial will take on each of `gpus` GPUs that share its batches.

    `precision: auto` is counted as fp16: on a GPU it is that or bf16, of the same size. `classes` are the dataset's,
    1,000 at most where that isn't known. Raises UserError for a backbone that can't be built.
    """
    plain = config.backbone.model_copy(update={"pretrained": False, "checkpoint": None})
    speed = config.backbone_speed.model_copy(update={"attention_by_products": False})  # which is a CPU's
    backbone = Backbone(plain, "fp16" if config.precision == "auto" else config.precision, speed)
    with torch.device("meta"):  # shapes are enough; a head may be larger than this machine's memory
        method = methods.make(config, backbone, classes or min(CLASSES, backbone.source_classes or CLASSES))
    states = sum(_states(group, parameters, config) for group, parameters in method.groups().items())
    with FakeTensorMode(allow_non_fake_inputs=True), _Living() as living, _AutocastOfGpu():
        tensors = {
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, requires_grad=t.requires_grad)
            for name, t in [*method.named_parameters(), *method.named_buffers()]
        }

        def peak(batch_size: int) -> float:
            living.peak = living.now
            shape = (math.ceil(batch_size / gpus), 3, backbone.image_size, backbone.image_size)
            images = torch.empty(shape, dtype=torch.uint8)
            next_images = torch.empty_like(images)  # noqa: F841  copied to the GPU meanwhile
            logits = torch.func.functional_call(method, tensors, images)
            loss = F.cross_entropy(logits, torch.empty(shape[0], dtype=torch.int64), reduction="sum")
            if loss.requires_grad:
                loss.backward()
            return (states + living.peak) / 2**20

        with torch.inference_mode():
            evaluation = peak(config.eval_batch_size)
        return Prediction(peak(config.batch_size), evaluation)


def _states(group: str, parameters: list[torch.nn.Parameter], config: TrialConfig) -> int:
    """Bytes that a group's optimizer keeps, seen in a step that computes nothing."""
    shapes = [torch.nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters]
    optimizer = make_optimizer(group, shapes, config, config.precision)
    for parameter in shapes:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    return state_bytes(optimizer)


class _Living(TorchDispatchMode):
    """Bytes of the tensors made under it that are still there: `now`, and the most there have been, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Views share their storage: it counts once, until the last of them is gone."""
        address, size = storage._cdata, storage.nbytes()
        if address not in self._storages:
            self._storages.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, address, size).atexit = False

    def _forget(self, address: int, size: int) -> None:
        self._storages.remove(address)
        self.now -= size


class _AutocastOfGpu(TorchFunctionMode):
    """Adds to the CPU's autocast what the GPU's does on top of it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in IN_FP32 and torch.is_autocast_enabled("cpu"):
            args = tree_map_only(torch.Tensor, torch.Tensor.float, args)
        return func(*args, **(kwargs or {}))
