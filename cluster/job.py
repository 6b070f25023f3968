"""The job: trains the trial of a folder, then those that the driver hands to it. submitit starts it, the same on this
machine and on a cluster.

It imports neither ray nor mlflow, and torch only once it has begun, so that submitting it costs the driver nothing.
"""

from __future__ import annotations

import errno
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import submitit

from cluster.folder import Attempt, Cause, State, StopReason, TrialFolder
from cluster.quick_torch import leave_out_compiler
from lorvp.errors import TrialFailed, UserError

if TYPE_CHECKING:
    from lorvp.training import Loaded

HAND_OVER_SECONDS = 30.0
"""How long a job that has finished a trial waits to be handed the next: the search needs a second or two."""
HAND_OVER_POLL = 0.1


class TrialJob:
    """What submitit runs. Its `checkpoint` is asked for when the job is to be requeued, at a limit or a preemption."""

    def __call__(self, folder: Path, threads: int, trials: int) -> None:
        leave_out_compiler()
        run(folder, threads, trials)

    def checkpoint(self, folder: Path, threads: int, trials: int) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self, folder, threads, trials)


class Fenced(Exception):
    """Another job has started on the trial since: this one has nothing more to say."""


class Requeue:
    """submitit's handler requeues a job on the spot, wherever it is; this one waits for `carry_out`.

    So the job gets to the end of its step, when the trial's state is whole and in its checkpoint.
    """

    def __init__(self) -> None:
        self.asked_for = False
        self._handler = signal.getsignal(signal.SIGUSR2)
        if callable(self._handler):
            signal.signal(signal.SIGUSR2, self._note)

    def carry_out(self) -> None:
        self._handler(signal.SIGUSR2, None)

    def _note(self, signum: int, frame: object) -> None:
        self.asked_for = True


def run(folder: Path, threads: int, trials: int = 1) -> None:
    """Trains up to `trials` trials, the one in `folder` first, each from where its last attempt was.

    `threads` are those of the CPU. A job that is started again finds what it was handed before.
    """
    import torch

    torch.set_num_threads(threads)
    requeue = Requeue()
    loaded: Loaded | None = None  # stays in memory for all trials of the job
    failed: TrialFailed | None = None
    for trial in taken(TrialFolder(folder), trials, lambda: requeue.asked_for):
        try:
            loaded = train(trial, loaded, lambda: requeue.asked_for)
        except TrialFailed as error:  # only this trial's hyperparameters are to blame
            failed = error
        except Fenced:
            return
        except Exception:
            with suppress(OSError):
                trial.hand_over(None)  # this process may be in no state to take another
            raise
        if requeue.asked_for and not trial.ended() and not trial.stop_reason():
            requeue.carry_out()
    if failed:
        raise failed


def taken(trial: TrialFolder, trials: int, leaving: Callable[[], bool]) -> Iterator[TrialFolder]:
    """The trials that this job has to train, as they are handed over; those that have ended are passed over."""
    for place in range(1, trials + 1):
        if not trial.ended():
            yield trial
        if not trial.ended() or place == trials:
            return
        deadline = time.monotonic() + HAND_OVER_SECONDS
        while trial.handed_over() is None and not leaving() and time.monotonic() < deadline:
            time.sleep(HAND_OVER_POLL)
        trial.hand_over(None)  # from now on it is too late
        name = trial.handed_over()
        if not name:
            return
        following = TrialFolder(trial.path.parent / name)
        if following.job()["id"] != trial.job()["id"]:
            return  # it was given to another job while this one was away
        trial = following


def train(trial: TrialFolder, loaded: Loaded | None, leaving: Callable[[], bool]) -> Loaded:
    """Trains one trial, as far as it may, and records its end. Gives what the job's next trial need not load.

    Raises Fenced, and what training raises.
    """
    import torch

    from lorvp import distributed, training

    attempt = trial.claim()
    print(f"trial {trial.name}", flush=True)
    try:
        loaded = loaded or training.load(trial.config)
        recorded = len(attempt.results())
        for result in distributed.train(
            trial.config,
            processes=max(1, torch.cuda.device_count()),
            folder=attempt.path,
            resume_from=attempt.checkpoint if attempt.checkpoint.exists() else None,
            should_stop=lambda: leaving() or trial.stop_reason() is not None or attempt.fenced(),
            loaded=loaded,
        ):
            if attempt.fenced():
                raise Fenced
            if result.epoch > recorded:
                attempt.append(asdict(result))
                print(f"epoch {result.epoch}: val top-1 {result.val_top1:.2f} %, {result.seconds:.1f} s", flush=True)
    except Exception as error:
        if attempt.fenced():
            raise Fenced from error
        traceback.print_exc()
        record_failure(attempt, error)
        raise
    if attempt.fenced():
        raise Fenced
    if len(attempt.results()) == trial.config.epochs:
        attempt.end(State.FINISHED)
    elif trial.stop_reason() == StopReason.SEARCH:
        attempt.end(State.STOPPED)
    return loaded


def record_failure(attempt: Attempt, error: Exception) -> None:
    """Ends the attempt as failed, unless the disk is full: that may be otherwise elsewhere, or later."""
    cause = cause_of(error)
    if cause == Cause.DISK_FULL:
        print(f"{Cause.DISK_FULL}: {error}", flush=True)  # the log is all that can be written
    elif isinstance(error, TrialFailed | UserError):
        attempt.end(State.FAILED, str(error), cause)
    else:
        attempt.end(State.FAILED, f"{type(error).__name__}: {error}", cause)


def cause_of(error: Exception) -> Cause:
    """What kind of failure an exception is."""
    if isinstance(error, TrialFailed):
        return Cause.DIVERGED
    if isinstance(error, UserError):
        return Cause.BAD_INPUT
    for each in chain(error):
        text = str(each).lower()
        if getattr(each, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC).lower() in text:
            return Cause.DISK_FULL
        if (
            isinstance(each, MemoryError)
            or type(each).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in text
        ):
            return Cause.OUT_OF_MEMORY
    return Cause.EXCEPTION


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
