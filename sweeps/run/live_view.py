"""Shows a sweep while it runs: each epoch as a line, or a live view on a terminal; and ends one that only fails."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from cluster.job_manager import JobManager
from cluster.scan import FollowedTrial
from cluster.trial_folder import State
from sweeps.results.leaderboard import number
from sweeps.spec.model import Spec, Stage


class GivenUp(Exception):
    """Too many trials have failed from the start (`failure_limit`)."""


@dataclass
class Progress:
    """What the follower has shown of an open trial."""

    trial: FollowedTrial
    control: bool
    stage: Stage
    label: str
    epochs: int = 0
    last: float | None = None
    best: float | None = None


@dataclass(frozen=True)
class EndedTrial:
    """What is left of a trial that has ended."""

    state: State
    control: bool
    best: float | None


class Follower:
    """Shows what trials record. `show` is told of each trial with news."""

    def __init__(self, spec: Spec, manager: JobManager, console: Console) -> None:
        self.spec = spec
        self.manager = manager
        self.console = console
        self.resuming = True
        """While it is told what an earlier driver has seen: that is neither shown nor counted."""
        self._total = spec.number_of_trials() + len(spec.control_configs())
        self._confirming: set[str] = set()  # what the trials of the confirmation are called, once it goes on
        self._controls = spec.control_names()
        self._names = spec.short_names()
        self._better = max if spec.mode == "max" else min
        self._open: dict[str, Progress] = {}
        self._counts: Counter[State] = Counter()  # of the search's trials that have ended
        self._best: float | None = None  # of those that finished
        self._to_beat: float | None = None  # the best of the controls
        self._confirmed: dict[str, EndedTrial] = {}
        self._outcomes: list[State] = []  # of the search's trials that ended since the driver started, in that order
        self._ended_now = 0  # trials of this stage that this driver has seen end
        self._shown_reasons: set[str] = set()
        self._start = time.monotonic()
        live = Live(console=console, get_renderable=self.view, refresh_per_second=2)
        self._live = live if console.is_terminal else None

    def start(self) -> None:
        """Start to show and count what is new."""
        self.resuming = False
        if self._live:
            self._live.start()

    def stop(self) -> None:
        """Stop the live view."""
        if self._live:
            with suppress(OSError):  # the terminal may be gone
                self._live.stop()

    def confirm(self, names: set[str]) -> None:
        """From here on it is the confirmation that goes on, by the trials of these names."""
        self._confirming, self._total = names, len(names)
        self._start, self._ended_now = time.monotonic(), 0

    def check(self) -> None:
        """Say why jobs wait. Raises GivenUp where too many trials have failed."""
        waits = Counter(str(state) for state in list(self.manager.states.values()) if state.waiting and state.reason)
        waits += Counter(list(self.manager.troubles.values()))
        for reason in waits.keys() - self._shown_reasons:
            self.warn(f"waiting: {waits[reason]} of the jobs {reason}")
        self._shown_reasons = set(waits)
        limit = self.spec.failure_limit
        failed = self._outcomes[: limit.trials].count(State.FAILED)
        more_to_come = not self._confirming and len(self._outcomes) < self._total
        if failed > limit.share * limit.trials and more_to_come:
            raise GivenUp(f"{failed} of the first {len(self._outcomes)} trials failed (failure_limit)")

    def warn(self, text: str) -> None:
        """Print a warning."""
        with suppress(OSError):
            self.console.print(text, style="yellow", markup=False, highlight=False)

    def show(self, trial: FollowedTrial) -> None:
        """Show what is new of a trial."""
        progress = self._open.get(trial.name) or self._begin(trial)
        end = trial.ended()
        for result in trial.results()[progress.epochs :]:
            self._show_epoch(progress, result)
        if end is None:
            return
        del self._open[trial.name]
        if not self._live and not self.resuming and end.state != State.FINISHED:
            self.console.print(f"{self._label(progress)}  {end}", markup=False, highlight=False)
        self._ended_now += not self.resuming
        if progress.stage == Stage.CONFIRM:
            self._confirmed[trial.name] = EndedTrial(end.state, progress.control, progress.best)
            return
        self._counts[end.state] += 1
        if not self.resuming:
            self._outcomes.append(end.state)
        if end.state == State.FINISHED and progress.best is not None:
            if progress.control:
                self._to_beat = self._better_of(self._to_beat, progress.best)
                if not self._live and not self.resuming:
                    self.console.print(f"to beat: {self.spec.objective} {number(self._to_beat)}, the control's")
            else:
                self._best = self._better_of(self._best, progress.best)

    def _better_of(self, before: float | None, value: float) -> float:
        return value if before is None else self._better(before, value)

    def _begin(self, trial: FollowedTrial) -> Progress:
        values = self.spec.params(trial.config)
        label = " ".join(f"{name}={number(values[axis])}" for axis, name in self._names.items() if axis in values)
        stage = self.spec.stage(trial.config)
        if stage == Stage.CONFIRM:
            label = f"confirm  {label} seed={trial.config.order_seed}"
        self._open[trial.name] = Progress(trial, trial.name in self._controls, stage, label)
        return self._open[trial.name]

    def _show_epoch(self, progress: Progress, result: dict[str, Any]) -> None:
        value = result[self.spec.objective]
        progress.epochs = result["epoch"]
        progress.last = value
        progress.best = self._better_of(progress.best, value)
        if not self._live and not self.resuming:
            line = f"epoch {progress.epochs}/{progress.trial.config.epochs}  {self.spec.objective} {value:.2f}"
            self.console.print(f"{self._label(progress)}  {line}", markup=False, highlight=False)

    def _label(self, progress: Progress) -> str:
        return f"{progress.trial.name}  {'control  ' if progress.control else ''}{progress.label}"

    def view(self) -> Group:
        """Return the live view: running trials, and a line that sums up."""
        confirming = self._confirming
        rows = [
            progress
            for progress in list(self._open.values())
            if (progress.trial.name in confirming if confirming else progress.stage == Stage.SEARCH)
        ]
        table = Table(title=f"sweep {self.spec.name}", title_justify="left", box=None)
        for column in ("trial", "job", "epoch", self.spec.objective, "best", "config"):
            table.add_column(column, overflow="fold")
        for row in rows:
            if row.trial.job():
                state = self.manager.states.get(row.trial.name)
                job = self.manager.troubles.get(row.trial.name) or (f"{state} {state.node}" if state else "")
                config = f"{'control ' if row.control else ''}{row.label}"
                epochs = f"{row.epochs}/{row.trial.config.epochs}"
                table.add_row(row.trial.name, job, epochs, number(row.last), number(row.best), config)
        counts, best = self._counts, self._best
        if confirming:
            ended = [end for name, end in list(self._confirmed.items()) if name in confirming]
            counts = Counter(end.state for end in ended)
            values = [end.best for end in ended if end.state == State.FINISHED and not end.control]
            best = self._better((value for value in values if value is not None), default=None)
        trials = "trials of the confirmation" if confirming else "trials"
        to_beat = "" if self._to_beat is None or confirming else f", {number(self._to_beat)} to beat"
        summary = (
            f"{len(rows) + counts.total()} of {self._total} {trials} begun: {counts[State.FINISHED]} finished, "
            f"{counts[State.STOPPED]} stopped early, {counts[State.FAILED]} failed; "
            f"best so far {number(best)}{to_beat}; {self._time_left(self._total - counts.total())} left"
        )
        return Group(table, summary)

    def _time_left(self, trials: int) -> str:
        """Return the seconds that so many trials take, at the rate since this driver started."""
        if not self._ended_now:
            return "unknown time"
        seconds = (time.monotonic() - self._start) / self._ended_now * trials
        return f"about {seconds / 60:.0f} min" if seconds > 90 else f"about {seconds:.0f} s"
