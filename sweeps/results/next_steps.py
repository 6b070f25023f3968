"""What to do after a sweep: confirm it, look beyond an edge of its space, try what no trial has tried to its end."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorvp.bundle.format import describe
from lorvp.errors import UserError
from lorvp.utils.yaml_file import format_value
from sweeps.folder import Command, read_command
from sweeps.results.leaderboard import Entry, number
from sweeps.results.outcome import Outcome
from sweeps.results.paired import WORSE
from sweeps.spec import file as spec_file
from sweeps.spec.choices import algorithm
from sweeps.spec.model import DEFAULT_SEEDS, Axis, Scalar, Spec

MOST = 3
EDGE = 0.05
"""Of a range's width, on its own scale: what lies so near to an end lies at it."""
DIGITS = 3
"""Of an end of a range that is proposed."""
FEWEST_NUMBERS = 3
"""Of a choice, for its first and last to be edges: of two numbers the best is always one."""


def next_steps(outcome: Outcome) -> list[str]:
    """Return what to do next, at most three lines, the most useful first; each ends in a command that can be given.

    A command that the sweep's own spec would refuse is left out.
    """
    best = outcome.best()
    if best is None:
        return []
    confirmation, others = [*_confirmation(outcome, best)], [*_edges(outcome, best), *_untried(outcome, best)]
    gain = outcome.gain()
    is_worse = gain is not None and gain.in_words() == WORSE  # there is hardly a gain to confirm
    found = [*others, *confirmation] if is_worse else [*confirmation, *others]
    command, lines = read_command(outcome.spec.folder), []
    for what, suffix, values in found:
        text = _command(command, outcome.spec, suffix, values)
        if text is not None:
            lines.append(f"{what}: {text}")
    return lines[:MOST]


Step = tuple[str, str, dict[str, Any]]
"""What to do, in words; the end of another sweep's name, or nothing to go on with this one; values by key for --set."""


def _confirmation(outcome: Outcome, best: Entry) -> Iterator[Step]:
    """Train the best and the control again under new seeds, where the spec asks for no confirmation."""
    if outcome.spec.confirm is None and best.trial.config.dataset.holds_back:
        yield f"confirm it under {DEFAULT_SEEDS} new seeds", "", {"confirm.added_later": True}


def _edges(outcome: Outcome, best: Entry) -> Iterator[Step]:
    """Search beyond the end of an axis at which the best lies."""
    spec, names = outcome.spec, outcome.spec.short_names()
    for name, number_of_range, axis, value in _numeric_axes(spec, best):
        found = _beyond(axis, value, _largest(best, name))
        if found is None or not all(_is_valid(spec, best.params | {name: end}) for end in found[1].examples()):
            continue
        end, moved = found
        whole = spec.space[name]
        ranges = [moved if i == number_of_range else one for i, one in enumerate(whole.ranges or [whole])]
        dumped = [one.model_dump(mode="json", by_alias=True, exclude_defaults=True) for one in ranges]
        changed = dumped if whole.ranges else dumped[0]
        yield f"{name} {number(value)} is at the {end} end of its values", names[name], {f"space.{name}": changed}


def _untried(outcome: Outcome, best: Entry) -> Iterator[Step]:
    """Try the best at a value, or in a half of a range, in which no trial has come to its end."""
    spec = outcome.spec
    if spec.search.equal is not None:  # each value has to have a trial
        return
    finished = [entry for entry in outcome.board.search_entries() if entry.finished]
    for name, whole in spec.space.items():
        in_use = whole.at(best.params)
        if name not in best.params or in_use is None or name.endswith("seed"):
            continue
        values = [entry.params[name] for entry in finished if name in entry.params]
        what, untried = _gaps(in_use[1], [value for value in values if in_use[1].contains(value)])
        points = [point for value in untried if (point := _point(spec, best.params, name, value)) is not None]
        if points:
            search = {"search.trials": len(points), "search.try_first": points}
            grid = {"search.algorithm": "random"} if algorithm(spec.search).takes_every_cell else {}
            suffix = f"{spec.short_names()[name]}-untried"
            yield f"no trial with {name} {what} came to its end", suffix, grid | search


def _numeric_axes(spec: Spec, best: Entry) -> Iterator[tuple[str, int, Axis, float]]:
    """Yield each axis of numbers on which the best has a value: its name, the range in use with its number, the value.

    Seeds are no such axis: their order means nothing.
    """
    for name, whole in spec.space.items():
        value, in_use = best.params.get(name), whole.at(best.params)
        if in_use is not None and not name.endswith("seed") and value is not None and _is_number(value):
            yield name, *in_use, value


def _largest(best: Entry, name: str) -> float:
    """Return the largest value of an axis that does more than smaller ones: B·A has at most the rank of an image."""
    if name != "prompt.rank":
        return math.inf
    try:
        side: int = describe(best.bundle)["source"]["image_size"]
    except UserError:  # the bundle is gone
        return math.inf
    return side


def _beyond(axis: Axis, value: float, largest: float) -> tuple[str, Axis] | None:
    """Return the end at which the value lies and an axis that goes on there, up to `largest`; None if there is none.

    A range keeps its width, and has the old end in its middle; a choice keeps its number of values.
    """
    if axis.choice is not None:
        numbers = sorted(axis.choice, key=float) if all(map(_is_number, axis.choice)) else []
        if len(numbers) < FEWEST_NUMBERS or value not in (numbers[0], numbers[-1]):
            return None
        upper = value == numbers[-1]
        ordered = numbers if upper else numbers[::-1]
        beyond = min(_continued(ordered), largest)
        if upper and beyond <= value:
            return None
        changed: dict[str, Any] = {"choice": sorted([*ordered[1:], beyond], key=float)}
        return ("upper" if upper else "lower"), axis.model_copy(update=changed)
    low, high = axis.bounds
    place = axis.place(value)
    if EDGE < place < 1 - EDGE:
        return None
    upper = place > 0.5
    shift = 0.5 if upper else -0.5
    ends: list[float] = [_rounded(axis.value_at(shift)), _rounded(axis.value_at(1 + shift))]
    if axis.integers is not None:
        step = (*axis.integers, 1)[2]
        steps = math.ceil((high - low) / 2 / step) * step * (1 if upper else -1)
        ends = [axis.integers[0] + steps, axis.integers[1] + steps, *axis.integers[2:]]
    ends[1] = min(ends[1], largest)
    if upper and ends[1] <= value:
        return None
    kind = "log_uniform" if axis.log_uniform else "uniform" if axis.uniform else "integers"
    ends_of_kind = ends if axis.integers is not None else tuple(ends)
    return ("upper" if upper else "lower"), axis.model_copy(update={kind: ends_of_kind})


def _continued(numbers: Sequence[float]) -> float:
    """Return the number after the last three: by their difference if that is constant, else by their ratio."""
    first, second, last = numbers[-3:]
    if math.isclose(second - first, last - second) or min(first, second, last) <= 0:
        beyond = last + (last - second)
    else:
        beyond = last * last / second
    return round(beyond) if all(isinstance(each, int) for each in numbers) and beyond >= 1 else _rounded(beyond)


def _gaps(axis: Axis, values: Sequence[Scalar]) -> tuple[str, list[Scalar]]:
    """Name the values of a choice, or the half of a range, that are not among `values`; return those to try.

    The list is empty where there are none.
    """
    if axis.choice is not None:
        untried = [value for value in axis.choice if value not in values]
        return " or ".join(map(number, untried)), untried
    places = [axis.place(value) for value in values]
    low, high = axis.bounds
    middle = axis.value_at(0.5)
    if not any(place >= 0.5 for place in places):
        return f"from {number(_rounded(middle))} to {number(high)}", [_between(axis, 0.75)]
    if not any(place < 0.5 for place in places):
        return f"from {number(low)} to {number(_rounded(middle))}", [_between(axis, 0.25)]
    return "", []


def _between(axis: Axis, place: float) -> float:
    """Return a value of the axis near that share of its width."""
    value = axis.value_at(place)
    if axis.integers is None:
        return _rounded(value)
    step = (*axis.integers, 1)[2]
    return axis.integers[0] + round((value - axis.integers[0]) / step) * step


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _is_number(value: Scalar) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _point(spec: Spec, params: dict[str, Scalar], name: str, value: Scalar) -> dict[str, Scalar] | None:
    """Return the best's point with another value on an axis, without the axes that it then has no use for.

    None where the values don't go together.
    """
    wanted, point = params | {name: value}, {}
    for key, exact in wanted.items():
        in_use = spec.space[key].at(wanted)
        if in_use is not None and in_use[1].contains(exact):
            short = _rounded(exact) if isinstance(exact, float) else exact
            point[key] = short if in_use[1].contains(short) else exact
    return point if name in point and _is_valid(spec, point) else None


def _is_valid(spec: Spec, params: dict[str, Scalar]) -> bool:
    try:
        spec.trial_config(params)
    except ValidationError:
        return False
    return True


def _command(command: Command | None, spec: Spec, suffix: str, values: dict[str, Any]) -> str | None:
    """Return the command that carries out a step; None where the spec's file, as it is now, refuses it.

    The file is called SPEC where it is not known or not here.
    """
    file, overrides = ("SPEC", []) if command is None else (command.file, list(command.overrides))
    if suffix:
        overrides = [each for each in overrides if not each.startswith("name=")] + [f"name={spec.name}-{suffix}"]
    overrides += [f"{key}={format_value(value)}" for key, value in values.items()]
    try:
        spec_file.load(Path(file), overrides)
    except UserError:
        if Path(file).is_file():
            return None
        file = "SPEC"
    arguments = [part for override in overrides for part in ("--set", override)]
    return shlex.join(["python", "sweeps/launch.py", file, *["--resume"] * (not suffix), *arguments])
