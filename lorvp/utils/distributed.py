"""What the processes that train one trial do together: average gradients, add up sums, go by one answer.

Without a process group every function here answers for a trial alone in its process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed as dist
from torch import nn


def share() -> tuple[int, int]:
    """Which process this is, from 0, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(sums: torch.Tensor) -> torch.Tensor:
    """The sum of what the processes have."""
    if dist.is_initialized():
        sums = sums.clone()
        dist.all_reduce(sums)
    return sums


def averaged(module: nn.Module) -> nn.Module:
    """`module`, whose gradients are from now on the mean of the processes'."""
    if not dist.is_initialized():
        return module
    return nn.parallel.DistributedDataParallel(module, forward_sync_buffers=False)  # none of them moves in a forward


def agreed(ask: Callable[[], bool]) -> bool:
    """The first process's answer, given to all of them."""
    if not dist.is_initialized():
        return ask()
    answer = torch.tensor(dist.get_rank() == 0 and ask())
    dist.broadcast(answer, src=0)
    return bool(answer)
