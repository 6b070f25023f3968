"""The report's figures of the space: where its good configs lie, and which of its axes matter."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from sweeps.report.drawing import DARKER_IS_BETTER, GREY, INK, SMALL, colour_bar, ink_on, one_plot, stretched_colours

# isort: split
# after sweeps.report.drawing, which minds an MPLBACKEND that matplotlib refuses
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from sweeps.results.comparison import val_top1
from sweeps.results.leaderboard import Entry, number
from sweeps.results.outcome import Outcome
from sweeps.spec.model import Axis, Scalar, Spec

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RATES = ("prompt.lr", "optimizer.lr", "adapter.lr", "head.lr")
RANKS = ("prompt.rank", "adapter.rank")
"""A heat map is of the first of these that are axes."""
MOST_VALUES = 12
"""An int axis with more is shown as if it were continuous."""
BINS = 6
"""Cells of a heat map along a continuous axis."""
LONGEST = 16
"""Letters of a value in parallel coordinates."""
WIDEST = 3
"""Heat maps side by side."""
ABSENT = -0.12
"""Where parallel coordinates show that a trial has not this axis."""
NONE = "none"
TREES = 32
"""Of fANOVA: half of Optuna's own number, in half of the time."""
FEWEST = 4
"""Trials to tell an axis's importance from."""
Cell = tuple[int, int]
"""Row and column."""


class Scale:
    """Where the values of an axis lie in a figure.

    They are listed one by one, or lie from 0 to 1 between the axis's ends, by their logarithm where these are a decade
    or more apart. A trial that has not the axis has None there.
    """

    def __init__(self, axis: Axis, trial_values: Iterable[Scalar]) -> None:
        values, trial_values = axis.values(), list(trial_values)
        self._listed: list[Scalar] | None = None
        if values is not None and (axis.choice is not None or len(values) <= MOST_VALUES):
            self._listed = list(dict.fromkeys([*values, *(value for value in trial_values if value is not None)]))
            if all(isinstance(value, int | float) for value in self._listed):
                self._listed.sort()
        self._absent = None in trial_values and None not in (self._listed or ())
        if self._listed is None:
            self._low, self._high = axis.bounds
            self._log = self._low > 0 and self._high >= 10 * self._low

    def cells(self) -> list[str]:
        """Return the label of each cell along the axis."""
        if self._listed is not None:
            names = [number(value) for value in self._listed]
        else:
            edges = [f"{self._value(i / BINS):.2g}" for i in range(BINS + 1)]
            names = [f"{low}\nto {high}" for low, high in pairwise(edges)]
        return names + [NONE] * self._absent

    def cell(self, value: Scalar) -> int:
        """Return which of the cells a value is in."""
        if self._absent and value is None:
            return len(self.cells()) - 1
        return self._listed.index(value) if self._listed is not None else min(int(self.place(value) * BINS), BINS - 1)

    def place(self, value: Scalar) -> float:
        """Along the axis, from 0 to 1."""
        if self._absent and value is None:
            return ABSENT
        if self._listed is not None:
            return self._listed.index(value) / (len(self._listed) - 1) if len(self._listed) > 1 else 0.5
        low, high, value = (
            map(math.log, (self._low, self._high, value)) if self._log else (self._low, self._high, value)
        )
        return float((value - low) / (high - low))

    def ticks(self) -> list[tuple[float, str]]:
        """Places along the axis, and what to write there."""
        if self._listed is not None:
            ticks = [(self.place(value), _short(number(value))) for value in self._listed]
        else:
            ticks = [(place, f"{self._value(place):.2g}") for place in (0, 0.25, 0.5, 0.75, 1)]
        return ticks + [(ABSENT, NONE)] * self._absent

    def _value(self, place: float) -> float:
        if self._log:
            return float(self._low * (self._high / self._low) ** place)
        return self._low + place * (self._high - self._low)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def scale(spec: Spec, name: str, entries: Iterable[Entry]) -> Scale:
    """Of an axis; where the space has none of that name, of one that everything has the same place on."""
    return Scale(spec.space.get(name, Axis(choice=[None])), [entry.params.get(name) for entry in entries])


def heat_map(outcome: Outcome) -> Figure | None:
    """Return the best val accuracy by learning rate and rank, a panel for each label mapping."""
    spec, entries = outcome.spec, [entry for entry in outcome.board.search_entries() if entry.results]
    rank, rate = (next((name for name in names if name in spec.space), "") for names in (RANKS, RATES))
    if not (rank or rate) or not entries:
        return None
    upright, across = scale(spec, rank, entries), scale(spec, rate, entries)
    panels: dict[str, dict[Cell, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        cell = upright.cell(entry.params.get(rank)), across.cell(entry.params.get(rate))
        panels[entry.trial.config.head.kind][cell].append(entry)
    best = [_best_of(trials) for cells in panels.values() for trials in cells.values()]
    colours = stretched_colours(min(best), max(best))
    columns = min(WIDEST, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = max(2.6, 0.75 * len(across.cells())), 1 + 0.5 * len(upright.cells())
    figure = Figure((1.2 + columns * width, 0.6 + rows * height), layout="constrained")
    plots = figure.subplots(rows, columns, squeeze=False).ravel()
    for plot, (mapping, trials_by_cell) in zip(plots, sorted(panels.items()), strict=False):
        _panel(plot, trials_by_cell, (len(upright.cells()), len(across.cells())), colours)
        plot.set_title(mapping, fontsize=10)
        plot.set_xlabel(rate, fontsize=SMALL)
        plot.set_ylabel(rank, fontsize=SMALL)
        plot.set_xticks(range(len(across.cells())), across.cells(), fontsize=SMALL)
        plot.set_yticks(range(len(upright.cells())), upright.cells(), fontsize=SMALL)
    for plot in plots[len(panels) :]:
        plot.set_axis_off()
    colour_bar(figure, colours, "best val top-1 (%)", list(plots))
    return figure


def _panel(plot: Axes, trials_by_cell: dict[Cell, list[Entry]], shape: Cell, colours: Normalize) -> None:
    values = np.full(shape, np.nan)
    for (row, column), trials in trials_by_cell.items():
        best = values[row, column] = _best_of(trials)
        star = "" if any(entry.finished for entry in trials) else "*"
        ink = ink_on(DARKER_IS_BETTER(np.atleast_1d(colours(best)))[0])
        text = f"{best:.1f}{star}\n({len(trials)})"
        plot.text(column, row, text, ha="center", va="center", color=ink, fontsize=SMALL)
    plot.imshow(values, cmap=DARKER_IS_BETTER, norm=colours, aspect="auto", origin="lower")


def _best_of(trials: list[Entry]) -> float:
    """Return the best val top-1 of those that finished; of all, if none did."""
    return max(map(val_top1, [entry for entry in trials if entry.finished] or trials))


def parallel(outcome: Outcome) -> Figure | None:
    """Return a line for each trial through its values on the axes, to its objective."""
    spec, entries = outcome.spec, [entry for entry in outcome.board.search_entries() if entry.results]
    finished = [entry for entry in reversed(entries) if entry.finished]  # the best last, on top
    if not finished:
        return None
    scales = {name: scale(spec, name, entries) for name in spec.space}

    def line(entry: Entry, *end: float) -> list[tuple[int, float]]:
        return list(enumerate([*(side.place(entry.params.get(name)) for name, side in scales.items()), *end]))

    objective = np.array([entry.score(spec) if spec.mode == "max" else -entry.score(spec) for entry in finished])
    low, high = objective.min(), objective.max()
    norm = stretched_colours(low, high) if spec.mode == "max" else Normalize(low, high)
    ends = norm(objective)
    figure, plot = one_plot(min(13, 1.6 * (len(scales) + 1)), 4.5)
    given_up = [line(entry) for entry in entries if not entry.finished]
    plot.add_collection(LineCollection(given_up, colors=GREY, linestyles="dotted", linewidths=0.9, alpha=0.7))
    plot.add_collection(
        LineCollection(
            [line(entry, end) for entry, end in zip(finished, ends, strict=True)],
            colors=DARKER_IS_BETTER(ends if spec.mode == "max" else 1 - ends),
            linewidths=np.linspace(0.8, 2.5, len(finished)),
        )
    )
    last = [(place, number(float(norm.inverse(place)))) for place in ((0, 0.25, 0.5, 0.75, 1) if high > low else (0,))]
    for x, ticks in enumerate([*(side.ticks() for side in scales.values()), last]):
        plot.axvline(x, color="black", linewidth=0.8)
        for y, text in ticks:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
            plot.text(x + 0.03, y, text, va="center", fontsize=SMALL, bbox=box, zorder=3)
    names = [*spec.short_names().values(), spec.objective]
    plot.set(xlim=(-0.1, len(scales) + 0.4), ylim=(ABSENT - 0.06, 1.06), yticks=[])
    plot.set_xticks(range(len(names)), [name.replace(".", ".\n") for name in names])
    plot.spines[:].set_visible(False)
    return figure


def importance(outcome: Outcome) -> Figure | None:
    """Return each axis's share of the variance between finished trials (fANOVA)."""
    entries = [entry for entry in outcome.board.search_entries() if entry.finished]
    fractions = importances(outcome.spec, entries)
    if not fractions:
        return None
    names = outcome.spec.short_names()
    counts = {name: sum(name in entry.params for entry in entries) for name in fractions}
    labels = [f"{names[name]} ({count} trials)" for name, count in counts.items()]
    figure, plot = one_plot(7, 1.2 + 0.35 * len(fractions))
    bars = plot.barh(labels, list(fractions.values()), color=INK)
    plot.bar_label(bars, fmt="%.2f", padding=3, fontsize=SMALL)
    plot.invert_yaxis()
    plot.set(xlim=(0, 1.1), xlabel=f"share of the variance of {outcome.spec.objective}")
    return figure


def importances(spec: Spec, entries: list[Entry]) -> dict[str, float]:
    """Return the fraction of the objective's variance that each axis explains by itself, largest first.

    By fANOVA, a forest of trees (Hutter et al. 2014). Optuna's looks at no axis that some trial has not; so one that
    exists under a condition is judged among the trials that have it, beside the axes that all of these have. Left out
    are axes that too few trials have to tell, or trials that are all as good.
    """
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name in spec.space:
        groups[tuple(i for i, entry in enumerate(entries) if name in entry.params)].append(name)
    fractions_by_axis: dict[str, float] = {}
    for indices, names in groups.items():
        entries_with_axes = [entries[i] for i in indices]
        if len(entries_with_axes) >= FEWEST and len({entry.score(spec) for entry in entries_with_axes}) > 1:
            fractions = _variance_fractions(spec, entries_with_axes)
            fractions_by_axis |= {name: float(fractions[name]) for name in names}
    return dict(sorted(fractions_by_axis.items(), key=lambda one: -one[1]))


def _variance_fractions(spec: Spec, entries: list[Entry]) -> dict[str, float]:
    """Of the axes that all these trials have."""
    import optuna  # which takes seconds to import
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    axes = {name: axis for name, axis in spec.space.items() if all(name in entry.params for entry in entries)}
    distributions = {name: _distribution(axis, name, entries) for name, axis in axes.items()}
    study = optuna.create_study()
    for entry in entries:
        params = {name: entry.params[name] for name in axes}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=entry.score(spec)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of normalize
        return get_param_importances(study, evaluator=FanovaImportanceEvaluator(n_trees=TREES, seed=0), normalize=False)


def _distribution(axis: Axis, name: str, entries: list[Entry]) -> BaseDistribution:
    """As Optuna has it; a choice has the values as the trials spell them."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.choice is not None:
        return CategoricalDistribution(list(dict.fromkeys(entry.params[name] for entry in entries)))
    low, high = axis.bounds
    if axis.integers is not None:
        step = axis.integers[2] if len(axis.integers) > 2 else 1
        return IntDistribution(int(low), int(high) - (int(high) - int(low)) % step, step=step)
    return FloatDistribution(low, high, log=axis.log_uniform is not None)
