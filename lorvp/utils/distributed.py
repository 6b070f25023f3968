"""Communicate between the processes that train one trial: average gradients, add up sums, broadcast a decision.

Without a process group every function here behaves as for a single process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed as dist
from torch import nn


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank, from 0, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce_sum(sums: torch.Tensor) -> torch.Tensor:
    """Return the elementwise sum of `sums` over all processes, with the same shape and dtype."""
    if dist.is_initialized():
        sums = sums.clone()
        dist.all_reduce(sums)
    return sums


def wrap_ddp(module: nn.Module) -> nn.Module:
    """Wrap `module` so that its gradients become the mean over all processes."""
    if not dist.is_initialized():
        return module
    return nn.parallel.DistributedDataParallel(module, forward_sync_buffers=False)  # none of them moves in a forward


def broadcast_flag(ask: Callable[[], bool]) -> bool:
    """Return the first process's answer in every process; `ask` is called in the first one only."""
    if not dist.is_initialized():
        return ask()
    flag = torch.tensor(dist.get_rank() == 0 and ask())
    dist.broadcast(flag, src=0)
    return bool(flag)
