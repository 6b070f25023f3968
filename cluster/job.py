"""The job: trains the trial of a folder. submitit starts it, the same on this machine and on a cluster.

It imports neither ray nor mlflow, and torch only once it has begun, so that submitting it costs the driver nothing.
"""

from __future__ import annotations

import signal
import traceback
from dataclasses import asdict
from pathlib import Path

import submitit

from cluster.folder import State, StopReason, TrialFolder
from lorvp.errors import TrialFailed, UserError


class TrialJob:
    """What submitit runs. Its `checkpoint` is asked for when the job is to be requeued, at a limit or a preemption."""

    def __call__(self, folder: Path, threads: int) -> None:
        run(folder, threads)

    def checkpoint(self, folder: Path, threads: int) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self, folder, threads)


def run(folder: Path, threads: int) -> None:
    """Trains the trial in `folder` from where its last attempt was, with `threads` CPU threads, and records its end."""
    trial = TrialFolder(folder)
    attempt = trial.claim()
    # submitit's own handler requeues the job on the spot, wherever it is; here it waits for the end of the step,
    # when the trial's state is whole and in its checkpoint.
    requeue = signal.getsignal(signal.SIGUSR2)
    signalled = False

    def note(signum: int, frame: object) -> None:
        nonlocal signalled
        signalled = True

    if callable(requeue):
        signal.signal(signal.SIGUSR2, note)
    try:
        import torch

        from lorvp.training import train

        torch.set_num_threads(threads)
        recorded = len(attempt.results())
        for result in train(
            trial.config,
            folder=attempt.path,
            resume_from=attempt.checkpoint if attempt.checkpoint.exists() else None,
            should_stop=lambda: signalled or trial.stop_reason() is not None or attempt.fenced(),
        ):
            if attempt.fenced():
                return
            if result.epoch > recorded:
                attempt.append(asdict(result))
                print(f"epoch {result.epoch}: val top-1 {result.val_top1:.2f} %, {result.seconds:.1f} s", flush=True)
    except Exception as error:
        if not attempt.fenced():
            known = isinstance(error, UserError | TrialFailed)
            attempt.end(State.FAILED, str(error) if known else f"{type(error).__name__}: {error}")
        traceback.print_exc()
        raise
    if attempt.fenced():
        return
    if len(attempt.results()) == trial.config.epochs:
        attempt.end(State.FINISHED)
    elif trial.stop_reason() == StopReason.SEARCH:
        attempt.end(State.STOPPED)
    elif signalled:
        requeue(signal.SIGUSR2, None)
