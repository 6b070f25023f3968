"""What the report's figures have in common: colours that print in grey, tables as pictures, PNG."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

if "matplotlib" in sys.modules:
    import matplotlib
else:  # it refuses to be imported under an MPLBACKEND that it does not know; these figures are files, and need none
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, Locator, MaxNLocator, StrMethodFormatter
from rich.console import Console
from rich.table import Table

DARKER_IS_BETTER = ListedColormap(matplotlib.colormaps["cividis"](np.arange(243, -1, -1)), "darker_is_better")
"""Falls evenly in lightness, so that it says the same in grey; its light end can still be seen on white."""
INK, GREY, CONTROL = "#00224e", "#777777", "#b35900"
LINES, MARKERS = ("-", "--", "-.", ":"), "os^Dvph"
NEAR_THE_TOP = 90.0
"""Once an accuracy in percent is as high, its axis is stretched there: each half of the error takes as much room."""
TICKS = (0, 20, 40, 60, 70, 80, 90, 95, 98, 99, 99.5, 100)
DPI = 110
SMALL = 9
"""Points of the smallest text: 14 pixels."""


def one_plot(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of so many inches, of one plot."""
    figure = Figure((width, height), layout="constrained")
    return figure, figure.add_subplot()


def png(figure: Figure) -> bytes:
    """Return all of the figure, whatever reaches beyond its edges."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight")
    return buffer.getvalue()


def ink_on(colour: tuple[float, ...]) -> str:
    """Black or white: what can be read on a colour (red, green, blue from 0 to 1)."""
    return "black" if lightness(colour) > 0.5 else "white"


def lightness(colour: tuple[float, ...]) -> float:
    """Of a colour in grey, from 0 to 1 (Rec. 601)."""
    return float(np.dot(colour[:3], (0.299, 0.587, 0.114)))


def _stretch(percent: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(100.5 - np.asarray(percent), 1e-6))  # finite at 100, and on the canvas beyond


def _unstretch(stretched: np.ndarray) -> np.ndarray:
    percent: np.ndarray = 100.5 - np.exp(-np.asarray(stretched))
    return percent


def _ticks(low: float, high: float) -> Locator:
    return FixedLocator(TICKS) if sum(low <= tick <= high for tick in TICKS) > 2 else MaxNLocator(5)


def stretch(plot: Axes, low: float, high: float) -> None:
    """Give an upright axis of accuracies from `low` to `high` room for the differences that count."""
    if high >= NEAR_THE_TOP:
        ends = _stretch(np.array([low, high]))
        margin = 0.05 * (ends[1] - ends[0]) or 0.1
        plot.set_yscale("function", functions=(_stretch, _unstretch))
        plot.set_ylim(*_unstretch(ends + np.array([-margin, margin])))
        plot.yaxis.set_major_locator(_ticks(low, high))
        plot.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def stretched_colours(low: float, high: float) -> Normalize:
    """Return the same for the colours of accuracies."""
    return FuncNorm((_stretch, _unstretch), low, high) if high >= NEAR_THE_TOP else Normalize(low, high)


def colour_bar(figure: Figure, colours: Normalize, label: str, plots: list[Axes]) -> None:
    """Add a colour bar for accuracies beside the plots."""
    mappable = ScalarMappable(colours, DARKER_IS_BETTER)
    ticks = _ticks(colours.vmin or 0.0, colours.vmax or 100.0)
    figure.colorbar(mappable, ax=plots, label=label, ticks=ticks, format="{x:g}")


def finish_accuracy_plot(plot: Axes, drawn: list[float], control: float | None, label: str) -> None:
    """Complete a plot with these accuracies upright: the control as a line across, and a legend beside it."""
    if control is not None:
        plot.axhline(control, color=CONTROL, linestyle="-.", label=f"control, {control:.2f} %")
        drawn = [*drawn, control]
    stretch(plot, min(drawn), max(drawn))
    plot.set_ylabel(label)
    plot.grid(alpha=0.3)
    legend_beside(plot)


def legend_beside(plot: Axes) -> None:
    """Put the plot's legend on its right."""
    legend = plot.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=SMALL, frameon=False)
    for handle in filter(None, legend.legend_handles):
        handle.set_alpha(1)


def picture_of(table: Table) -> Figure:
    """Return a table as a terminal shows it."""
    shown = io.StringIO()
    Console(file=shown, width=400, markup=False, emoji=False, highlight=False).print(table)
    text = "\n".join(line.rstrip() for line in shown.getvalue().splitlines())
    figure = Figure((1, 1))  # grows with its text when it is written
    figure.text(0, 1, text, family="monospace", fontsize=SMALL, va="top", linespacing=1.4, parse_math=False)
    return figure
