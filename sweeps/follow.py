"""Follows a running sweep: submits and watches jobs, sends epochs to MLflow, shows what goes on.

One thread of the driver does it, beside Tune, by reading the trials' folders. Nothing is lost when MLflow is away or
the driver is killed: what was not sent is still in the folders.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from cluster.folder import End, State, TrialFolder
from cluster.relay import Relay
from sweeps.leaderboard import number
from sweeps.spec import Spec
from sweeps.tracking import Tracker, flatten

POLL_SECONDS = 0.5


@dataclass
class Progress:
    """What the follower has seen of a trial."""

    trial: TrialFolder
    control: bool
    label: str
    epochs: int = 0
    last: float | None = None
    best: float | None = None
    end: End | None = None
    closed: bool = False
    seen_before: int = field(default=0)
    """Epochs that were there when the driver started: they say nothing about how fast it goes."""


class Follower(threading.Thread):
    """Runs until `finish` or `halt`. What goes wrong on the way is shown, and tried again at the next look."""

    def __init__(self, spec: Spec, relay: Relay, tracker: Tracker, console: Console) -> None:
        super().__init__(name="follower", daemon=True)
        self.spec = spec
        self.relay = relay
        self.tracker = tracker
        self.console = console
        self.total = spec.number_of_trials() + len(spec.control_configs())
        self._controls = {config.content_hash() for config in spec.control_configs()}
        self._progress: dict[str, Progress] = {}
        self._halt = threading.Event()
        self._trouble = ""
        self._start = time.monotonic()
        for trial in TrialFolder.requested(spec.trials):
            self._see(trial).seen_before = len(trial.results())

    def run(self) -> None:
        live = Live(console=self.console, get_renderable=self.view, refresh_per_second=2) if self._terminal else None
        if live:
            live.start()
        try:
            while not self._halt.wait(POLL_SECONDS):
                self.look()
        finally:
            if live:
                live.stop()

    @property
    def _terminal(self) -> bool:
        return self.console.is_terminal

    def look(self) -> None:
        """One look at everything."""
        try:
            self.relay.poll()
            for trial in TrialFolder.requested(self.spec.trials):
                self._follow(self._see(trial))
            self._trouble = ""
        except Exception as error:  # MLflow, the disk and the cluster fail in their own ways; the next look may not
            trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            if trouble != self._trouble:
                self._trouble = trouble
                self.console.print(f"trying again: {trouble}", style="yellow", markup=False)

    def halt(self) -> None:
        """Stops looking."""
        self._halt.set()
        self.join()

    def finish(self, patience: float = 60.0) -> bool:
        """Waits for all trials to end, then stops looking. False if something could not be sent to MLflow in time."""
        while self.relay.open_trials():
            time.sleep(POLL_SECONDS)
        self.halt()
        deadline = time.monotonic() + patience
        while True:
            self.look()
            if not self._trouble:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)

    def _see(self, trial: TrialFolder) -> Progress:
        if trial.name not in self._progress:
            values = flatten(trial.config.canonical())
            names = self.spec.short_names()
            label = " ".join(f"{name}={number(values[axis])}" for axis, name in names.items() if axis in values)
            self._progress[trial.name] = Progress(trial, trial.name in self._controls, label)
        return self._progress[trial.name]

    def _follow(self, progress: Progress) -> None:
        if progress.closed:
            return
        trial = progress.trial
        end = trial.ended()  # before the results: what was recorded before the end is read below
        results = trial.results()
        for result in results[progress.epochs :]:
            self._show(progress, result)
        if results or trial.job():
            self.tracker.record(trial, results, progress.control)
        if end is not None:
            self.tracker.end(trial, end, progress.control)
            progress.end = end
            progress.closed = True
            if not self._terminal and (end.state != State.FINISHED or not results):
                self.console.print(
                    f"{self._called(progress)}  {end.state}  {end.reason}", markup=False, highlight=False
                )

    def _show(self, progress: Progress, result: dict) -> None:
        value = result[self.spec.objective]
        better = max if self.spec.mode == "max" else min
        progress.epochs = result["epoch"]
        progress.last = value
        progress.best = value if progress.best is None else better(progress.best, value)
        if not self._terminal and progress.epochs > progress.seen_before:
            line = f"epoch {progress.epochs}/{progress.trial.config.epochs}  {self.spec.objective} {value:.2f}"
            self.console.print(f"{self._called(progress)}  {line}", markup=False, highlight=False)

    def _called(self, progress: Progress) -> str:
        return f"{progress.trial.name}  {'control  ' if progress.control else ''}{progress.label}"

    def view(self) -> Group:
        """The live view: running trials, and a line that sums up."""
        seen = list(self._progress.values())
        table = Table(title=f"sweep {self.spec.name}", title_justify="left", box=None)
        for column in ("trial", "epoch", self.spec.objective, "best", "config"):
            table.add_column(column, overflow="fold")
        for p in seen:
            if p.end is None and p.trial.job():
                config = f"{'control ' if p.control else ''}{p.label}"
                epochs = f"{p.epochs}/{p.trial.config.epochs}"
                table.add_row(p.trial.name, epochs, number(p.last), number(p.best), config)
        ended = [p for p in seen if p.end is not None]
        counts = {state: sum(p.end.state == state for p in ended) for state in State}
        finished = [p.best for p in ended if p.end.state == State.FINISHED and not p.control and p.best is not None]
        best = (max if self.spec.mode == "max" else min)(finished, default=None)
        summary = (
            f"{len(seen)} of {self.total} trials begun: {counts[State.FINISHED]} finished, "
            f"{counts[State.STOPPED]} stopped early, {counts[State.FAILED]} failed; best so far {number(best)}; "
            f"{self._time_left(ended)} left"
        )
        return Group(table, summary)

    def _time_left(self, ended: list[Progress]) -> str:
        """At the rate at which trials ended since this driver started."""
        new = [p for p in ended if p.epochs > p.seen_before]
        if not new:
            return "unknown time"
        seconds = (time.monotonic() - self._start) / len(new) * (self.total - len(ended))
        return f"about {seconds / 60:.0f} min" if seconds > 90 else f"about {seconds:.0f} s"
