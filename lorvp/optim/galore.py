"""GaLore (Zhao et al. 2024, arXiv:2403.03507): AdamW whose moments live in the gradient's leading singular vectors.

Written from the paper. Where it differs from jiaweizzhao/GaLore, the weights without a projection get what
torch.optim.AdamW gives: eps (1e-8, there 1e-6) is added to the bias-corrected root, and weight decay comes before the
update. A convolution is one matrix, (out, in · kh · kw), not a tensor of modes; the projector is kept without the
singular vectors that it leaves out, and for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from lorvp.errors import UserError

BLOCK = 256
"""Values of an 8-bit moment that share a scale."""
LEAST_8BIT = 4096
"""Values under which a moment stays in float32, as in torchao and bitsandbytes."""


class GaLore(torch.optim.Optimizer):
    """For trainable parameters in float32; lower types are updated in float32 and keep their state in their own.

    A weight of 2 or more dimensions is taken as a matrix (out, rest). Where both its sides are longer than `rank`,
    every `update_gap` of its steps, from the first, the gradient's `rank` leading singular vectors on the shorter side
    become the projector, (shorter, rank). The gradient is projected on it to (longer, rank), or (rank, longer) where
    the matrix is wider than high; Adam's moments have that shape, and are not turned when the projector changes.
    What they say is projected back and taken times `scale`. All other parameters get AdamW, without `scale`.

    `bits` is of the moments, 32 or 8: blockwise dynamic 8-bit codes of torchao, for those of 4,096 values and more that
    divide by 256; projectors stay as they are. `per_layer` updates each parameter as soon as its gradient is there and
    frees that, so `lr` is to be set before `backward`, a backward is a step, and `step` has nothing left to do. Nothing
    can be done with the gradients in between then: no clipping, no GradScaler, no averaging over processes.

    Raises ValueError for a number that can't be, and UserError for 8 bits without torchao.
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
            _eight_bit()  # now, not in the first step
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
        super().add_param_group(param_group)
        if self.per_layer:
            index = len(self.param_groups) - 1  # load_state_dict replaces the groups
            for parameter in self.param_groups[index]["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._update_and_free, index))

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # it takes none
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
                state["projector"] = _leading(matrix, group["rank"]).to(parameter.dtype)
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
        """8-bit moments are plain tensors in it, so that it can be read, weights only, where torchao isn't imported."""
        saved = super().state_dict()
        return saved | {"state": _of_each(_taken_apart, saved["state"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"state": _of_each(_put_together, state_dict["state"])})


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in any optimizer's state, as allocated: moments, projectors, scales, counts of steps."""

    def size(value: Any) -> int:
        if hasattr(value, "__tensor_flatten__"):
            return sum(size(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.untyped_storage().nbytes() if isinstance(value, torch.Tensor) else 0

    return sum(size(value) for state in optimizer.state.values() for value in state.values())


def _leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """(shorter side, rank): the leading singular vectors of a float32 matrix on its shorter side.

    Infinities and NaNs count as 0, where the SVD would raise; the moments keep them.
    """
    u, _, vh = torch.linalg.svd(matrix.nan_to_num(0, 0, 0), full_matrices=False)
    kept = vh[:rank].T if matrix.shape[0] >= matrix.shape[1] else u[:, :rank]
    return kept.clone(memory_format=torch.contiguous_format)  # a view would keep the others allocated


def _zeros(like: torch.Tensor, dtype: torch.dtype, bits: int, signed: bool) -> torch.Tensor:
    if bits == 8 and like.numel() >= LEAST_8BIT and like.numel() % BLOCK == 0:
        return _eight_bit().zeros(like.shape, signed, BLOCK, like.device, dtype)
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def _eight_bit() -> Any:
    """torchao's class of a moment in 8 bits. Raises UserError where it isn't installed."""
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise UserError(f"8-bit GaLore needs torchao ({error}): pip install 'torchao>=0.18,<0.19'") from error
    return OptimState8bit


def _of_each(change: Callable[[Any], Any], states: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {index: {name: change(value) for name, value in state.items()} for index, state in states.items()}


def _taken_apart(value: Any) -> Any:
    if not hasattr(value, "__tensor_flatten__"):
        return value
    names, context = value.__tensor_flatten__()
    return {name: getattr(value, name) for name in names}, context


def _put_together(value: Any) -> Any:
    return _eight_bit().__tensor_unflatten__(*value) if isinstance(value, tuple) else value
