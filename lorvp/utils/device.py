"""Name the device that a trial trains on, interpret its errors, and split batches that are too large for it."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "status_alloc_failed", "cublas_status_not_initialized")
"""Lower-case parts of the messages of torch, CUDA, cuBLAS and cuDNN when memory is used up.

cuBLAS reports that it is not initialised when it finds no room for its workspace (pytorch/pytorch#54789).
"""
GPU_FAULTS = (
    *("ecc error", "gpu is lost", "fallen off the bus", "hardware stack error", "driver/library version mismatch"),
    *("busy or unavailable", "no cuda-capable device", "no cuda gpus are available", "found no nvidia driver"),
    *("driver initialization failed", "system not yet initialized", "cuda unknown error", "nvlink"),
    *("cudnn_status_internal_error", "cudnn_status_execution_failed", "cudnn_status_not_initialized"),
    *("cublas_status_internal_error", "cublas_status_execution_failed", "ncclinternalerror", "ncclsystemerror"),
    *("nccl error: internal", "nccl error: unhandled system", "unhandled cuda error"),
)
"""Lower-case parts of the messages of a faulty GPU or driver; the same work may succeed on another node."""


class NoGpu(RuntimeError):
    """Report that a job was given a GPU that torch can't use."""


def exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the exception and then its causes, the nearest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception of Python, torch, CUDA, cuBLAS or cuDNN means that memory was used up."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in OUT_OF_MEMORY)


@contextmanager
def suppress_out_of_memory() -> Iterator[None]:
    """Suppress out-of-memory errors: leave the block and continue after it. Other errors are raised."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise


def is_gpu_fault(error: BaseException) -> bool:
    """Tell whether a GPU or its driver is at fault, and not the trial or its size."""
    text = str(error).lower()
    return isinstance(error, NoGpu) or (isinstance(error, RuntimeError) and any(word in text for word in GPU_FAULTS))


def require_gpu() -> None:
    """Raise NoGpu with the reason if torch can't use a GPU."""
    if torch.cuda.is_available():
        return
    try:
        cast(Callable[[], None], torch.cuda.init)()
        reason = "CUDA counts none"
    except Exception as error:  # torch raises several kinds
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
    raise NoGpu(f"the job was given a GPU, and torch {torch.__version__} can use none: {reason}{_describe_driver()}")


@cache
def name(device: torch.device) -> str:
    """Return the model name of the GPU, or of the machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@cache
def driver(device: torch.device) -> str:
    """Return the version of NVIDIA's driver for a GPU; an empty string for a CPU or without a driver."""
    if device.type != "cuda":
        return ""
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""
    return next((word for word in line.split() if word[0].isdigit() and "." in word), "")


def _describe_driver() -> str:
    version = driver(torch.device("cuda"))
    return f" (driver {version}, torch for CUDA {torch.version.cuda})" if version else ""


class MicroBatches:
    """Split batches into parts that fit in the device's memory, and remember the size that fitted."""

    def __init__(self, size: int) -> None:
        self.size = size
        """Largest number of images that go through the model together."""

    def run(
        self,
        work: Callable[..., Any],
        *batch: torch.Tensor,
        may_split: bool = True,
        undo: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """Call `work` on each part of `batch` and return the list of its results.

        `batch` holds tensors with the same number of rows. When memory is used up, `undo` is called to take back what
        the parts before have done, and the batch starts again with parts of half the size. Raises what `work` raises,
        also when a single image does not fit, or when `may_split` is false.
        """
        rows = len(batch[0])
        while True:
            size = min(self.size, rows)
            try:
                return [work(*part) for part in zip(*(torch.split(tensor, size) for tensor in batch), strict=True)]
            except Exception as error:
                if size == 1 or not may_split or not is_out_of_memory(error):
                    raise
            # outside of the handler, as the error holds on to what is to be freed
            self.size = math.ceil(size / 2)
            undo()
            torch.cuda.empty_cache()
            print(f"out of device memory: batches of {rows} are taken {self.size} at a time", flush=True)
