"""The device that a trial trains on: what it is, what its errors mean, and batches that are too large for it."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "status_alloc_failed", "cublas_status_not_initialized")
"""What torch, CUDA, cuBLAS and cuDNN say, in small letters, where memory is used up.

cuBLAS says that it is not initialised where it finds no room for its workspace (pytorch/pytorch#54789).
"""
SICK = (
    *("ecc error", "gpu is lost", "fallen off the bus", "hardware stack error", "driver/library version mismatch"),
    *("busy or unavailable", "no cuda-capable device", "no cuda gpus are available", "found no nvidia driver"),
    *("driver initialization failed", "system not yet initialized", "cuda unknown error", "nvlink"),
    *("cudnn_status_internal_error", "cudnn_status_execution_failed", "cudnn_status_not_initialized"),
    *("cublas_status_internal_error", "cublas_status_execution_failed", "ncclinternalerror", "ncclsystemerror"),
    *("nccl error: internal", "nccl error: unhandled system", "unhandled cuda error"),
)
"""What is said, in small letters, where a GPU or its driver is not in order: another node may do the same work."""


class NoGpu(RuntimeError):
    """A job was given a GPU, and torch can't use it."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Give the exception, and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory was used up, in the words of Python, torch, CUDA, cuBLAS or cuDNN."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in OUT_OF_MEMORY)


@contextmanager
def where_it_fits() -> Iterator[None]:
    """Leave the block, and go on after it, where memory is too small for what it does."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise


def is_sick(error: BaseException) -> bool:
    """Say whether a GPU or its driver is at fault, and neither the trial nor its size."""
    text = str(error).lower()
    return isinstance(error, NoGpu) or (isinstance(error, RuntimeError) and any(word in text for word in SICK))


def require_gpu() -> None:
    """Raise NoGpu, with the reason, where torch has no GPU."""
    if torch.cuda.is_available():
        return
    try:
        torch.cuda.init()
        reason = "CUDA counts none"
    except Exception as error:  # torch raises several kinds
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
    raise NoGpu(f"the job was given a GPU, and torch {torch.__version__} can use none: {reason}{_driver_in_words()}")


@cache
def name(device: torch.device) -> str:
    """Name the device as its maker does: the GPU, or the machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@cache
def driver(device: torch.device) -> str:
    """Give the version of NVIDIA's driver for a GPU; empty for a CPU, and where there is none."""
    if device.type != "cuda":
        return ""
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""
    return next((word for word in line.split() if word[0].isdigit() and "." in word), "")


def _driver_in_words() -> str:
    version = driver(torch.device("cuda"))
    return f" (driver {version}, torch for CUDA {torch.version.cuda})" if version else ""


class MicroBatches:
    """Take batches in as many parts as the device's memory needs; what has fitted once is remembered."""

    def __init__(self, size: int) -> None:
        self.size = size
        """Images that go through the model together."""

    def run(
        self,
        work: Callable[..., Any],
        *batch: torch.Tensor,
        may_split: bool = True,
        undo: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """Give what `work` gives of each part of `batch`, tensors of as many rows each.

        `undo` takes back what was done of a batch before its memory was used up. Raises what `work` raises, running out
        of memory with a single image included.
        """
        rows = len(batch[0])
        while True:
            size = min(self.size, rows)
            try:
                return [work(*part) for part in zip(*(tensor.split(size) for tensor in batch), strict=True)]
            except Exception as error:
                if size == 1 or not may_split or not is_out_of_memory(error):
                    raise
            # outside of the handler, as the error holds on to what is to be freed
            self.size = math.ceil(size / 2)
            undo()
            torch.cuda.empty_cache()
            print(f"out of device memory: batches of {rows} are taken {self.size} at a time", flush=True)
