"""What a sweep's jobs are doing, and their end, from the folders and the cluster alone: no driver needs to be alive."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.job_manager import JobManager
from cluster.trial_folder import End, JobState, State, TrialFolder
from lorvp.errors import UserError
from sweeps import lock
from sweeps.spec.model import Spec

DRIVER_JOB = "driver.json"
POLL_SECONDS = 0.5


def table(spec: Spec, manager: JobManager) -> Table:
    """Return every trial: its job, where that is, how far it is, for how long, and why it failed or waits."""
    trials = TrialFolder.requested(spec.trials)
    jobs = {trial.name: job["id"] for trial in trials if (job := trial.job())}
    driver_job = detached_driver(spec.folder)
    shown = Table(title=f"sweep {spec.name}", title_justify="left", box=None, caption_justify="left")
    try:
        states = manager.cluster.states([*jobs.values(), *([driver_job] if driver_job else [])])
        shown.caption = _driver(lock.holder(spec.folder), driver_job, states)
    except OSError as error:
        states = dict.fromkeys(jobs.values(), JobState("UNKNOWN", str(error)))
        shown.caption = f"the folders alone say this: {error}"
    stage = ["stage"] if spec.confirm else []
    for column in ("trial", *stage, "job", "state", "node", "on", "epoch", spec.objective, "queued", "running", "why"):
        shown.add_column(column, overflow="fold")
    for trial in trials:
        results = trial.results()
        value = f"{results[-1][spec.objective]:.2f}" if results else "-"
        job = jobs.get(trial.name, "-")
        state = states.get(job)
        end = trial.ended()
        node = state.node if state and state.alive and end is None else ""
        on = ", ".join(filter(None, (results[-1].get(key) for key in ("device", "precision")))) if results else ""
        epochs = f"{len(results)}/{trial.config.epochs}"
        name = [trial.name, spec.stage(trial.config)] if spec.confirm else [trial.name]
        shown.add_row(*name, job, _state(end, state), node, on, epochs, value, *_times(trial), _why(trial, end, state))
    return shown


def _driver(running: lock.Holder | None, job: str | None, states: dict[str, JobState]) -> str:
    state = states.get(job) if job else None
    if state is not None and state.alive:
        return f"driver: job {job}, {state} {state.node}".rstrip()
    return f"driver: {running}" if running else "no driver runs; --resume starts one"


def _state(end: End | None, state: JobState | None) -> str:
    if end is not None:
        return end.state
    if state is None or not state.alive:
        return "no job"
    return "cannot start" if state.stuck else state.state.lower()


def _why(trial: TrialFolder, end: End | None, state: JobState | None) -> str:
    if end is not None:
        failed = end.state == State.FAILED
        return "\n".join([f"{end.cause}: {end.reason}", *trial.last_log_lines()]) if failed else ""
    if state is None:
        return "waits to be submitted"
    return state.reason if state.alive else state.state.lower()


def _times(trial: TrialFolder) -> tuple[str, str]:
    """Return how long its last job was queued, and how long it has run, in words."""
    asked_at, attempt, now = trial.submitted_at(), trial.newest(), time.time()
    if asked_at is None:
        return "", ""
    if attempt is None or attempt.started() < asked_at:
        return _duration(now - asked_at), ""
    until = attempt.last_sign() if attempt.ended() else now
    return _duration(attempt.started() - asked_at), _duration(until - attempt.started())


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds))))


def follow(spec: Spec, name: str, console: Console) -> None:
    """Show the log of the trial whose name begins with `name` until it has ended, whichever job writes it.

    Raises UserError when there is no such trial, or more than one.
    """
    trials = TrialFolder.requested(spec.trials)
    matching = [trial for trial in trials if trial.name.startswith(name)]
    if len(matching) != 1:
        choice = ", ".join(trial.name for trial in (matching or trials)[:5])
        raise UserError(f"{spec.folder}: {len(matching)} trials are called {name}...; there is {choice or 'none yet'}")
    (trial,) = matching
    shown, position = "", 0
    with suppress(KeyboardInterrupt):
        while True:
            end, job = trial.ended(), trial.job()  # the end first: what was written before it is read below
            if job and job["log"] != shown:
                shown, position = job["log"], 0
                console.print(f"trial {trial.name}, job {job['id']}: {shown}", style="bold", highlight=False)
            if shown and Path(shown).exists():
                with open(shown, "rb") as log:
                    log.seek(position)
                    text = log.read()
                position += len(text)
                console.out(text.decode(errors="replace"), end="", highlight=False)
            if end is not None:
                console.print(str(end), style="bold", markup=False, highlight=False)
                return
            time.sleep(POLL_SECONDS)


def cancel(spec: Spec, manager: JobManager, patience: float = 120.0) -> int:
    """End the sweep's driver, if there is one, and every job; how many trials are left unfinished.

    Raises UserError for a driver on another machine that is no job, and where the cluster does not answer.
    """
    driver_job, driver = detached_driver(spec.folder), lock.holder(spec.folder)
    try:
        state = manager.cluster.states([driver_job]).get(driver_job) if driver_job else None
        if driver_job and state is not None and state.alive:
            manager.cluster.cancel([driver_job])
        elif driver is not None and driver.lives_here():
            os.kill(driver.process, signal.SIGINT)
        elif driver is not None:
            raise UserError(f"{spec.folder}: its driver is {driver}; end it there first")
    except OSError as error:
        raise UserError(f"{spec.folder}: nothing was cancelled, try again: {error}") from None
    deadline = time.monotonic() + patience
    while lock.holder(spec.folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    last = JobManager(spec.trials, manager.cluster)  # which knows what the driver asked for until its end
    with suppress(OSError):  # the controller is away; what is noted is told to stop all the same
        last.adopt()
    last.interrupt()
    return len(last.scan.open())


def detached_driver(sweep: Path) -> str | None:
    """Return the id of the job that the sweep's driver was last submitted as, if it ever was."""
    try:
        return str(json.loads((sweep / DRIVER_JOB).read_text())["id"])
    except FileNotFoundError:
        return None
