"""Fit a head to the frozen backbone's outputs by logistic regression, as a control or as the start of a trial.

As in scikit-learn and in AnanyaKumar/transfer_learning the fit minimises C · (sum of the cross-entropies) + |W|² / 2;
the bias is not regularised. A small C underfits the head, which leaves errors, and so a gradient, to the prompt.

`fit` fits a head for one C. `head` chooses C among 50 values, which `HeadPath` fits one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lorvp.data.datasets import ArrayImages
from lorvp.errors import TrialFailed
from lorvp.features.cache import cache_folder, compute_once, key
from lorvp.parts import BEST
from lorvp.utils.device import is_out_of_memory
from lorvp.utils.files import replacing

CS = np.logspace(-7, 2, 50)
"""Values of C to choose from, as published: from class frequencies alone to almost no regularisation."""
ITERATIONS = 100
"""Largest number of L-BFGS iterations."""
ROWS_AT_ONCE = 1 << 16
PATH_ROWS_AT_ONCE = 1 << 13
"""Rows in a part of a pass of a `HeadPath`: their logits for 1,000 classes are 33 MB."""
FLATTEST = 1e-6
"""Least curvature along a bias: that of a class which no image is taken for is below rounding."""
TOLERANCE = 3e-7
"""Of a `HeadPath`: the decrease of the mean cross-entropy, in nats, that is not worth another iteration."""
WIDEST = 3072
"""Largest number of features whose principal axes are computed, which takes time by its cube."""
FALL = 10.0
"""Factor of C over which val must have fallen for a scan to end before the largest C."""

Head = tuple[torch.Tensor, torch.Tensor]
"""Weight (classes, d) and bias (classes,), float32."""


def fit(
    x: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    c: float,
    check: Callable[[], None] = lambda: None,
) -> Head:
    """Fit a head with that C to x (N, d) float32 and labels (N,) int64, from zero, on the device of x.

    `check` is called for every ROWS_AT_ONCE rows of a pass, and may raise an exception to end the fit.
    """
    mean = x.mean(0)  # centring keeps the optimum, as the bias is free, and converges sooner
    weight, bias = x.new_zeros(classes, x.shape[1]).requires_grad_(), x.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        total = weight.square().sum() / (2 * c * len(x))
        torch.autograd.backward(total)
        for rows, row_labels in zip(torch.split(x, ROWS_AT_ONCE), torch.split(labels, ROWS_AT_ONCE), strict=True):
            check()
            loss = F.cross_entropy(F.linear(rows - mean, weight, bias), row_labels, reduction="sum") / len(x)
            torch.autograd.backward(loss)
            total = total + loss
        return total.detach()

    optimizer.step(objective)
    weight, bias = weight.detach(), bias.detach()
    return weight, bias - weight @ mean


class HeadPath:
    """Fit heads to x (N, d) float32 and labels (N,) int64 for one C after another, on the device of x.

    Each fit is by L-BFGS, as in `fit`, and takes few passes over x for three reasons:

    - It starts from the three heads before it, which are extrapolated along log C.
    - Its coordinates are the principal axes of x, divided by the square root of the objective's curvature along them,
      class by class. The objective is then about as curved in all directions. The curvature is that of the start.
    - It ends as soon as an iteration gains less than TOLERANCE.

    `check` is called in every pass, once for each of its parts, and may raise an exception to end the fit. Raises
    TrialFailed where an output is infinite or no number.
    """

    def __init__(
        self, x: torch.Tensor, labels: torch.Tensor, classes: int, check: Callable[[], None] = lambda: None
    ) -> None:
        self._labels, self._classes, self._check = labels, classes, check
        self._mean = x.mean(0)
        if not self._mean.isfinite().all():
            raise TrialFailed("the backbone's outputs are not all finite: no head can be fitted to them")
        self._axes = self._principal_axes(x)
        if self._axes is None:
            self._x = x - self._mean
            return
        self._x = torch.empty((len(x), self._axes.shape[1]), device=x.device)
        for rows, out in zip(x.split(PATH_ROWS_AT_ONCE), self._x.split(PATH_ROWS_AT_ONCE), strict=True):
            check()
            torch.mm(rows - self._mean, self._axes, out=out)

    def fit(self, c: float, before: Sequence[tuple[float, Head]] = ()) -> Head:
        """Return the head for `c`; `before` are the values of C until now and their heads, in rising order."""
        weight, bias = self._start(c, before)
        loss, gradient, curvature = self._pass(weight, bias, c, with_curvature=True)
        # The unit of each coordinate is that in which its curvature is 1, so that Newton's step is about the gradient.
        unit = curvature.rsqrt()
        if (gradient * unit).square().sum() / 2 < TOLERANCE:
            return self._in_features(weight, bias)
        # torch divides the first step by the gradient's 1-norm. A common factor of all units makes that norm 1, and the
        # objective is divided by its square, so that the first step is Newton's.
        factor = (gradient * unit).abs().sum().clamp(min=1.0)
        unit = unit * factor
        scale = 1 / factor.double() ** 2
        start = torch.cat([weight, bias[:, None]], 1) / unit
        point = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [point],
            max_iter=ITERATIONS,
            history_size=10,
            tolerance_grad=0.0,
            tolerance_change=TOLERANCE * scale.item(),
            line_search_fn="strong_wolfe",
        )
        known = [(loss, gradient)]  # of the first call, which is at the start

        def objective() -> torch.Tensor:
            values = point.detach() * unit
            loss, gradient = known.pop() if known else self._pass(values[:, :-1], values[:, -1], c)[:2]
            point.grad = gradient * unit * scale.float()
            return loss * scale

        optimizer.step(objective)
        values = point.detach() * unit
        return self._in_features(values[:, :-1], values[:, -1])

    def _principal_axes(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the principal axes as columns (d, min(N, d)); None for the features' own where there are too many."""
        count, width = x.shape
        if min(count, width) > WIDEST:
            return None
        if count < width:  # a regularised head has no part outside the span of the rows
            span: torch.Tensor = torch.linalg.svd(x - self._mean, full_matrices=False).Vh.T
            return span
        covariance = x.new_zeros(width, width)
        for rows in x.split(PATH_ROWS_AT_ONCE):
            self._check()
            covariance.addmm_((rows - self._mean).T, rows - self._mean, alpha=1 / count)
        axes: torch.Tensor = torch.linalg.eigh(covariance).eigenvectors
        return axes

    def _start(self, c: float, before: Sequence[tuple[float, Head]]) -> Head:
        """Extrapolate the last heads to `c`: by the polynomial of log C through three, in the axes' coordinates."""
        if not before:  # the optimum for C = 0: the classes' frequencies
            frequencies = torch.bincount(self._labels, minlength=self._classes) + 0.5
            return self._x.new_zeros(self._classes, self._x.shape[1]), frequencies.log()
        weight, bias = self._x.new_zeros(self._classes, self._x.shape[1]), self._x.new_zeros(self._classes)
        last = [math.log(known) for known, _ in before[-3:]]
        for here, (_, head) in zip(last, before[-3:], strict=True):  # Lagrange's form
            share = math.prod((math.log(c) - other) / (here - other) for other in last if other != here)
            head_weight, head_bias = self._in_axes(*head)
            weight, bias = weight + share * head_weight, bias + share * head_bias
        return weight, bias

    def _in_axes(self, weight: torch.Tensor, bias: torch.Tensor) -> Head:
        return (weight if self._axes is None else weight @ self._axes), bias + weight @ self._mean

    def _in_features(self, weight: torch.Tensor, bias: torch.Tensor) -> Head:
        weight = weight if self._axes is None else weight @ self._axes.T
        return weight, bias - weight @ self._mean

    def _pass(
        self, weight: torch.Tensor, bias: torch.Tensor, c: float, with_curvature: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the objective divided by C · N, float64, its gradient and, if asked for, the Hessian's diagonal.

        The last two are (classes, d + 1) with the bias in the last column.
        """
        count, decay = len(self._x), 1 / (c * len(self._x))
        loss = weight.double().square().sum() * decay / 2
        gradient, bias_gradient = weight * decay, torch.zeros_like(bias)
        curvature, bias_curvature = torch.full_like(weight, decay), torch.full_like(bias, FLATTEST)
        for rows, labels in zip(self._x.split(PATH_ROWS_AT_ONCE), self._labels.split(PATH_ROWS_AT_ONCE), strict=True):
            self._check()
            log_p = torch.addmm(bias, rows, weight.T).log_softmax(1)
            loss -= log_p.gather(1, labels[:, None]).double().sum() / count
            p = log_p.exp_()
            if with_curvature:
                spread = p * (1 - p)
                curvature.addmm_(spread.T, rows.square(), alpha=1 / count)
                bias_curvature += spread.sum(0) / count
            p.scatter_add_(1, labels[:, None], p.new_full((len(labels), 1), -1.0))
            gradient.addmm_(p.T, rows, alpha=1 / count)
            bias_gradient += p.sum(0) / count
        return (
            loss,
            torch.cat([gradient, bias_gradient[:, None]], 1),
            torch.cat([curvature, bias_curvature[:, None]], 1),
        )


def _or_on_cpu(fit: Callable[[torch.device], Head], device: torch.device) -> Head:
    """Fit on `device`, or on the CPU if the device's memory is too small."""
    try:
        return fit(device)
    except RuntimeError as error:
        if device.type == "cpu" or not is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()
    print("out of device memory: the head is fitted on the CPU", flush=True)
    return fit(torch.device("cpu"))


class Scan:
    """Say when a scan over rising values of C may end, as val has fallen for good.

    Val has fallen at a C if two things hold there: its accuracy is below the best so far by more than two standard
    errors of the difference on the same images, and its loss is above the least so far. A scan ends when val has fallen
    at every C of the last factor FALL. A plateau is within the error of the best, and so never ends it; nor does a dip
    at small values of C, where the loss still sinks. A val set of few images hardly ever ends it.
    """

    def __init__(self, x: torch.Tensor, labels: torch.Tensor) -> None:
        self._x, self._labels = x, labels
        self._hits: list[torch.Tensor] = []
        self._losses: list[float] = []

    @property
    def accuracies(self) -> list[float]:
        """Top-1 accuracies of the heads so far, in percent."""
        return [100 * hits.double().mean().item() for hits in self._hits]

    def add(self, head: Head) -> None:
        """Add the head of the next C."""
        logits = F.linear(self._x, *head)
        self._hits.append(logits.argmax(1) == self._labels)
        self._losses.append(F.cross_entropy(logits, self._labels).item())

    def has_fallen(self, cs: Sequence[float]) -> bool:
        """Tell whether larger values than `cs`, one for each head so far, need not be tried."""
        last = [i for i, c in enumerate(cs) if c * FALL >= cs[-1]]
        return cs[0] * FALL < cs[-1] and all(self._fell(i) for i in last)

    def _fell(self, i: int) -> bool:
        best = self._hits[int(np.argmax(self.accuracies))]
        lost, won = (best & ~self._hits[i]).sum().item(), (~best & self._hits[i]).sum().item()
        return lost - won > 2 * math.sqrt(lost + won) and self._losses[i] > min(self._losses)


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
    in rising order; where val has fallen, larger ones are not tried (`Scan`). With `all_images` the head is fitted to
    those images, with the C chosen on `train` and `val`. `check` is called as `fit` does, and may raise an exception to
    end the fits; the next call resumes with the C that was being fitted.
    """
    classes = len(train.class_names)

    def on(images: ArrayImages, where: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return images.pixels.to(where), torch.from_numpy(images.labels).to(where)

    def cached(
        images: ArrayImages, how: tuple[object, ...], fit_on: Callable[[torch.device], Head], where: torch.device
    ) -> Head:
        name = key("probe", images.digest, images.labels.tobytes(), classes, *how, ITERATIONS)
        path = cache_folder() / f"probe-{name}.safetensors"
        with compute_once(path) as missing:
            if missing:
                weight, bias = _or_on_cpu(fit_on, where)
                with replacing(path) as temporary:
                    save_file({"weight": weight.contiguous(), "bias": bias}, temporary)
        tensors = load_file(path, str(device))
        return tensors["weight"], tensors["bias"]

    def fit_one(c: float, images: ArrayImages) -> Head:
        return cached(images, (float(c), None), lambda where: fit(*on(images, where), classes, c, check), device)

    if not isinstance(fit_to, str):
        return fit_one(fit_to, all_images or train)
    paths: dict[torch.device, HeadPath] = {}  # one: where there was room for it
    heads: list[Head] = []
    scan = Scan(*on(val, device))
    tried: list[float] = []

    def fit_next(where: torch.device) -> Head:
        if where not in paths:
            paths.clear()
            paths[where] = HeadPath(*on(train, where), classes, check)
        before = [(c, (weight.to(where), bias.to(where))) for c, (weight, bias) in zip(tried, heads, strict=False)]
        return paths[where].fit(tried[-1], before)

    for c in map(float, cs):
        tried.append(c)
        heads.append(cached(train, ("path", tried, TOLERANCE), fit_next, next(iter(paths), device)))
        scan.add(heads[-1])
        if scan.has_fallen(tried):
            break
    accuracies = scan.accuracies
    threshold = max(accuracies) * (1.0 if fit_to == BEST else float(fit_to.removesuffix("%")) / 100)
    chosen = next(i for i, top1 in enumerate(accuracies) if top1 >= threshold)
    return heads[chosen] if all_images is None else fit_one(cs[chosen], all_images)
