"""The points that a search begins with: those that the spec asks for, then some that are spread over the space."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from pydantic import ValidationError

from sweeps.spec.choices import algorithm
from sweeps.spec.model import Axis, Scalar, Spec


def start_points(spec: Spec) -> list[dict[str, Scalar]]:
    """Return `search.try_first`, then as many points of a quasi-random sequence as the algorithm starts with.

    A sequence covers a space of a few axes better than random draws do (Bergstra and Bengio 2012, section 4). A sweep
    has the same points each time: they depend on the space and the search's seed alone.
    """
    count = algorithm(spec.search).start_points(spec)
    points = [dict(point) for point in spec.search.try_first]
    return points + [point for point, _ in zip(_spread(spec), range(count - len(points)), strict=False)]


def _spread(spec: Spec) -> Iterator[dict[str, Scalar]]:
    """Yield valid points of a scrambled Sobol sequence over the axes, each under the conditions of those before."""
    from scipy.stats.qmc import Sobol

    axes = spec.ordered_axes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # its balance needs powers of 2, which is not what we need
        sequence = Sobol(len(axes), scramble=True, rng=spec.search.seed)
        for _ in range(1024):
            point: dict[str, Scalar] = {}
            for place, (name, axis) in zip(sequence.random(1)[0], axes.items(), strict=True):
                in_use = axis.at(point)
                if in_use is not None:
                    point[name] = _value(in_use[1], float(place))
            try:
                spec.trial_config(point)
            except ValidationError:  # values that don't go together
                continue
            yield point


def _value(axis: Axis, place: float) -> Scalar:
    """Return the value of an axis at a place in [0, 1)."""
    values = axis.values()
    if values is not None:
        return values[int(place * len(values))]
    low, high = axis.bounds
    return axis.value_at(place) if axis.integers is None else int(low + place * (high - low + 1))
