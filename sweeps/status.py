"""What a sweep's jobs are doing, and their end, from the folders and the cluster alone: no driver needs to be alive."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import time
from pathlib import Path

from rich.table import Table

from cluster.folder import JobState, State, TrialFolder
from cluster.relay import Relay
from lorvp.errors import UserError
from sweeps.spec import Spec


def table(spec: Spec, relay: Relay) -> Table:
    """Every trial: its job, where that is, how far it is, and why it failed or waits."""
    trials = TrialFolder.requested(spec.trials)
    jobs = {trial.name: job["id"] for trial in trials if (job := trial.job())}
    states = relay.cluster.states(list(jobs.values()))
    shown = Table(title=f"sweep {spec.name}", title_justify="left", box=None)
    for column in ("trial", "job", "state", "node", "epoch", spec.objective, "why"):
        shown.add_column(column, overflow="fold")
    for trial in trials:
        results = trial.results()
        value = f"{results[-1][spec.objective]:.2f}" if results else "-"
        state = states.get(jobs.get(trial.name, ""))
        epochs = f"{len(results)}/{trial.config.epochs}"
        node = state.node if state and state.alive else ""
        shown.add_row(trial.name, jobs.get(trial.name, "-"), *_state(trial, state, node, epochs, value))
    return shown


def _state(trial: TrialFolder, state: JobState | None, node: str, epochs: str, value: str) -> list[str]:
    end = trial.ended()
    if end is not None:
        why = "\n".join([end.reason, *trial.last_log_lines()]) if end.state == State.FAILED else ""
        return [end.state, node, epochs, value, why]
    if state is None or not state.alive:
        return ["no job", node, epochs, value, state.state.lower() if state else "waits to be submitted"]
    return [state.state.lower(), node, epochs, value, state.reason if state.waiting else ""]


def cancel(spec: Spec, relay: Relay, patience: float = 120.0) -> int:
    """Ends the sweep's driver, if there is one on this machine, and every job; how many trials are left unfinished."""
    driver = running_driver(spec.folder)
    if driver is not None:
        host, process = driver
        if host != socket.gethostname():
            raise UserError(f"{spec.folder}: its driver is process {process} on {host}; end it there first")
        os.kill(process, signal.SIGINT)
        deadline = time.monotonic() + patience
        while running_driver(spec.folder) and time.monotonic() < deadline:
            time.sleep(0.2)
    relay.interrupt()
    return len(relay.open_trials())


def running_driver(sweep: Path) -> tuple[str, int] | None:
    """Host and process id of the driver that holds the sweep's lock."""
    with open(sweep / "driver.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except OSError:
            lock.seek(0)
            _, process, _, host = lock.read().split()
            return host, int(process)
