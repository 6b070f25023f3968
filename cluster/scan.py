"""Poll the trials' folders, for all who follow a sweep: the search, MLflow, the screen and the job manager.

A look at a trial that has nothing new costs one `stat`, of the file that its job makes grow (`trial_folder.NEWS`). A
trial is looked at again after a tenth of its last epoch's time, and sooner when an epoch or its end is due.

A network disk may show that file as it is and others as they were, for a while. It has a byte for each attempt, epoch
and end: where some of these are missing, the folder is read at every look until they are there.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.trial_folder import NEWS, RESULTS, Attempt, End, StopReason, TrialFolder, refresh_listing
from lorvp.config import TrialConfig

MIN_POLL, MAX_POLL = 0.5, 30.0
"""Seconds between two looks at a trial."""
NEVER = math.inf
STALE_SECONDS = 60.0
"""For how long a network disk may show what was there before: NFS's longest, unless it is mounted otherwise."""
POLL_FRACTION = 0.1
"""Of the last epoch's time, the part after which a trial is looked at again."""


class FollowedTrial(TrialFolder):
    """A trial's folder as its driver knows it: `job`, `results` and `ended` give what the last look found.

    The driver is the only writer of `job.json`, so what it has written last is what is there.
    """

    def __init__(self, path: Path, on_wake: Callable[[FollowedTrial], None]) -> None:
        super().__init__(path)
        self.due = NEVER
        """When to look next, by time.monotonic; what was planned before is void."""
        self._on_wake = on_wake
        refresh_listing(path)
        self._job = super().job()
        self._results: list[dict[str, Any]] = []
        self._end: End | None = None
        self._stopping = super().stop_reason() is not None
        self._attempt = 0
        self._offset = 0  # bytes of the results read so far
        self._signature: tuple[int, int] | None = None
        self._last_news = time.monotonic()  # of the last news
        self._unread = True
        self._last_growth = self._last_news  # when the file of news was last seen to grow
        self._void_bytes = 0  # its bytes that nothing came of: an attempt's that a newer one had replaced
        self._missing = False
        self._in_doubt_since: float | None = None

    def job(self) -> dict[str, Any] | None:
        """Return the job that was last recorded."""
        return self._job

    def record_job(self, job_id: str, log: Path, place: int = 1) -> None:
        """Record the job, and poll the trial at once."""
        super().record_job(job_id, log, place)
        self._job = super().job()
        self._in_doubt_since = None
        self.wake()

    def results(self) -> list[dict[str, Any]]:
        """Return the epochs that the last poll found."""
        return self._results

    def ended(self) -> End | None:
        """Return the end that the last poll found; None if there was none."""
        return self._end

    def stop(self, reason: StopReason) -> None:
        """Ask the job to end, and poll the trial soon."""
        super().stop(reason)
        self._stopping = True
        self.wake()

    def clear_stop(self) -> None:
        """Withdraw the request to stop, if there is one."""
        if self._stopping:
            super().clear_stop()
        self._stopping = False

    def wake(self) -> None:
        """Have it read at the next look, whether its job has rung or not."""
        self._unread = True
        self._last_news = time.monotonic()
        self._on_wake(self)

    def poll(self) -> bool:
        """Look whether there is something new, and read it. Raises OSError where the disk does."""
        unread, self._unread = self._unread, False
        try:
            signature = _signature(self.path / NEWS)
            if signature == self._signature and signature is not None and not unread and not self._missing:
                return False
            changed = self._read_new()
            if signature and self._missing_count(signature[0]) > 0:
                self._refresh_listings()
                changed |= self._read_new()
        except BaseException:
            self._unread = True
            raise
        if signature != self._signature:
            self._last_growth = time.monotonic()
        self._signature = signature
        if signature:
            self._update_missing(signature[0])
        if self._missing:
            self._end = None  # which counts once all is there that was written before it
        if changed:
            self._last_news = time.monotonic()
        return changed or unread

    def _read_new(self) -> bool:
        """Read what was recorded since the last look; whether that is anything."""
        attempts, number = self.path / "attempts", self._attempt
        while (attempts / f"{number + 1:04}").exists():
            number += 1
        if number == 0:
            return False
        attempt = Attempt(attempts / f"{number:04}")
        end = attempt.ended()  # before the results: what was recorded before the end is read below
        changed = number != self._attempt or end != self._end
        if number != self._attempt:  # it begins with a copy of what the one before had recorded
            self._attempt, self._offset, self._results = number, 0, []
        try:
            with open(attempt.path / RESULTS, "rb", buffering=0) as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            text = b""
        complete_lines = text[: text.rfind(b"\n") + 1]
        self._results += [json.loads(line) for line in complete_lines.splitlines()]
        self._offset += len(complete_lines)
        self._end = end
        return changed or bool(complete_lines)

    def _missing_count(self, notifications: int) -> int:
        """Count the notifications whose record has not been read yet, less those that are void."""
        return notifications - self._attempt - len(self._results) - (self._end is not None) - self._void_bytes

    def _update_missing(self, notifications: int) -> None:
        missing = self._missing_count(notifications)
        if missing < 0 or time.monotonic() > self._last_growth + STALE_SECONDS:
            self._void_bytes = max(0, self._void_bytes + missing)  # a job writes first, then it rings
        self._missing = self._missing_count(notifications) > 0

    def _refresh_listings(self) -> None:
        refresh_listing(self.path)
        if newest := self.newest():
            refresh_listing(newest.path)

    def may_have_ended(self) -> bool:
        """Say whether there is an end in its folder, or may be one that this machine does not see yet.

        For who finds its job gone, in any thread: what that has done is not to be done again.
        """
        self._refresh_listings()
        folder, newest = TrialFolder(self.path), self.newest()
        if folder.ended():
            return True
        recorded = int(newest.path.name) + len(newest.results()) if newest else 0
        if _size(self.path / NEWS) - recorded <= self._void_bytes:
            return False
        if self._in_doubt_since is None:
            self._in_doubt_since = time.monotonic()
        return time.monotonic() < self._in_doubt_since + STALE_SECONDS

    def wait(self) -> float:
        """Seconds until the next look."""
        elapsed = time.monotonic() - self._last_news
        last = self._results[-1] if self._results else None
        if last is None or self._stopping or len(self._results) == self.config.epochs:
            return _clamp(POLL_FRACTION * elapsed)  # its start, or its end, may come at any time
        seconds: float = last["seconds"]
        pause = _clamp(POLL_FRACTION * seconds)
        if elapsed < seconds:
            return min(pause, max(MIN_POLL, seconds - elapsed))
        return MIN_POLL if elapsed < seconds + pause else pause


class Scan:
    """The trials under one folder, as one driver follows them. `look` is for one thread, the rest for any."""

    def __init__(self, trials: Path) -> None:
        self._trials = trials
        self._open: dict[str, FollowedTrial] = {}
        self._schedule: list[tuple[float, int, FollowedTrial]] = []  # a heap
        self._order = itertools.count()
        self._lock = threading.RLock()
        self.changed = threading.Event()
        """Set when a trial is to be looked at sooner than was planned."""
        self._listeners: list[Callable[[FollowedTrial], None]] = []
        self._just_ended: list[FollowedTrial] = []
        for folder in TrialFolder.requested(trials):
            self._add(folder.path)

    def request(self, config: TrialConfig) -> FollowedTrial:
        """Ask for a trial of `config`; the one that is there already, if there is one."""
        with self._lock:
            name = config.content_hash()
            if name in self._open:
                return self._open[name]
            trial = self._add(TrialFolder.request(self._trials, config).path)
            trial.config = config
            trial.poll()
            if trial.ended():  # that was news before
                del self._open[name]
            return trial

    def open(self) -> list[FollowedTrial]:
        """Return the trials that have not ended, oldest request first."""
        with self._lock:
            return list(self._open.values())

    def survey(self) -> tuple[list[FollowedTrial], list[FollowedTrial]]:
        """Return the trials that have not ended, and those that have since the last survey."""
        with self._lock:
            ended, self._just_ended = self._just_ended, []
            return self.open(), ended

    def subscribe(self, listener: Callable[[FollowedTrial], None]) -> None:
        """Have `listener` told of each trial with news, in the thread that looks."""
        self._listeners.append(listener)

    def poll(self) -> None:
        """Look at the trials that are due. Raises the last error, of a trial or a listener, once all have been told."""
        news, last_error = self._poll_due()
        for trial in news:
            for listener in self._listeners:
                try:
                    listener(trial)
                except Exception as error:  # a screen that is gone costs nobody else the news
                    last_error = error
        if last_error:
            raise last_error

    def _poll_due(self) -> tuple[list[FollowedTrial], Exception | None]:
        with self._lock:
            self.changed.clear()
            now = time.monotonic()
            due = []
            while self._schedule and self._schedule[0][0] <= now:
                planned, _, trial = heapq.heappop(self._schedule)
                if planned == trial.due and trial.name in self._open:
                    trial.due = NEVER
                    due.append(trial)
            news: list[FollowedTrial] = []
            last_error: Exception | None = None
            for trial in due:
                pause = MIN_POLL
                try:
                    if trial.poll():
                        news.append(trial)
                    pause = trial.wait()
                except Exception as error:  # a shared disk has its moods, and gives back what nobody has written
                    last_error = error
                if trial.ended():
                    del self._open[trial.name]
                    self._just_ended.append(trial)
                else:
                    self._plan(trial, now + pause)
            return news, last_error

    def poll_all(self) -> None:
        """Look at every open trial, whatever was planned. Raises what `look` raises."""
        for trial in self.open():
            trial.wake()
        self.poll()

    def seconds_until_due(self) -> float:
        """Seconds until the next look at a trial is due."""
        with self._lock:
            return max(0.0, self._schedule[0][0] - time.monotonic()) if self._schedule else MAX_POLL

    def _add(self, path: Path) -> FollowedTrial:
        trial = FollowedTrial(path, self._wake)
        self._open[trial.name] = trial
        self._plan(trial, 0.0)
        return trial

    def _wake(self, trial: FollowedTrial) -> None:
        with self._lock:
            if trial.name in self._open:
                self._plan(trial, 0.0)
        self.changed.set()

    def _plan(self, trial: FollowedTrial, due: float) -> None:
        """Plan the next look. A trial without a job has nothing to show, and is woken when it has one."""
        if due and trial.job() is None:
            return
        trial.due = due
        heapq.heappush(self._schedule, (due, next(self._order), trial))


def _clamp(seconds: float) -> float:
    return min(MAX_POLL, max(MIN_POLL, seconds))


def _size(path: Path) -> int:
    """Return a file's size, of which a network disk asks again when it is opened; 0 where there is none."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return 0


def _signature(path: Path) -> tuple[int, int] | None:
    """Return a file's size and time of change; None where there is none."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns
