"""Predict how much of a GPU's memory a trial takes, without the GPU, the weights or the data.

The trial's own forward and backward run on fake tensors, which have a shape and a type but no values: nothing is
computed, and the bytes of all tensors that are alive at the same time are added up.

The prediction leaves out the workspaces of cuDNN and cuBLAS, the CUDA context, the allocator's fragmentation, a dataset
that is kept on the device, and resizing and augmentation, which are over before a step reaches its peak.
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
from lorvp.methods.base import Method
from lorvp.models.backbone import Backbone
from lorvp.optim.galore import state_bytes

CLASSES = 1000
"""Number of classes assumed for a dataset that isn't prepared yet."""
FP32_ON_GPU = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax}
"""Functions that autocast runs in fp32 on a GPU, but in the input's type on a CPU, where the fake tensors are."""


@dataclass(frozen=True)
class Prediction:
    """Hold the predicted peak of the memory allocated on one GPU, in MiB."""

    training: float
    """Peak in a training step at `batch_size`."""
    evaluation: float
    """Peak in an evaluation batch of `eval_batch_size`."""

    @property
    def peak(self) -> float:
        """The larger of the two peaks."""
        return max(self.training, self.evaluation)


def predict(config: TrialConfig, classes: int | None = None, gpus: int = 1) -> Prediction:
    """Predict the memory that the trial takes on each of `gpus` GPUs that share its batches.

    `precision: auto` counts as fp16; on a GPU it is fp16 or bf16, which have the same size. `classes` is the number of
    the dataset's classes; if it is None, 1,000 or the backbone's source classes are assumed, whichever is less. Raises
    UserError for a backbone that can't be built.
    """
    plain = config.backbone.model_copy(update={"pretrained": False, "checkpoint": None})
    speed = config.backbone_speed.model_copy(update={"attention_by_products": False})  # which is for CPUs
    backbone = Backbone(plain, "fp16" if config.precision == "auto" else config.precision, speed)
    with torch.device("meta"):  # shapes are enough; a head may be larger than this machine's memory
        method = methods.make(config, backbone, classes or min(CLASSES, backbone.source_classes or CLASSES))
    optimizer_bytes = sum(_optimizer_bytes(method, part, parameters) for part, parameters in method.groups().items())
    with FakeTensorMode(allow_non_fake_inputs=True), _LiveBytes() as live_bytes, _GpuAutocast():
        tensors = {
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, requires_grad=t.requires_grad)
            for name, t in [*method.named_parameters(), *method.named_buffers()]
        }

        def peak(batch_size: int) -> float:
            live_bytes.peak = live_bytes.now
            shape = (math.ceil(batch_size / gpus), 3, backbone.image_size, backbone.image_size)
            images = torch.empty(shape, dtype=torch.uint8)
            next_images = torch.empty_like(images)  # noqa: F841  is copied to the GPU at the same time
            logits = torch.func.functional_call(method, tensors, images)
            loss = F.cross_entropy(logits, torch.empty(shape[0], dtype=torch.int64), reduction="sum")
            if loss.requires_grad:
                torch.autograd.backward(loss)
            return float(optimizer_bytes + live_bytes.peak) / 2**20

        with torch.inference_mode():
            evaluation = peak(config.eval_batch_size)
        return Prediction(peak(config.batch_size), evaluation)


def _optimizer_bytes(method: Method, part: str, parameters: list[torch.nn.Parameter]) -> int:
    """Return the bytes of a part's optimizer state, from a step on the meta device, which computes nothing."""
    shapes = [torch.nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters]
    optimizer = method.make_optimizer(part, shapes, method.config.precision)
    for parameter in shapes:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    return state_bytes(optimizer)


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors made within the block: those alive `now`, and their `peak`."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.now = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage once, until the last tensor that views it is gone."""
        address, size = storage._cdata, storage.nbytes()
        if address not in self._storages:
            self._storages.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._discard, address, size).atexit = False

    def _discard(self, address: int, size: int) -> None:
        self._storages.remove(address)
        self.now -= size


class _GpuAutocast(TorchFunctionMode):
    """Add to the CPU's autocast the fp32 functions of the GPU's."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FP32_ON_GPU and torch.is_autocast_enabled("cpu"):
            args = tree_map_only(torch.Tensor, torch.Tensor.float, args)
        return func(*args, **(kwargs or {}))
