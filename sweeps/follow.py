"""Follows a running sweep: submits and watches jobs, sends epochs to MLflow, shows what goes on.

Two threads of the driver do it, beside Tune, by reading the trials' folders. Nothing is lost when MLflow is away or
the driver is killed: what was not sent is still in the folders.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from cluster.folder import End, Requests, State, TrialFolder
from cluster.relay import Relay
from sweeps.leaderboard import number
from sweeps.spec import Spec, Stage
from sweeps.tracking import Tracker

POLL_SECONDS = 0.5


@dataclass
class Progress:
    """What the follower has seen of a trial."""

    trial: TrialFolder
    control: bool
    stage: Stage
    label: str
    epochs: int = 0
    last: float | None = None
    best: float | None = None
    end: End | None = None
    closed: bool = False
    seen_before: int = 0
    """Epochs that were there when the driver started: they say nothing about how fast it goes."""
    ended_before: bool = False

    @property
    def finished(self) -> bool:
        return self.end is not None and self.end.state == State.FINISHED


class Repeated(threading.Thread):
    """Does something every half second until it is ended. What goes wrong is shown once, and tried again."""

    def __init__(self, action: Callable[[], None], show: Callable[[str], None]) -> None:
        super().__init__(name=action.__qualname__, daemon=True)
        self._action = action
        self._show = show
        self._ended = threading.Event()
        self._trouble = ""

    def run(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self.attempt()

    def attempt(self) -> bool:
        """Whether it went well."""
        try:
            self._action()
        except Exception as error:  # MLflow, the disk and the cluster fail in their own ways; the next time may be good
            lines = str(error).strip().splitlines() or [type(error).__name__]
            if lines[0] != self._trouble:
                self._trouble = lines[0]
                self._show(f"trying again: {lines[0]}")
            return False
        self._trouble = ""
        return True

    def end(self) -> None:
        self._ended.set()
        if self.is_alive():
            self.join()


class Follower:
    """Looks after the jobs, and at what they record, until `finish` or `halt`; each in a thread of its own.

    So what is recorded is seen at once also while the cluster takes its time to answer.
    """

    def __init__(self, spec: Spec, relay: Relay, tracker: Tracker, console: Console) -> None:
        self.spec = spec
        self.relay = relay
        self.tracker = tracker
        self.console = console
        self.total = spec.number_of_trials() + len(spec.control_configs())
        """Trials of the search, later of its confirmation."""
        self._confirming: set[str] = set()  # what the trials of the confirmation are called, once it goes on
        self.given_up = ""
        """Why the sweep was ended early, if it was."""
        self._controls = spec.control_names()
        self._requests = Requests(spec.trials)
        self._progress: dict[str, Progress] = {}
        self._outcomes: list[State] = []  # of the search's trials that ended since the driver started, in that order
        self._waits: set[str] = set()
        self._start = time.monotonic()
        self._look = Repeated(self.look, self._warn)
        self._relay = Repeated(relay.poll, self._warn)
        live = Live(console=console, get_renderable=self.view, refresh_per_second=2)
        self._live = live if console.is_terminal else None
        for trial in self._requests.all():
            progress = self._see(trial)
            progress.seen_before = len(trial.results())
            progress.ended_before = trial.ended() is not None

    def start(self) -> None:
        if self._live:
            self._live.start()
        self._look.start()
        self._relay.start()

    def look(self) -> None:
        """One look at everything."""
        for trial in self._requests.all():
            self._follow(self._see(trial))
        self._show_waits()
        limit = self.spec.failure_limit
        failed = self._outcomes[: limit.trials].count(State.FAILED)
        more_to_come = not self._confirming and len(self._outcomes) < self.total
        if failed > limit.share * limit.trials and more_to_come and not self.given_up:
            self.given_up = f"{failed} of the first {len(self._outcomes)} trials failed (failure_limit)"
            os.kill(os.getpid(), signal.SIGINT)  # the main thread ends the sweep, as it does on Ctrl-C

    def halt(self) -> None:
        """Stops looking."""
        self._relay.end()
        self._look.end()
        if self._live:
            self._live.stop()

    def wait(self) -> None:
        """Until all trials have ended."""
        while self.relay.open_trials():
            time.sleep(POLL_SECONDS)

    def confirm(self, names: set[str]) -> None:
        """From here on it is the confirmation that goes on, by the trials of these names."""
        self._confirming, self.total, self._start = names, len(names), time.monotonic()

    def finish(self, patience: float = 60.0) -> bool:
        """Waits for all trials to end, then stops looking. False if something could not be sent to MLflow in time."""
        self.wait()
        self.halt()
        self.relay.dismiss()
        return self.catch_up(patience)

    def catch_up(self, patience: float) -> bool:
        """Looks until everything was sent to MLflow; False if that took too long."""
        deadline = time.monotonic() + patience
        while not self._look.attempt():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _warn(self, text: str) -> None:
        self.console.print(text, style="yellow", markup=False, highlight=False)

    def _show_waits(self) -> None:
        """Says why jobs wait, each reason when it comes up."""
        waits = Counter(str(state) for state in list(self.relay.states.values()) if state.waiting and state.reason)
        waits += Counter(self.relay.troubles.values())
        for reason in waits.keys() - self._waits:
            self._warn(f"waiting: {waits[reason]} of the jobs {reason}")
        self._waits = set(waits)

    def _see(self, trial: TrialFolder) -> Progress:
        if trial.name not in self._progress:
            values = self.spec.params(trial.config)
            names = self.spec.short_names()
            label = " ".join(f"{name}={number(values[axis])}" for axis, name in names.items() if axis in values)
            stage = self.spec.stage(trial.config)
            if stage == Stage.CONFIRM:
                label = f"confirm  {label} seed={trial.config.order_seed}"
            self._progress[trial.name] = Progress(trial, trial.name in self._controls, stage, label)
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
            if progress.stage == Stage.SEARCH and not progress.ended_before:
                self._outcomes.append(end.state)
            if not self._live and end.state != State.FINISHED:
                self.console.print(f"{self._called(progress)}  {end}", markup=False, highlight=False)

    def _show(self, progress: Progress, result: dict) -> None:
        value = result[self.spec.objective]
        better = max if self.spec.mode == "max" else min
        progress.epochs = result["epoch"]
        progress.last = value
        progress.best = value if progress.best is None else better(progress.best, value)
        if not self._live and progress.epochs > progress.seen_before:
            line = f"epoch {progress.epochs}/{progress.trial.config.epochs}  {self.spec.objective} {value:.2f}"
            self.console.print(f"{self._called(progress)}  {line}", markup=False, highlight=False)

    def _called(self, progress: Progress) -> str:
        return f"{progress.trial.name}  {'control  ' if progress.control else ''}{progress.label}"

    def view(self) -> Group:
        """The live view: running trials, and a line that sums up."""
        every, confirming = list(self._progress.values()), self._confirming
        seen = [p for p in every if (p.trial.name in confirming if confirming else p.stage == Stage.SEARCH)]
        table = Table(title=f"sweep {self.spec.name}", title_justify="left", box=None)
        for column in ("trial", "job", "epoch", self.spec.objective, "best", "config"):
            table.add_column(column, overflow="fold")
        for p in seen:
            if p.end is None and p.trial.job():
                state = self.relay.states.get(p.trial.name)
                job = self.relay.troubles.get(p.trial.name) or (f"{state} {state.node}" if state else "")
                config = f"{'control ' if p.control else ''}{p.label}"
                epochs = f"{p.epochs}/{p.trial.config.epochs}"
                table.add_row(p.trial.name, job, epochs, number(p.last), number(p.best), config)
        ended = [p for p in seen if p.end is not None]
        counts = Counter(p.end.state for p in seen if p.end is not None)
        finished = [p.best for p in seen if p.finished and not p.control and p.best is not None]
        best = (max if self.spec.mode == "max" else min)(finished, default=None)
        trials = "trials of the confirmation" if confirming else "trials"
        summary = (
            f"{len(seen)} of {self.total} {trials} begun: {counts[State.FINISHED]} finished, "
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
