"""Train a trial's folder as a job, and the trials that the driver assigns to it, one after the other or together.

submitit starts it, the same on this machine and on a cluster.

It imports neither ray nor mlflow, and torch only once it has begun, so that submitting it costs the driver nothing.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import submitit

from cluster.torch_stub import stub_out_compiler
from cluster.trial_folder import AUTO, NODE_FAILURE_PREFIX, Attempt, Cause, State, StopReason, TrialFolder, pack_file
from lorvp.errors import TrialFailed, UserError
from lorvp.utils.files import create, give_libraries_caches, read_line, write_json

if TYPE_CHECKING:
    from lorvp.result import EpochResult
    from lorvp.training.shared import SharedResources
    from lorvp.training.trainer import Options, Trainer

ANY_GPU = "any"
"""Of a job whose GPUs the cluster chooses."""
NEXT_TRIAL_SECONDS = 30.0
"""How long a job that has finished a trial waits to be handed the next: the search needs a second or two."""
NEXT_TRIAL_POLL = 0.1
FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
"""What a disk says that takes no more, of anybody or of this user."""


RETRIED_CAUSES = (Cause.DISK_FULL, Cause.NODE_FAILURE)
"""Causes that another place, or the same one later, may not have."""


class TrialJob:
    """What submitit runs. Its `checkpoint` is asked for when the job is to be requeued, at a limit or a preemption."""

    def __call__(self, folder: Path, threads: int, trials: int, pack: int | str, gpus: str = "") -> None:
        """`run`, on the GPUs that the cluster gives the job (`ANY_GPU`) or on those of CUDA's names, if any."""
        stub_out_compiler()
        give_libraries_caches()
        if gpus not in ("", ANY_GPU):
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus  # as text: submitit takes numbers only
        run(folder, threads, trials, pack, needs_gpu=bool(gpus))

    def checkpoint(self, *arguments: object) -> submitit.helpers.DelayedSubmission:
        """Return the same call again, for submitit to submit when it requeues the job."""
        return submitit.helpers.DelayedSubmission(self, *arguments)


class Fenced(Exception):
    """Another job has started on the trial since: this one has nothing more to say."""


class RequeueHandler:
    """submitit's handler requeues a job on the spot, wherever it is; this one waits for `requeue`.

    So the job gets to the end of its step, when the trial's state is whole and in its checkpoint. It does so at SIGTERM
    too, by which SLURM says that it will kill the job: SLURM or the driver starts another then.
    """

    def __init__(self) -> None:
        self.requested = self.terminated = False
        handler = signal.getsignal(signal.SIGUSR2)
        self._handler = handler if callable(handler) else None
        if self._handler:
            signal.signal(signal.SIGUSR2, self._note)
            signal.signal(signal.SIGTERM, self._leave)

    def requeue(self) -> None:
        """Call submitit's own handler, which requeues the job."""
        if self._handler:
            self._handler(signal.SIGUSR2, None)

    def _note(self, signum: int, frame: object) -> None:
        self.requested = True

    def _leave(self, signum: int, frame: object) -> None:
        self.terminated = True


def run(folder: Path, threads: int, trials: int = 1, pack: int | str = 1, needs_gpu: bool = False) -> None:
    """Train the trial in `folder`, and those that are handed over, each from where its last attempt was.

    `threads` are those of the CPU. Up to `trials` are trained one after the other; or, with `pack` other than 1,
    together, for as long as the driver hands any over, and if it is `auto` the job measures how many at a time that had
    better be. A job that is started again finds what it was handed before.

    A job that `needs_gpu` and finds none that torch can use ends with exit code 1 and says so, to run elsewhere.
    """
    import torch

    from lorvp.utils import device

    torch.set_num_threads(threads)
    requeue = RequeueHandler()
    first = TrialFolder(folder)

    def leaving() -> bool:
        return requeue.requested or requeue.terminated

    failed: Exception | None
    try:
        if needs_gpu:
            device.require_gpu()
        failed = (
            train_one_by_one(first, trials, leaving)
            if pack == 1
            else train_together(first, leaving, measure=pack == AUTO)
        )
    except Fenced:
        return
    except device.NoGpu as error:
        failed = error
        print(node_failure_line(error), flush=True)
    except Exception as error:
        failed = error
    else:
        if requeue.requested and any(not trial.ended() and not trial.stop_reason() for trial in job_trials(first)):
            requeue.requeue()
    if failed is not None:
        if cause_of(failed) in RETRIED_CAUSES:
            sys.exit(1)  # without a traceback: the line that the driver looks for is among the log's last
        raise failed


def job_trials(first: TrialFolder) -> list[TrialFolder]:
    """Return the job's trials: the one that it was submitted with, and all that were assigned to it since."""
    trials = [first]
    for trial in trials:  # which grows meanwhile
        name = trial.assigned_next()
        if name:
            following = TrialFolder(trial.path.parent / name)
            if following.job_id == first.job_id:  # else it was given to another job while this one was away
                trials.append(following)
    return trials


def train_one_by_one(first: TrialFolder, trials: int, leaving: Callable[[], bool]) -> TrialFailed | None:
    """Train this job's trials one after the other; the failure of the last that failed by its own hyperparameters."""
    import torch

    from lorvp.training import launch

    shared: SharedResources | None = None  # stays in memory for all trials of the job
    failed: TrialFailed | None = None
    for trial in assigned_trials(first, trials, leaving):
        run = Run(trial, leaving)
        try:
            shared = shared or load(trial)
            processes = max(1, torch.cuda.device_count())
            for result in launch.train(trial.config, processes, shared=shared, **run.options()):
                run.record(result)
            run.end()
        except Fenced:
            raise
        except TrialFailed as error:
            run.fail(error)
            failed = error
        except Exception as error:
            with suppress(OSError):
                trial.assign_next(None)  # this process may be in no state to take another
            run.fail(error)
            raise
    return failed


def train_together(first: TrialFolder, leaving: Callable[[], bool], measure: bool) -> Exception | None:
    """Train this job's trials on the same batches; new ones join between two epochs.

    Return the last failure, if any.
    """
    from lorvp.result import EpochResult
    from lorvp.training import loop
    from lorvp.training.trainer import Trainer

    shared: SharedResources | None = None
    started: set[str] = set()
    recorders: dict[Trainer, Run] = {}
    failed: Exception | None = None

    def start(trial: TrialFolder) -> list[Trainer]:
        nonlocal shared, failed
        started.add(trial.name)
        run = Run(trial, leaving)
        try:
            if shared is None:
                shared = load(trial)
                if measure:
                    record_pack(trial, lambda: loop.best_pack(trial.config, shared))
            trainer = Trainer(trial.config, shared, **run.options())
        except Exception as error:
            with suppress(Fenced):
                run.fail(error)
            failed = error
            return []
        recorders[trainer] = run
        return [trainer]

    def join(running: int) -> list[Trainer]:
        deadline = time.monotonic() + NEXT_TRIAL_SECONDS
        while True:
            assigned = job_trials(first)
            new = [trial for trial in assigned if trial.name not in started and not trial.ended()]
            if leaving():
                return []
            if new or running:
                return [trainer for trial in new for trainer in start(trial)]
            if time.monotonic() > deadline:
                for trial in assigned:
                    trial.assign_next(None)  # from now on it is too late
                if len(job_trials(first)) == len(assigned):
                    return []
            time.sleep(NEXT_TRIAL_POLL)

    for trainer, event in loop.train_together(join):
        with suppress(Fenced):  # another job has this trial now; the others stay
            if isinstance(event, loop.Failed):
                failed = event.error
                recorders[trainer].fail(event.error)
            elif isinstance(event, EpochResult):
                recorders[trainer].record(event)
            else:
                recorders[trainer].end()
    return failed


def load(trial: TrialFolder) -> SharedResources:
    """Read what the job's trials share, and print what they run on."""
    from lorvp.training import precision, shared

    config, path = trial.config, precision.file(trial.path.parent, trial.config)
    resources = shared.load(config, read_line(path))
    if config.precision == "auto" and not create(path, resources.precision):  # another job was faster
        resources = resources.in_precision(precision.choose(config, resources.device, read_line(path)), config)
    print(f"on {resources.describe()}", flush=True)
    return resources


def record_pack(trial: TrialFolder, measure: Callable[[], int]) -> None:
    """Have it measured once in a sweep how many trials to train together, and leaves it where the driver looks."""
    path = pack_file(trial.path.parent)
    if not path.exists():
        pack_size = measure()
        print(f"{pack_size} trials at a time", flush=True)
        write_json(path, pack_size)


def assigned_trials(trial: TrialFolder, trials: int, leaving: Callable[[], bool]) -> Iterator[TrialFolder]:
    """Return the trials that this job has to train, as they are assigned; those that have ended are passed over."""
    for place in range(1, trials + 1):
        if not trial.ended():
            yield trial
        if not trial.ended() or place == trials:
            return
        deadline = time.monotonic() + NEXT_TRIAL_SECONDS
        while trial.assigned_next() is None and not leaving() and time.monotonic() < deadline:
            time.sleep(NEXT_TRIAL_POLL)
        trial.assign_next(None)  # from now on it is too late
        name = trial.assigned_next()
        if not name:
            return
        following = TrialFolder(trial.path.parent / name)
        if following.job_id != trial.job_id:
            return  # it was given to another job while this one was away
        trial = following


class Run:
    """A trial's attempt by this job: what it gives is recorded in the folder, unless a newer attempt has begun."""

    def __init__(self, trial: TrialFolder, leaving: Callable[[], bool]) -> None:
        self.trial = trial
        self.attempt = trial.claim()
        self._recorded = len(self.attempt.results())
        self._leaving = leaving
        print(f"trial {trial.name}", flush=True)

    def options(self) -> Options:
        """Return the options of its training: the folder, the checkpoint to resume from, and when to stop."""
        attempt = self.attempt
        return {
            "folder": attempt.path,
            "resume_from": attempt.checkpoint if attempt.checkpoint.exists() else None,
            "should_stop": lambda: self._leaving() or self.trial.stop_reason() is not None or attempt.fenced(),
        }

    def record(self, result: EpochResult) -> None:
        """Raise Fenced where it no longer counts."""
        if self.attempt.fenced():
            raise Fenced
        if result.epoch > self._recorded:
            self.attempt.append(asdict(result))
            at = f"{self.trial.name[:6]} epoch {result.epoch}"
            print(f"{at}: val top-1 {result.val_top1:.2f} %, {result.seconds:.1f} s", flush=True)

    def end(self) -> None:
        """Raise Fenced where it no longer counts."""
        if self.attempt.fenced():
            raise Fenced
        if len(self.attempt.results()) == self.trial.config.epochs:
            self.attempt.end(State.FINISHED)
        elif self.trial.stop_reason() == StopReason.SEARCH:
            self.attempt.end(State.STOPPED)

    def fail(self, error: Exception) -> None:
        """Raise Fenced where it no longer counts."""
        if self.attempt.fenced():
            raise Fenced from error
        traceback.print_exception(error)
        record_failure(self.attempt, error)


def record_failure(attempt: Attempt, error: Exception) -> None:
    """End the attempt as failed, unless it may be otherwise elsewhere: the disk is full, or the node not in order."""
    cause = cause_of(error)
    if cause == Cause.DISK_FULL:
        print(f"{Cause.DISK_FULL}: {error}", flush=True)  # the log is all that can be written
    elif cause == Cause.NODE_FAILURE:
        print(node_failure_line(error), flush=True)
    elif isinstance(error, TrialFailed | UserError):
        attempt.end(State.FAILED, str(error), cause)
    else:
        attempt.end(State.FAILED, f"{type(error).__name__}: {error}", cause)


def cause_of(error: Exception) -> Cause:
    """Return the cause of a failure, by the exception's type and text."""
    if isinstance(error, TrialFailed):
        return Cause.DIVERGED
    if isinstance(error, UserError):
        return Cause.BAD_INPUT
    from lorvp.utils.device import exception_chain, is_gpu_fault, is_out_of_memory

    for link in exception_chain(error):
        text = str(link).lower()
        if getattr(link, "errno", None) in FULL_DISK_ERRNOS or any(
            os.strerror(number).lower() in text for number in FULL_DISK_ERRNOS
        ):
            return Cause.DISK_FULL
        if is_out_of_memory(link):
            return Cause.OUT_OF_MEMORY
        if is_gpu_fault(link):
            return Cause.NODE_FAILURE
    return Cause.EXCEPTION


def node_failure_line(error: Exception) -> str:
    """Return the line of the log by which the driver learns which node is not in order."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return f"{NODE_FAILURE_PREFIX}{name}: {str(error).strip().splitlines()[0]}"
