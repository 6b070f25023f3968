"""Fit a head to the frozen backbone's outputs by logistic regression, as a control or as the start of a trial.

As in scikit-learn and in AnanyaKumar/transfer_learning the fit minimises C · (sum of the cross-entropies) + |W|² / 2;
the bias is not regularised. A small C underfits the head, which leaves errors, and so a gradient, to the prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lorvp.data.datasets import ArrayImages
from lorvp.features.cache import cache_folder, compute_once, key
from lorvp.parts import BEST
from lorvp.utils.device import is_out_of_memory
from lorvp.utils.files import replacing

CS = np.logspace(-7, 2, 50)
"""Values of C to choose from, as published: from class frequencies alone to almost no regularisation."""
ITERATIONS = 100
"""Largest number of L-BFGS iterations."""
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
    """Fit a head with that C to x (N, d) float32 and labels (N,) int64, from zero or `start`, on the device of x.

    `check` is called in every iteration and may raise an exception to end the fit.
    """
    mean = x.mean(0)  # centring keeps the optimum, as the bias is free, and converges sooner
    weight, bias = start or (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    weight, bias = weight.clone().requires_grad_(), (bias + weight @ mean).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        check()
        optimizer.zero_grad()
        total = weight.square().sum() / (2 * c * len(x))
        torch.autograd.backward(total)
        for rows, row_labels in zip(torch.split(x, ROWS_AT_ONCE), torch.split(labels, ROWS_AT_ONCE), strict=True):
            loss = F.cross_entropy(F.linear(rows - mean, weight, bias), row_labels, reduction="sum") / len(x)
            torch.autograd.backward(loss)
            total = total + loss
        return total.detach()

    optimizer.step(objective)
    weight, bias = weight.detach(), bias.detach()
    return weight, bias - weight @ mean


def _fit_or_fall_back_to_cpu(
    x: torch.Tensor, labels: torch.Tensor, classes: int, c: float, start: Head | None, check: Callable[[], None]
) -> Head:
    """Fit as `fit` does, but on the CPU if the device's memory is too small."""
    try:
        return fit(x, labels, classes, c, start, check)
    except RuntimeError as error:
        if x.device.type == "cpu" or not is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()
    print("out of device memory: the head is fitted on the CPU", flush=True)
    return fit(x.cpu(), labels.cpu(), classes, c, start and (start[0].cpu(), start[1].cpu()), check)


def accuracy(head: Head, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the top-1 accuracy of a head on x (N, d) and labels (N,), in percent."""
    return 100 * (F.linear(x, *head).argmax(1) == labels).double().mean().item()


def head(
    train: ArrayImages,
    val: ArrayImages,
    fit_to: float | str,
    device: torch.device,
    cs: np.ndarray = CS,
    all_images: ArrayImages | None = None,
    check: Callable[[], None] = lambda: None,
) -> Head:
    """Return the head for `train` that `head.fit` asks for; it is fitted if the cache does not hold it.

    `train` and `val` hold a backbone's outputs (`lorvp.features.cache.get`). `cs` are the values of C to choose from,
    in rising order. With `all_images` the head is fitted to those images, with the C chosen on `train` and `val`.
    `check` is called in every iteration and may raise an exception to end the fits; the next call resumes with the C
    that was being fitted.
    """
    classes = len(train.class_names)

    def fit_cached(c: float, start: Head | None, images: ArrayImages = train) -> Head:
        x, labels = images.pixels.to(device), torch.from_numpy(images.labels).to(device)
        chain = None if start is None else len(cs)  # a head depends a little on the one that it started from
        name = key("probe", images.digest, images.labels.tobytes(), classes, float(c), chain, ITERATIONS)
        path = cache_folder() / f"probe-{name}.safetensors"
        with compute_once(path) as missing:
            if missing:
                weight, bias = _fit_or_fall_back_to_cpu(x, labels, classes, c, start, check)
                with replacing(path) as temporary:
                    save_file({"weight": weight, "bias": bias}, temporary)
        tensors = load_file(path, str(device))
        return tensors["weight"], tensors["bias"]

    if not isinstance(fit_to, str):
        return fit_cached(fit_to, None, all_images or train)
    heads: list[Head] = []
    for c in cs:
        heads.append(fit_cached(c, heads[-1] if heads else None))
    x, labels = val.pixels.to(device), torch.from_numpy(val.labels).to(device)
    accuracies = [accuracy(head, x, labels) for head in heads]
    threshold = max(accuracies) * (1.0 if fit_to == BEST else float(fit_to.removesuffix("%")) / 100)
    chosen = next(i for i, top1 in enumerate(accuracies) if top1 >= threshold)
    return heads[chosen] if all_images is None else fit_cached(cs[chosen], None, all_images)
