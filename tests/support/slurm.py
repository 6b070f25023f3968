"""Sweeps on a real SLURM of a test's own; its fixtures come to a test module by `pytest_plugins`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.trial_folder import State, TrialFolder
from support import debian
from support.holds import Hold
from support.slurm_sim import PACKAGES, PROFILE, Simulation
from support.sweep import SPEC, Driver, Sweep
from support.waiting import wait_for


@pytest.fixture(scope="session")
def installed() -> None:
    debian.need(["slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd"], PACKAGES)
    if os.geteuid():
        debian.missing("starting SLURM's nodes in namespaces needs root")


@contextmanager
def started(accounting: bool = False, **options: str) -> Iterator[Simulation]:
    """A cluster of three nodes, in a folder that munge trusts: pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="lorvp-slurm-"))
    folder.chmod(0o755)
    simulation = Simulation(folder, accounting=accounting, **options)
    try:
        simulation.up()
        yield simulation
    finally:
        simulation.down()


@pytest.fixture
def slurm(installed: None) -> Iterator[Simulation]:
    """One that keeps no account of its jobs, which starts in a third of a second."""
    with started() as simulation:
        yield simulation


CONTROL = "control: {}\n"
TWO = {"few": ("trials: 4", "trials: 2"), "alone": (CONTROL, "control: null\n")}
"""Two trials, which run beside each other."""


def make_sweep(slurm: Simulation | None, folder: Path, profile: str = PROFILE, **changes: tuple[str, str]) -> Sweep:
    """The small sweep with its trials on SLURM, which may start later; `changes` replace text of the spec."""
    (folder / "profile.yaml").write_text(profile)
    text = SPEC.replace("rule: asha", "rule: none") + f"cluster: {folder / 'profile.yaml'}\n"
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    return Sweep(folder, text, {"SLURM_CONF": slurm.environment["SLURM_CONF"]} if slurm else {})


def held_in_epoch_2(sweep: Sweep, **wanted: Any) -> tuple[Driver, Hold, TrialFolder]:
    """A driver whose two trials are held in a step of their second epoch; one of the trials."""
    step = sweep.holds.hold("step", epoch=2, step=3, **wanted)
    driver = sweep.start()
    step.reached(driver, count=2)
    noted(sweep, driver)
    return driver, step, sweep.trials()[0]


def noted(sweep: Sweep, driver: Driver | None = None) -> None:
    """Waits until the driver has noted the jobs of both trials, which may have begun before that."""
    wait_for("note of the jobs", lambda: len(sweep.trials()) == 2 and all(sweep.jobs().values()), driver)


def finish(sweep: Sweep, slurm: Simulation, driver: Driver, trials: int) -> str:
    """Waits for the driver; every trial has its epochs once, here and in MLflow, and no job is left."""
    output = driver.end()
    sweep.check_complete(trials)
    assert all(trial.ended().state == State.FINISHED for trial in sweep.trials())
    no_jobs(slurm)
    return output


def no_jobs(slurm: Simulation) -> None:
    wait_for("end of all jobs", lambda: not slurm.say("squeue", "--noheader").strip())


def alive(slurm: Simulation) -> set[str]:
    """The ids of the jobs that wait or run."""
    return set(slurm.say("squeue", "--noheader", "--array", "--states=PENDING,RUNNING", "--format=%i").split())


def node_of(slurm: Simulation, trial: TrialFolder) -> str:
    return slurm.say("squeue", "--noheader", f"--jobs={trial.job_id}", "--format=%N").strip()


def wait_for_attempt(trial: TrialFolder, name: str, driver: Driver) -> None:
    wait_for(f"attempt {name} at {trial}", lambda: trial.newest().path.name == name, driver)


def attempts(sweep: Sweep) -> list[str]:
    """The newest attempt of each trial."""
    return [trial.newest().path.name for trial in sweep.trials()]
