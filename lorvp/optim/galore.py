"""Implement GaLore (Zhao et al. 2024, arXiv:2403.03507): AdamW with moments in the gradient's leading singular space.

Written from the paper. It differs from jiaweizzhao/GaLore where that differs from torch.optim.AdamW on weights without
a projection: eps (1e-8, there 1e-6) is added to the bias-corrected root, and weight decay comes before the update. A
convolution is one matrix, (out, in · kh · kw), not a tensor of modes. The projector holds no unused singular vectors,
and is part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from lorvp.errors import UserError

BLOCK = 256
"""Number of values of an 8-bit moment that share a scale."""
LEAST_8BIT = 4096
"""Smallest number of values for an 8-bit moment; smaller ones stay in float32, as in torchao and bitsandbytes."""


class GaLore(torch.optim.Optimizer):
    """Optimize with AdamW on gradients projected to a low rank.

    Parameters are in float32; lower types are updated in float32 and keep their state in their own type.

    A weight of 2 or more dimensions is a matrix (out, rest). If both its sides are longer than `rank`, the gradient's
    `rank` leading singular vectors on the shorter side become the projector, (shorter, rank), at the first of its
    steps and then every `update_gap` steps. The gradient is projected to (longer, rank), or to (rank, longer) if the
    matrix is wider than high. Adam's moments have that shape, and stay when the projector changes. Their update is
    projected back and multiplied by `scale`. All other parameters get AdamW without `scale`.

    `bits` is the width of the moments, 32 or 8: torchao's blockwise dynamic 8-bit codes, for moments of at least 4,096
    values whose number is a multiple of 256. Projectors keep their type. `per_layer` updates each parameter as soon as
    its gradient is complete and frees the gradient: set `lr` before `backward`, a backward is a step, and `step` does
    nothing. This excludes gradient clipping, GradScaler and averaging over processes.

    Raises ValueError for a number out of range, and UserError for 8 bits without torchao.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        rank: int = 128,
        update_gap: int = 200,
        scale: float = 0.25,
        bits: int = 32,
        per_layer: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if rank < 1 or update_gap < 1 or bits not in (8, 32):
            raise ValueError(f"rank {rank}, update_gap {update_gap}, bits {bits}: from 1, from 1, and 8 or 32")
        if bits == 8:
            _eight_bit_class()  # now, not in the first step
        self.per_layer = per_layer
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "rank": rank,
                "update_gap": update_gap,
                "scale": scale,
                "bits": bits,
                "betas": betas,
                "eps": eps,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch; with `per_layer`, also the hooks that update its parameters."""
        super().add_param_group(param_group)
        if self.per_layer:
            index = len(self.param_groups) - 1  # load_state_dict replaces the groups
            for parameter in self.param_groups[index]["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._update_and_free, index))

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # it takes none
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update_and_free(self, index: int, parameter: torch.Tensor) -> None:
        self._update(parameter, self.param_groups[index])
        parameter.grad = None

    @torch.no_grad()
    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state, gradient = self.state[parameter], parameter.grad.float()
        matrix = gradient.flatten(1) if gradient.ndim > 1 else gradient[None]
        low_rank = min(matrix.shape) > group["rank"]
        step = state.setdefault("step", 0)
        if low_rank:
            if step % group["update_gap"] == 0:
                state["projector"] = _leading_singular_vectors(matrix, group["rank"]).to(parameter.dtype)
            projector = state["projector"].float()
            tall = matrix.shape[0] >= matrix.shape[1]
            gradient = matrix @ projector if tall else projector.T @ matrix
        if step == 0:
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                state[name] = _zeros(gradient, parameter.dtype, group["bits"], signed)
        state["step"] = step + 1

        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].float().lerp(gradient, 1 - beta1)
        square = state["exp_avg_sq"].float().lerp(gradient.square(), 1 - beta2)
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)
        root = square.sqrt_().div_((1 - beta2 ** state["step"]) ** 0.5).add_(group["eps"])
        update = mean.div_(1 - beta1 ** state["step"]).div_(root)
        if low_rank:
            update = (update @ projector.T if tall else projector @ update).mul_(group["scale"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view_as(parameter), alpha=group["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state with 8-bit moments as plain tensors, so that it loads weights-only without torchao."""
        saved = super().state_dict()
        return saved | {"state": _map_states(_flatten_subclass, saved["state"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Raises UserError for 8-bit moments without torchao."""
        super().load_state_dict(state_dict | {"state": _map_states(_unflatten_subclass, state_dict["state"])})


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the allocated bytes of all tensors in any optimizer's state: moments, projectors, scales, step counts."""

    def size(value: Any) -> int:
        if hasattr(value, "__tensor_flatten__"):
            return sum(size(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.untyped_storage().nbytes() if isinstance(value, torch.Tensor) else 0

    return sum(size(value) for state in optimizer.state.values() for value in state.values())


def _leading_singular_vectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the leading singular vectors of a float32 matrix on its shorter side: (shorter side, rank).

    Infinities and NaNs count as 0, because the SVD would raise on them; the moments keep them.
    """
    u, _, vh = torch.linalg.svd(matrix.nan_to_num(0, 0, 0), full_matrices=False)
    vectors: torch.Tensor = vh[:rank].T if matrix.shape[0] >= matrix.shape[1] else u[:, :rank]
    return vectors.clone(memory_format=torch.contiguous_format)  # a view would keep the other vectors allocated


def _zeros(like: torch.Tensor, dtype: torch.dtype, bits: int, signed: bool) -> torch.Tensor:
    if bits == 8 and like.numel() >= LEAST_8BIT and like.numel() % BLOCK == 0:
        moment: torch.Tensor = _eight_bit_class().zeros(like.shape, signed, BLOCK, like.device, dtype)
        return moment
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def _eight_bit_class() -> Any:
    """Import torchao's class of an 8-bit moment. Raises UserError if torchao isn't installed."""
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise UserError(f"8-bit GaLore needs torchao ({error}): pip install 'torchao>=0.18,<0.19'") from error
    return OptimState8bit


def _map_states(change: Callable[[Any], Any], states: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {index: {name: change(value) for name, value in state.items()} for index, state in states.items()}


def _flatten_subclass(value: Any) -> Any:
    if not hasattr(value, "__tensor_flatten__"):
        return value
    names, context = value.__tensor_flatten__()
    return {name: getattr(value, name) for name in names}, context


def _unflatten_subclass(value: Any) -> Any:
    return _eight_bit_class().__tensor_unflatten__(*value) if isinstance(value, tuple) else value
