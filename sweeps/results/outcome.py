"""A sweep that has ended, read from its folder: for the report, the tables, and whatever else comes after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorvp.errors import UserError
from sweeps import lock
from sweeps.folder import read_spec
from sweeps.results import confirm
from sweeps.results.comparison import Comparison
from sweeps.results.leaderboard import Entry, Leaderboard
from sweeps.results.paired import Gain
from sweeps.spec.model import Spec


@dataclass(frozen=True)
class Outcome:
    """The trials of a sweep, and what their confirmation found, if the spec asks for one."""

    sweep_id: str
    spec: Spec
    board: Leaderboard
    comparison: Comparison | None

    @classmethod
    def read(cls, folder: Path) -> Outcome:
        """Read the sweep in `folder`, which may have moved.

        Raises UserError for a folder without a sweep, one of another version, one that still runs, and one without a
        trial that finished.
        """
        sweep_id, spec = read_spec(folder)
        driver = lock.holder(spec.folder)
        if driver:
            raise UserError(f"{folder}: still running, by {driver}; wait for its end")
        board = Leaderboard.read(spec)
        choices = confirm.chosen(spec) if spec.confirm else None
        outcome = cls(sweep_id, spec, board, Comparison.of(board, choices) if choices is not None else None)
        if outcome.best() is None:
            failed = "; ".join(board.failures()[:2]) or "python sweeps/launch.py SPEC --resume goes on with it"
            raise UserError(f"{folder}: no trial finished ({failed})")
        return outcome

    def best(self) -> Entry | None:
        """Return the trial whose prompt is the best: of those that confirm, where there are any."""
        return self.comparison.best() if self.comparison else self.board.best()

    def control(self) -> Entry | None:
        """Return the trial that the best one is held against."""
        if self.comparison is None:
            return self.board.best(control=True)
        row = self.comparison.control
        return row.entries[0] if row else None

    def gain(self) -> Gain | None:
        """Return the best's gain over the control, over seeds where there is a confirmation; None without a control."""
        return self.comparison.gain() if self.comparison else self.board.gain()

    def verdict(self) -> list[str]:
        """Return the verdict in words, a line each."""
        return self.comparison.verdict() if self.comparison else self.board.verdict()
