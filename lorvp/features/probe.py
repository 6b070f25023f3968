"""Logistic regression on what the frozen backbone says: the head without a prompt, and one to start a prompt from.

As in scikit-learn and in AnanyaKumar/transfer_learning it minimises C · (sum of the cross-entropies) + |W|² / 2; the
bias is free. C says how far the head is fitted: a small one leaves errors, and so a gradient, to the prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lorvp.config import BEST
from lorvp.data.datasets import ArrayImages
from lorvp.features.cache import cache_folder, key, once
from lorvp.utils.device import is_out_of_memory
from lorvp.utils.files import replacing

CS = np.logspace(-7, 2, 50)
"""From a head that says hardly more than the classes' shares to one without regularisation, as published."""
ITERATIONS = 100
"""Of L-BFGS, at most."""
ROWS_AT_ONCE = 1 << 16

Head = tuple[torch.Tensor, torch.Tensor]
"""Weight (classes, d) and bias (classes,), float32."""


def fit(
    x: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    c: float,
    start: Head | None = None,
    check: Callable[[], None] = lambda: None,
) -> Head:
    """Fit the head of that C to x (N, d) and labels (N,), from zero or from `start`, on the device that x is on.

    `check` is called in every iteration, and may raise what ends the fit.
    """
    mean = x.mean(0)  # the same optimum as without it, as the bias is free, and sooner reached
    weight, bias = start or (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    weight, bias = weight.clone().requires_grad_(), (bias + weight @ mean).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        check()
        optimizer.zero_grad()
        total = weight.square().sum() / (2 * c * len(x))
        total.backward()
        for some, their in zip(x.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True):
            loss = F.cross_entropy(F.linear(some - mean, weight, bias), their, reduction="sum") / len(x)
            loss.backward()
            total = total + loss
        return total.detach()

    optimizer.step(objective)
    weight, bias = weight.detach(), bias.detach()
    return weight, bias - weight @ mean


def _fit_where_it_fits(
    x: torch.Tensor, labels: torch.Tensor, classes: int, c: float, start: Head | None, check: Callable[[], None]
) -> Head:
    """`fit`, on the CPU where the device's memory is too small for it."""
    try:
        return fit(x, labels, classes, c, start, check)
    except RuntimeError as error:
        if x.device.type == "cpu" or not is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()
    print("out of device memory: the head is fitted on the CPU", flush=True)
    return fit(x.cpu(), labels.cpu(), classes, c, start and (start[0].cpu(), start[1].cpu()), check)


def accuracy(head: Head, x: torch.Tensor, labels: torch.Tensor) -> float:
    """In percent."""
    return 100 * (F.linear(x, *head).argmax(1) == labels).double().mean().item()


def head(
    train: ArrayImages,
    val: ArrayImages,
    how_far: float | str,
    device: torch.device,
    cs: np.ndarray = CS,
    whole: ArrayImages | None = None,
    check: Callable[[], None] = lambda: None,
) -> Head:
    """The head for `train`, fitted as far as `TrialConfig.head_fit` says; from the cache, where it is put if missing.

    `train` and `val` are what a backbone says of the images (`frozen.outputs`); `cs`, rising, are those to choose from.
    With `whole` it is the head for those images, with the C that was chosen so. `check` is called in every iteration,
    and may raise what ends the fits: the next call goes on with the C that was under way.
    """
    classes = len(train.class_names)

    def of(c: float, start: Head | None, images: ArrayImages = train) -> Head:
        x, labels = images.pixels.to(device), torch.from_numpy(images.labels).to(device)
        chain = None if start is None else len(cs)  # a head depends a little on the one that it started from
        name = key("probe", images.digest, images.labels.tobytes(), classes, float(c), chain, ITERATIONS)
        path = cache_folder() / f"probe-{name}.safetensors"
        with once(path) as missing:
            if missing:
                weight, bias = _fit_where_it_fits(x, labels, classes, c, start, check)
                with replacing(path) as temporary:
                    save_file({"weight": weight, "bias": bias}, temporary)
        kept = load_file(path, str(device))
        return kept["weight"], kept["bias"]

    if not isinstance(how_far, str):
        return of(how_far, None, whole or train)
    heads: list[Head] = []
    for c in cs:
        heads.append(of(c, heads[-1] if heads else None))
    x, labels = val.pixels.to(device), torch.from_numpy(val.labels).to(device)
    reached = [accuracy(each, x, labels) for each in heads]
    enough = max(reached) * (1.0 if how_far == BEST else float(how_far.removesuffix("%")) / 100)
    chosen = next(i for i, found in enumerate(reached) if found >= enough)
    return heads[chosen] if whole is None else of(cs[chosen], None, whole)
