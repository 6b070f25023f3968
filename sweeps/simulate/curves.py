"""The learning curves of a replay: recorded by an earlier sweep, or of a stated family."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorvp.config import TrialConfig
from lorvp.errors import UserError
from sweeps.spec.model import Axis, Scalar, Spec

CEILING, FALL, EFFECT, NOISE, APPROACH = 90.0, 10.0, 1.0, 0.3, 0.2
"""Of `Family`: its docstring says what each does."""


@dataclass(frozen=True)
class Curve:
    """A trial's epochs: the objective after each, and the seconds that each takes."""

    values: list[float]
    seconds: list[float]
    known: int
    """The first so many epochs are known; the others only repeat."""


class Curves(Protocol):
    """Where a replay takes its learning curves from."""

    def curve(self, config: TrialConfig, control: bool) -> Curve:
        """Return the curve of `config`, as long as its epochs."""

    def describe(self) -> str:
        """Describe the curves in words."""


class RecordedCurves:
    """The curves in the `results.parquet` of a sweep with the same axes (`Leaderboard.write_parquet`).

    A trial takes the curve of the nearest recorded one; the control takes a recorded control's, if there is any.
    Distances are Euclidean over the axes: uniform, log_uniform and int are scaled to [0, 1] between their ends,
    log_uniform by its logarithm; two values of a choice are 1 apart, and so is an axis that only one of the two trials
    has. Of several as near, the first by name is taken. A curve that is longer than the trial is cut; a shorter one
    goes on with its last value and its mean seconds.

    Raises UserError for a file that can't be read, or that isn't such a table.
    """

    def __init__(self, path: Path, spec: Spec, epoch_seconds: float | None = None) -> None:
        self.path = path
        self._spec = spec
        self._epoch_seconds = epoch_seconds
        self._numbers: dict[str, int] = {}
        rows = _read(path, spec)
        trials: dict[str, list[dict[str, Any]]] = {}
        for row in sorted(rows, key=lambda row: (row["trial"], row["epoch"])):
            trials.setdefault(row["trial"], []).append(row)
        self._groups = {}
        for control in (False, True):
            curves = [epochs for epochs in trials.values() if epochs[0]["control"] == control]
            points = [self._point([epochs[0][f"param.{axis}"] for axis in spec.space]) for epochs in curves]
            if curves:
                self._groups[control] = (np.array(points), curves)
        if False not in self._groups:
            raise UserError(f"{path}: holds no trial but the control's; it must be the results.parquet of a search")

    def curve(self, config: TrialConfig, control: bool) -> Curve:
        """Return the nearest recorded curve, as long as the config's epochs."""
        points, curves = self._groups.get(control) or self._groups[False]
        own = self._point(list(on_axes(config, self._spec).values()))
        apart = points - own
        for i, axis in enumerate(self._spec.space.values()):
            if axis.choice is not None:
                apart[:, i] = apart[:, i] != 0
        missing = np.isnan(points), np.isnan(own)
        apart[missing[0] & missing[1]] = 0
        apart[missing[0] != missing[1]] = 1
        epochs = curves[np.argmin((apart**2).sum(axis=1))]
        values = [row[self._spec.objective] for row in epochs]
        seconds = [self._epoch_seconds or row["seconds"] for row in epochs]
        more = max(0, config.epochs - len(epochs))
        mean = sum(seconds) / len(seconds)
        return Curve(
            (values + [values[-1]] * more)[: config.epochs], (seconds + [mean] * more)[: config.epochs], len(epochs)
        )

    def describe(self) -> str:
        """Describe where the curves come from."""
        count = sum(len(curves) for _, curves in self._groups.values())
        seconds = f"{self._epoch_seconds:g} s an epoch" if self._epoch_seconds else "their own seconds an epoch"
        return (
            f"each trial takes the curve of the nearest of {count} in {self.path}: axes scaled to [0, 1] "
            f"(log_uniform by its logarithm), another choice is 1 apart; {seconds}"
        )

    def _point(self, values: list[Scalar]) -> list[float]:
        """Return where a trial with these values on the axes lies, scaled; nan on an axis that it has not."""
        return [
            math.nan if value is None else self._scaled(name, axis, value)
            for (name, axis), value in zip(self._spec.space.items(), values, strict=True)
        ]

    def _scaled(self, name: str, axis: Axis, value: Scalar) -> float:
        if axis.choice is not None:  # numbered by their text: that is what a column of mixed types was written as
            return self._numbers.setdefault(str(value), len(self._numbers))
        low, high = axis.bounds
        if isinstance(value, str) or (axis.log_uniform and value <= 0):
            raise UserError(f"{self.path}: param.{name} holds {value!r}, which is no value between {low} and {high}")
        return axis.place(value)


def _read(path: Path, spec: Spec) -> list[dict[str, Any]]:
    """Return the rows of `path`, one per epoch per trial."""
    needed = ["trial", "control", "epoch", "seconds", spec.objective]
    columns = [*needed, *(f"param.{axis}" for axis in spec.space)]
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --curves takes a sweep's results.parquet") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: can't be read as Parquet ({reason}); --curves takes a results.parquet") from None
    for column in columns:
        if column not in table.column_names:
            raise UserError(f"{path}: no column {column}; it must be the results.parquet of a sweep with these axes")
    for column in needed:
        if table[column].null_count or not len(table):
            raise UserError(f"{path}: {column} has no value in some row; each row must be an epoch of a trial")
    for column in ("epoch", "seconds", spec.objective):
        if not (pa.types.is_integer(table[column].type) or pa.types.is_floating(table[column].type)):
            raise UserError(f"{path}: {column} holds {table[column].type}; it must hold numbers")
    rows: list[dict[str, Any]] = table.select(columns).to_pylist()
    return rows


class AssumedCurves:
    """Curves that rise exponentially to a ceiling: epoch e of E gives ceiling * (1 - exp(-e / (0.2 E))) % top-1.

    The ceiling is 90 %, less 10 points times the square of how many decades each learning rate of the space (an axis
    whose name ends in lr) is from the middle of its axis. Each value of another choice axis adds an effect, each epoch
    noise, normal with deviations of 1 and 0.3 points, by `seed`. Other axes, and those that a trial has not, change
    nothing. val_top5 is the same; val_loss is -ln(top-1 / 100 %). Every epoch takes `epoch_seconds`.
    """

    def __init__(self, spec: Spec, epoch_seconds: float, seed: int) -> None:
        self._spec = spec
        self._epoch_seconds = epoch_seconds
        self._seed = seed

    def curve(self, config: TrialConfig, control: bool) -> Curve:
        """Return the config's assumed curve, as long as its epochs."""
        ceiling = CEILING
        for name, value in on_axes(config, self._spec).items():
            axis = self._spec.space[name]
            if value is not None and name.endswith("lr"):
                middle = (math.log10(min(axis.examples())) + math.log10(max(axis.examples()))) / 2
                ceiling -= FALL * (math.log10(value) - middle) ** 2
            elif value is not None and axis.choice is not None:
                ceiling += self._draws(f"{name}={value}").normal(0, EFFECT)
        epochs = np.arange(1, config.epochs + 1)
        rise = 1 - np.exp(-epochs / (APPROACH * config.epochs))
        top1 = np.clip(ceiling * rise + self._draws(config.content_hash()).normal(0, NOISE, config.epochs), 0.01, 100)
        values = -np.log(top1 / 100) if self._spec.objective == "val_loss" else top1
        return Curve(values.tolist(), [self._epoch_seconds] * config.epochs, config.epochs)

    def _draws(self, name: str) -> np.random.Generator:
        """Return the same for the same name, in whatever order they are asked for."""
        return np.random.default_rng([self._seed, zlib.crc32(name.encode())])

    def describe(self) -> str:
        """Describe the assumption."""
        return (
            "learning curves are assumed, not recorded: an exponential rise to a ceiling that falls off with each "
            f"learning rate's distance from the middle of its axis; {self._epoch_seconds:.4g} s an epoch"
        )


def on_axes(config: TrialConfig, spec: Spec) -> dict[str, Scalar]:
    """Return the trial's values on the axes of the space; None where one has no effect."""
    values = spec.params(config)
    return {axis: values.get(axis) for axis in spec.space}
