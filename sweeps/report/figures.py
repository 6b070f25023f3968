"""The parts of a sweep's report: tables and figures, each made of its outcome."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from sweeps.report.drawing import (
    CONTROL,
    GREY,
    INK,
    LINES,
    MARKERS,
    SMALL,
    finish_accuracy_plot,
    legend_beside,
    one_plot,
)

# isort: split
# after sweeps.report.drawing, which minds an MPLBACKEND that matplotlib refuses
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from PIL import Image
from rich.table import Table

from cluster import profile as profiles
from cluster.trial_folder import State
from lorvp.bundle.format import EXAMPLE, PICTURE, PROMPTED, describe
from lorvp.errors import UserError
from sweeps.report.space_figures import heat_map, importance, parallel
from sweeps.results.comparison import METRICS, Comparison, val_top1
from sweeps.results.leaderboard import Entry, number
from sweeps.results.outcome import Outcome
from sweeps.spec.model import Scalar, Spec

MOST_ROWS = 50
MOST_NAMES = 40
"""Bars that are labelled."""
MOST_NUMBERS = 20
"""Bars with their value above."""
PROMPTS = 3
SPLITS: list[dict[str, Any]] = [
    {"color": INK, "marker": "o", "linestyle": "none"},
    {"color": GREY, "marker": "s", "linestyle": "none"},
]
"""Of val and test."""
STYLES: dict[State | None, dict[str, Any]] = {
    State.FINISHED: {"color": INK, "linestyle": "-", "linewidth": 1.0, "alpha": 0.7},
    State.STOPPED: {"color": GREY, "linestyle": "--", "linewidth": 0.8, "alpha": 0.6},
    State.FAILED: {"color": CONTROL, "linestyle": ":", "linewidth": 1.2, "alpha": 0.9},
    None: {"color": GREY, "linestyle": "-.", "linewidth": 0.8, "alpha": 0.6},
}
"""Of a trial's learning curve, by how it ended."""


class Section(NamedTuple):
    """A section of the report: its title, its table or figure, and the text below."""

    title: str
    make: Callable[[Outcome], Figure | Table | None]
    caption: str
    otherwise: str
    """Said where there is nothing to show."""


def leaderboard(outcome: Outcome) -> Table:
    """Make the table of the best trials."""
    return outcome.board.table(MOST_ROWS)


def confirmation(outcome: Outcome) -> Table | None:
    """Make the table of the confirmation; None where there is none."""
    return outcome.comparison.table() if outcome.comparison else None


def failures(outcome: Outcome) -> Table | None:
    """Draw a table of the failures, by cause."""
    entries = outcome.board.entries
    failed = [(entry.trial.name, entry.end) for entry in entries if entry.end and entry.end.state == State.FAILED]
    if not failed:
        return None
    table = Table("cause", "trial", title=outcome.board.failures()[0], title_justify="left", box=None)
    table.add_column("reason", max_width=100, overflow="fold")
    for name, end in sorted(failed, key=lambda one: str(one[1].cause))[:MOST_ROWS]:
        table.add_row(str(end.cause or "-"), name, end.reason)
    if len(failed) > MOST_ROWS:
        table.add_row("", "", f"and {len(failed) - MOST_ROWS} more: python sweeps/launch.py SPEC --status has them")
    return table


def curves(outcome: Outcome) -> Figure | None:
    """Val top-1 by epoch, a line for each trial of the search."""
    entries = [entry for entry in outcome.board.search_entries() if entry.results]
    if not entries:
        return None
    figure, plot = one_plot(9, 5)
    counts, best = Counter(map(_state, entries)), outcome.board.best()
    crowd = min(1.0, max(0.25, MOST_ROWS / len(entries)))
    labels = {state: f"{state or 'unfinished'} ({count})" for state, count in counts.items()}
    for entry in entries:
        state = _state(entry)
        style = STYLES[state] | {"alpha": crowd * STYLES[state]["alpha"], "label": labels.pop(state, None)}
        if len(entry.results) == 1:
            style |= {"marker": "."}
        if state == State.FAILED:
            style |= {"marker": "x", "markevery": [-1]}
        epochs, top1 = zip(*((result["epoch"], result["val_top1"]) for result in entry.results), strict=True)
        plot.plot(epochs, top1, gid=entry.trial.name, **style)
        if entry is best:
            label = f"best, {entry.trial.name}"
            plot.plot(epochs, top1, color="black", linewidth=2.5, marker="o", zorder=4, label=label)
    results = [result for entry in entries for result in entry.results]
    if rung := max((result["epoch"] for result in results if not result["whole"]), default=0):
        plot.axvspan(0.5, rung + 0.5, color="black", alpha=0.06, label="at a rung: smaller images or fewer")
    plot.set_xlabel("epoch")
    plot.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish_accuracy_plot(plot, [result["val_top1"] for result in results], _control(outcome), "val top-1 (%)")
    return figure


def _state(entry: Entry) -> State | None:
    return entry.end.state if entry.end else None


def _control(outcome: Outcome) -> float | None:
    """Return the val top-1 of the search's control."""
    control = outcome.board.best(control=True)
    return val_top1(control) if control else None


def budget(outcome: Outcome) -> Figure | None:
    """Return the best val top-1 so far by the seconds that the search had taken; a line for each arm of it."""
    spec, steps = outcome.spec, _best_by_seconds(outcome)
    if not steps:
        return None
    figure, plot = one_plot(9, 4.5)
    for (value, points), line, marker in zip(steps.items(), cycle(LINES), cycle(MARKERS), strict=False):
        equal = spec.search.equal
        label = f"{spec.short_names()[equal]} {number(value)}" if equal else "best so far"
        style: dict[str, Any] = {"linestyle": line, "marker": marker, "markevery": max(1, len(points) // 8)}
        seconds, top1 = zip(*points, strict=True)
        plot.step(seconds, top1, where="post", label=label, markersize=5, **style)
    plot.set_xlabel(f"{_device(spec)[1]} of the search, all its trials together")
    drawn = [best for points in steps.values() for _, best in points]
    finish_accuracy_plot(plot, drawn, _control(outcome), "best val top-1 so far (%)")
    return figure


def _best_by_seconds(outcome: Outcome) -> dict[Scalar, list[tuple[float, float]]]:
    """Return for each arm of the search, after each epoch, the seconds so far and the best val top-1 of finished ones.

    Trials that were packed share their epochs' seconds.
    """
    spec, steps = outcome.spec, {}
    gpus = _device(spec)[0]
    for value in spec.arms():
        entries = [entry for entry in outcome.board.search_entries() if spec.arm(entry.trial.config) == value]
        epochs = sorted(((r["time"], r, entry) for entry in entries for r in entry.results), key=lambda epoch: epoch[0])
        seconds, best, points = 0.0, 0.0, []
        for _, result, entry in epochs:
            seconds += gpus * result["seconds"] / result["packed"]
            if entry.finished and result["whole"]:
                best = max(best, result["val_top1"])
            if best:
                points.append((seconds, best))
        if points:
            steps[value] = points
    return steps


def _device(spec: Spec) -> tuple[int, str]:
    """GPUs of a job, and what its seconds are."""
    try:
        profile = profiles.load(spec.cluster)
    except UserError:  # somebody's own file, which is no longer there
        profile = None
    if profile and profile.gres:
        return profile.gpus, "GPU-seconds"
    return 1, "seconds (a GPU's where the jobs had one, else a CPU's)"


def gain(outcome: Outcome) -> Figure | None:
    """Draw the difference of each config to the control; of the confirmation, if there is one."""
    if outcome.comparison:
        return _confirmed_gain(outcome.comparison)
    control = _control(outcome)
    finished = [entry for entry in outcome.board.search_entries() if entry.finished]
    if control is None or not finished:
        return None
    gains = sorted(((val_top1(entry) - control, entry.trial.name) for entry in finished), reverse=True)
    figure, plot = one_plot(max(5, min(11, 2 + 0.32 * len(gains))), 4.5)
    label = "val top-1 less the control's (points)"
    sizes = [abs(points) for points, _ in gains]
    if max(sizes) > 10 * max(1, median(sizes)):  # one that learnt nothing would hide all the others
        plot.set_yscale("symlog", linthresh=1)
        plot.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        label += ",\nlogarithmic beyond 1"
    plot.set_ylabel(label)
    colours = [INK if points > 0 else GREY for points, _ in gains]
    bars = plot.bar(range(len(gains)), [points for points, _ in gains], color=colours)
    plot.axhline(0, color=CONTROL, linestyle="-.")
    if len(gains) <= MOST_NUMBERS:
        plot.bar_label(bars, fmt="%+.1f", fontsize=SMALL, padding=2)
        plot.margins(y=0.1)
    if len(gains) <= MOST_NAMES:
        plot.set_xticks(range(len(gains)), [name for _, name in gains], rotation=90, fontsize=SMALL)
    else:
        plot.set_xlabel(f"the {len(gains)} trials that finished, best first")
    return figure


def _confirmed_gain(comparison: Comparison) -> Figure | None:
    control = comparison.control
    if control is None:
        return None
    rows = [row for row in comparison.rows if not row.choice.control and row.difference(control, val_top1)]
    if not rows:
        return None
    figure, plot = one_plot(max(6, 2 + 1.2 * len(rows)), 4.5)
    for (name, figured), style, aside in zip(METRICS.items(), SPLITS, (-0.1, 0.1), strict=True):
        found = [row.difference(control, figured) for row in rows]
        for place, each in enumerate(found):
            if each is None:
                continue
            reach = None if each.low is None or each.high is None else [[each.mean - each.low], [each.high - each.mean]]
            label = name if each is found[0] else None
            plot.errorbar([place + aside], [each.mean], yerr=reach, label=label, capsize=5, **style)
            side = "right" if aside < 0 else "left"
            plot.text(place + 1.5 * aside, each.mean, f"{each.mean:+.2f}", ha=side, va="bottom", fontsize=SMALL)
    plot.axhline(0, color=CONTROL, linestyle="-.", label="control")
    plot.set_xlim(-0.6, len(rows) - 0.3)
    values = [f"\n{number(row.value)}" if row.value is not None else "" for row in rows]
    labels = [f"{row.choice.trial}{value}" for row, value in zip(rows, values, strict=True)]
    plot.set_xticks(range(len(rows)), labels, fontsize=SMALL, rotation=30 if len(rows) > 4 else 0)
    plot.set_ylabel("top-1 less the control's (points)")
    legend_beside(plot)
    return figure


def prompts(outcome: Outcome) -> Figure | None:
    """Return the prompts of the best trials: as pictures, by singular values, and on an image."""
    finished = [entry for entry in [outcome.best(), *outcome.board.search_entries()] if entry and entry.finished]
    best = list({entry.trial.name: entry for entry in finished}.values())[:PROMPTS]
    read = [(entry, *_prompt(entry.bundle)) for entry in best]
    if all(spectrum is None for _, spectrum, _ in read):
        return None
    figure = Figure((11.5, 3.1 * len(read)), layout="constrained")
    for row, (entry, spectrum, reason) in zip(figure.subfigures(len(read), squeeze=False)[:, 0], read, strict=True):
        names = outcome.spec.short_names()
        params = ", ".join(f"{names[axis]} {number(value)}" for axis, value in entry.params.items())
        title = textwrap.shorten(f"{entry.trial.name}, val top-1 {val_top1(entry):.2f} %: {params}", 130)
        row.suptitle(title, fontsize=10, parse_math=False)
        if spectrum is None:
            row.text(0.5, 0.5, textwrap.fill(reason, 100), ha="center", va="center", fontsize=SMALL, parse_math=False)
            continue
        plots = row.subplots(1, 4)
        _spectrum(plots[1], spectrum["singular_values"])
        bundle = entry.bundle
        largest = f"the prompt: grey is 0,\nfull contrast ±{spectrum['largest']:.3g}"
        for plot, name, what in (
            (plots[0], PICTURE, largest),
            (plots[2], EXAMPLE, "an image of the\nvalidation set"),
            (plots[3], PROMPTED, "the same with\nthe prompt"),
        ):
            _picture(plot, bundle / name, what)
    return figure


def _prompt(bundle: Path) -> tuple[dict[str, Any] | None, str]:
    """Return a bundle's description of its prompt; or None, and the reason."""
    try:
        spectrum = describe(bundle).get("prompt")
    except UserError as error:
        return None, f"no prompt to show: {error}"
    return spectrum, "no prompt to show: the method has none on the image"


def _spectrum(plot: Axes, singular_values: list[list[float]]) -> None:
    for values, name, line, marker in zip(singular_values, ("red", "green", "blue"), LINES, MARKERS, strict=False):
        plot.plot(
            range(1, len(values) + 1), values, color=name, linestyle=line, marker=marker, markersize=4, label=name
        )
    plot.set_title("singular values", fontsize=SMALL)
    plot.xaxis.set_major_locator(MaxNLocator(integer=True))
    plot.tick_params(labelsize=SMALL)
    plot.set_ylim(bottom=0)
    plot.legend(fontsize=SMALL, frameon=False)


def _picture(plot: Axes, path: Path, what: str) -> None:
    plot.set_axis_off()
    plot.set_title(what, fontsize=SMALL)
    if path.exists():
        plot.imshow(Image.open(path), interpolation="nearest")
    else:
        plot.text(0.5, 0.5, f"no {path.name}\nin the bundle", ha="center", va="center", fontsize=SMALL)


NOTHING = "No trial of the search has a result."
SECTIONS = {
    "leaderboard": Section(
        "Leaderboard",
        leaderboard,
        f"The best {MOST_ROWS} trials of the search, finished ones first, and the control; results.parquet has every "
        "epoch of all.",
        NOTHING,
    ),
    "confirmation": Section(
        "Confirmation",
        confirmation,
        "The best configs trained again under each seed: mean ± sd, with n trials.",
        "This sweep has no confirmation: each figure here is of one seed, and the best is in part the luckiest.",
    ),
    "gain": Section(
        "Gain over the control",
        gain,
        "Points of top-1 beyond the control: of each trial that finished (val); where there is a confirmation, the "
        "mean over seeds with its 95 % t interval.",
        "There is no control that finished, or nothing to hold against it.",
    ),
    "heat_map": Section(
        "Learning rate and rank",
        heat_map,
        "In each cell the best val top-1, of the trials in brackets. With a star: none of them finished, so that is "
        "what they had reached when they ended. 'none': without this axis.",
        "The space has neither a learning rate nor a rank, or no trial has a result.",
    ),
    "curves": Section(
        "Learning curves",
        curves,
        "Val top-1 after each epoch of the search's trials; a cross is where a trial failed. Once 90 % is reached, "
        "each half of the error takes as much room.",
        NOTHING,
    ),
    "parallel": Section(
        "Parallel coordinates",
        parallel,
        "Each line is a trial of the search, darker and thicker the better; dotted ones did not finish. 'none': "
        "without this axis.",
        NOTHING,
    ),
    "importance": Section(
        "Importance of each axis",
        importance,
        "How much of the differences between the trials of the search that finished each axis explains by itself "
        "(Optuna's fANOVA, of the objective). An axis that only some of them have, as its condition says, is judged "
        "among these. Of few trials, or of a search that soon turned to good values, it says little.",
        "Too few trials finished to tell (4 are needed), or all did as well.",
    ),
    "budget": Section(
        "Accuracy against time",
        budget,
        "The best val top-1 so far of the trials that came to finish, by the seconds of all epochs of the search until "
        "then; the control's are not counted, and packed trials share theirs.",
        NOTHING,
    ),
    "prompts": Section(
        "The best prompts",
        prompts,
        "The prompts of the best trials, their singular values in each colour, and an image without and with them.",
        "None of the best trials' bundles says anything of a prompt on the image: their methods have none, or they "
        "were written by an older version.",
    ),
    "failures": Section("Failures", failures, "Every trial that failed, by cause.", "No trial failed."),
}
"""What the report holds, in its order, by the name of its picture."""
