"""A trial's folder on the shared disk: the only channel between the driver of a sweep and the job.

    config.json            what to train, written by the driver: asking for a trial is writing this
    job.json               the job that trains it, and how often one was submitted
    stop                   the driver's word that the trial shall end, and why
    next                   another trial that the same job takes, beside or after this one; empty if there is none
    news                   grows by a byte whenever a job has written something below: who follows a trial looks here
    attempts/0001/         one start of the job; a later one begins with a copy of what it continues
        started.json       where and when
        results.jsonl      a line per epoch, appended
        checkpoint.pt      after the last of them
        bundle/            the best epoch's prompt
        predictions.parquet    which class it gives each validation and test image
        end.json           finished, stopped or failed, and why; absent while it runs or if it died

The jobs' output, and what submitit needs, lie together in `jobs/`, beside `trials/`; there too is `pack.json`: how many
trials a job had better train together, where one was asked to measure that.

Whoever reads a folder may be killed and start again at any time. Only the newest attempt counts: a job that finds a
newer one than its own stops without another word.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorvp.config import TrialConfig
from lorvp.errors import UserError
from lorvp.utils.explain import dotted, explain
from lorvp.utils.files import create, link_or_copy, read_line, write_json

NEWS, RESULTS = "news", "results.jsonl"
PROBE_BYTES = 1 << 20
AUTO = "auto"
"""In place of a number of trials that are trained together: as many as pay, which a job measures."""


class State(StrEnum):
    """How a trial ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


class Cause(StrEnum):
    """Why a trial failed, as far as one can tell."""

    DIVERGED = "diverged"
    BAD_INPUT = "bad input"
    OUT_OF_MEMORY = "out of memory"
    DISK_FULL = "disk full"
    NODE_FAILURE = "node failure"
    EXCEPTION = "exception"
    LOST = "job lost"


NODE_FAILURE_PREFIX = f"{Cause.NODE_FAILURE} on "
"""How a line of a log begins in which a job says that its node, whose name follows, is not in order."""


class StopReason(StrEnum):
    """Why the driver asks a trial to stop."""

    SEARCH = "search"
    """The search gave up on the trial: its state becomes `stopped`, for good."""
    INTERRUPT = "interrupt"
    """The driver is ending: the trial stays open and can be continued."""


CANNOT_START = (
    "AccountNotAllowed",
    "BadConstraints",
    "DependencyNeverSatisfied",
    "InvalidAccount",
    "InvalidQOS",
    "JobHeld",
    "Nodes required for job are DOWN",
    "PartitionDown",
    "PartitionInactive",
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "QOSNotAllowed",
    "ReqNodeNotAvail",
    "launch failed requeued held",
)
"""How SLURM's reasons begin for a job to wait that time alone does not end: an impossible request, drained nodes."""


END_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
}
"""SLURM's states of a job that has ended."""


@dataclass(frozen=True)
class JobState:
    """What the place where a job runs says of it, in SLURM's words."""

    state: str
    reason: str = ""
    """Why it waits."""
    node: str = ""

    @property
    def waiting(self) -> bool:
        """Whether the job waits to start."""
        return self.state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")

    @property
    def stuck(self) -> bool:
        """Whether it waits for what will never come, or not without somebody's help."""
        return self.waiting and self.reason.replace("_", " ").startswith(CANNOT_START)

    def __str__(self) -> str:
        if self.stuck:
            return f"cannot start: {self.reason}"
        if self.waiting and self.reason:
            return f"{self.state.lower()}: {self.reason}"
        return self.state.lower()

    @property
    def alive(self) -> bool:
        """Whether it runs or may run again: in any state that is no end, one that we have never heard of among them."""
        return self.state not in END_STATES


@dataclass(frozen=True)
class End:
    """How and why a trial ended."""

    state: State
    reason: str = ""
    cause: Cause | None = None
    """Of a failure."""

    def __str__(self) -> str:
        return f"{self.state}  {f'{self.cause}: ' if self.cause else ''}{self.reason}".rstrip()


class Attempt:
    """One start of a trial's job."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoint(self) -> Path:
        """The path of the checkpoint after the last epoch."""
        return self.path / "checkpoint.pt"

    @property
    def bundle(self) -> Path:
        """The folder of the best epoch's prompt."""
        return self.path / "bundle"

    @property
    def predictions(self) -> Path:
        """The path of which class that prompt gives each validation and test image."""
        return self.path / "predictions.parquet"

    def fenced(self) -> bool:
        """Return whether a newer attempt has started; what this one writes no longer counts."""
        return (self.path.parent / f"{int(self.path.name) + 1:04}").exists()

    def results(self) -> list[dict[str, Any]]:
        """Return the epochs recorded so far, as dictionaries of `EpochResult`; a torn last line is left out."""
        try:
            text = (self.path / RESULTS).read_bytes()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]

    def append(self, result: dict[str, Any]) -> None:
        """Record one epoch, after whatever a killed writer may have torn."""
        path = self.path / RESULTS
        line = (json.dumps(result) + "\n").encode()
        with open(path, "ab+") as file:
            file.seek(0)
            text = file.read()
            if text and not text.endswith(b"\n"):
                file.truncate(text.rfind(b"\n") + 1)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._notify()

    def end(self, state: State, reason: str = "", cause: Cause | None = None) -> None:
        """Record how this attempt ended, and notify whoever follows the trial."""
        values = {"state": state, "reason": reason, "cause": cause, "time": time.time()}
        write_json(self.path / "end.json", values)
        self._notify()

    def _notify(self) -> None:
        notify(self.path.parent.parent)

    def ended(self) -> End | None:
        """Read how this attempt ended; None while it runs, or if it died."""
        values = _read_json(self.path / "end.json")
        if values is None:
            return None
        return End(State(values["state"]), values["reason"], Cause(values["cause"]) if values["cause"] else None)

    def started(self) -> float:
        """Unix time at which it began, by the disk's clock: those of nodes may be minutes apart."""
        return (self.path / "started.json").stat().st_mtime

    def last_sign(self) -> float:
        """Unix time at which it last wrote a file: an epoch's, or its end."""
        return self.path.stat().st_mtime


class TrialFolder:
    """Reads and writes the folder described above."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"TrialFolder({self.path})"

    @property
    def name(self) -> str:
        """The config's content hash."""
        return self.path.name

    @classmethod
    def request(cls, trials: Path, config: TrialConfig) -> TrialFolder:
        """Return the folder of `config` under `trials`, made if there is none: equal configs are one trial."""
        folder = cls(trials / config.content_hash())
        if not (folder.path / "config.json").exists():
            folder.path.mkdir(parents=True, exist_ok=True)
            write_json(folder.path / "config.json", config.model_dump(mode="json"))
        return folder

    @classmethod
    def requested(cls, trials: Path) -> list[TrialFolder]:
        """Return all trials under `trials`, oldest request first."""
        names = os.listdir(trials) if trials.is_dir() else []
        configs = [trials / name / "config.json" for name in names]
        requests = [(path.stat().st_mtime_ns, path) for path in configs if path.exists()]
        return [cls(path.parent) for _, path in sorted(requests)]

    @cached_property
    def config(self) -> TrialConfig:
        """The trial's config. Raises UserError for one of another version."""
        try:
            return TrialConfig.model_validate_json((self.path / "config.json").read_text())
        except ValidationError as error:
            key = dotted(explain(error, TrialConfig)[0])
            raise UserError(f"{self.path}: its {key} is not this version's; read it with the one it is of") from None

    def newest(self) -> Attempt | None:
        """Find the newest attempt; None before the first."""
        attempts = self.path / "attempts"
        names = [name for name in os.listdir(attempts) if name.isdigit()] if attempts.is_dir() else []
        return Attempt(attempts / max(names)) if names else None

    def claim(self) -> Attempt:
        """Start the next attempt, which from then on is the newest; it holds what the one before had recorded."""
        attempts = self.path / "attempts"
        attempts.mkdir(exist_ok=True)
        while True:
            previous = self.newest()
            number = int(previous.path.name) + 1 if previous else 1
            draft = Path(tempfile.mkdtemp(prefix=".claim-", dir=attempts))
            draft.chmod(0o755)
            started = {"host": socket.gethostname(), "process": os.getpid(), "time": time.time()}
            write_json(draft / "started.json", started)
            if previous:
                if previous.checkpoint.exists():
                    link_or_copy(previous.checkpoint, draft / previous.checkpoint.name)
                if results := previous.results():
                    (draft / RESULTS).write_text("".join(json.dumps(result) + "\n" for result in results))
            try:
                draft.rename(attempts / f"{number:04}")
            except OSError:  # another job took this number meanwhile; the folder is never empty, so none replaces it
                shutil.rmtree(draft)
                continue
            notify(self.path)
            return Attempt(attempts / f"{number:04}")

    def results(self) -> list[dict[str, Any]]:
        """Return the epochs that count, from 1 on."""
        newest = self.newest()
        return newest.results() if newest else []

    def ended(self) -> End | None:
        """Return how the trial ended; None while it waits, runs, or lies unfinished."""
        newest = self.newest()
        return newest.ended() if newest else None

    def has_room(self) -> bool:
        """Return whether another file can be written to its disk."""
        try:
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(bytes(PROBE_BYTES))
        except OSError:
            return False
        return True

    def job(self) -> dict[str, Any] | None:
        """Read the job that trains it: `id`, `log`, `place` among the job's trials, `submissions`, `time`."""
        job = _read_json(self.path / "job.json")
        return job and job | {"log": str(self._sweep / job["log"])}

    @property
    def _sweep(self) -> Path:
        return self.path.parent.parent

    @property
    def job_id(self) -> str | None:
        """The id of the job that trains the trial; None before the first submission."""
        job = self.job()
        return job["id"] if job else None

    def submitted_at(self) -> float | None:
        """Unix time at which its newest job was noted, by the disk's clock; None before the first."""
        try:
            return (self.path / "job.json").stat().st_mtime
        except FileNotFoundError:
            return None

    def record_job(self, job_id: str, log: Path, place: int = 1) -> None:
        """Record the job that trains the trial, its log and the trial's `place` in it; counts the submission."""
        previous = self.job()
        submissions = previous["submissions"] + 1 if previous else 1
        path = os.path.relpath(log, self._sweep)  # the sweep's folder may be moved
        values = {"id": job_id, "log": path, "place": place, "submissions": submissions, "time": time.time()}
        write_json(self.path / "job.json", values)

    def assign_next(self, following: TrialFolder | None) -> bool:
        """Tell this trial's job which one to take next, or that there is none.

        False if that was said before: by the driver, or by the job when it left.
        """
        return create(self.path / "next", following.name if following else "")

    def assigned_next(self) -> str | None:
        """Read the name of the trial that follows in the same job: empty if none does, None while it is undecided."""
        return read_line(self.path / "next")

    def clear_assigned_next(self) -> None:
        """Forget which trial was assigned next."""
        (self.path / "next").unlink(missing_ok=True)

    def stop(self, reason: StopReason) -> None:
        """Ask the job to end within a batch. The first reason given stays."""
        create(self.path / "stop", reason)

    def stop_reason(self) -> StopReason | None:
        """Read why the trial was asked to stop; None if it was not."""
        reason = read_line(self.path / "stop")
        return None if reason is None else StopReason(reason)

    def clear_stop(self) -> None:
        """Withdraw the request to stop."""
        (self.path / "stop").unlink(missing_ok=True)

    def last_log_lines(self, count: int = 3) -> list[str]:
        """Return the end of the newest job's output."""
        job = self.job()
        try:
            return Path(job["log"]).read_text(errors="replace").strip().splitlines()[-count:] if job else []
        except FileNotFoundError:
            return []

    def has_log(self) -> bool:
        """Return whether its newest job has written anything."""
        job = self.job()
        return job is not None and Path(job["log"]).exists()


def notify(trial: Path) -> None:
    """Say that there is something new in a trial's folder, so that who follows it need not look at anything else.

    A byte is appended, since a file's size shows every change, where times may be too coarse to.
    """
    news = trial / NEWS
    try:
        with open(news, "ab") as file:
            file.write(b".")
    except OSError:  # the disk may be full, of which the log tells; to set a time takes no room
        with suppress(OSError):
            os.utime(news)


def refresh_listing(folder: Path) -> None:
    """Have a network disk ask again what is in a folder, of which it may remember for a minute what was there before.

    NFS does so when a folder is opened to be listed, and then forgets that it has not found a name in it.
    """
    with suppress(FileNotFoundError):
        os.listdir(folder)


def pack_file(trials: Path) -> Path:
    """Return the path of the file that holds the measured number of trials to train together."""
    return trials.parent / "pack.json"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        return values
    except FileNotFoundError:
        return None
