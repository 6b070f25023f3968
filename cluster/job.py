"""The job: trains the trial of a folder. submitit starts it, the same on this machine and on a cluster.

It imports neither ray nor mlflow, and torch only once it has begun, so that submitting it costs the driver nothing.
"""

from __future__ import annotations

import traceback
from dataclasses import asdict
from pathlib import Path

from cluster.folder import State, StopReason, TrialFolder
from lorvp.errors import TrialFailed, UserError


def run(folder: Path, threads: int) -> None:
    """Trains the trial in `folder` from where its last attempt was, with `threads` CPU threads, and records its end."""
    trial = TrialFolder(folder)
    attempt = trial.claim()
    try:
        import torch

        from lorvp.training import train

        torch.set_num_threads(threads)
        recorded = len(attempt.results())
        for result in train(
            trial.config,
            folder=attempt.path,
            resume_from=attempt.checkpoint if attempt.checkpoint.exists() else None,
            should_stop=lambda: trial.stop_reason() is not None or attempt.fenced(),
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
