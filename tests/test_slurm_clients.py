"""SLURM's commands that hang: each is ended in time, by whomever it was called, and that is said in its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster import slurm
from cluster.folder import TrialFolder
from cluster.profile import Profile
from cluster.slurm import SlurmCluster

ANSWERS = {"scontrol": "echo MaxArraySize = 1001", "srun": "exit 0", "squeue": "exit 0", "scancel": "exit 0"}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster whose command of this name hangs; the others answer."""
    monkeypatch.setattr(slurm, "CLIENT_TIMEOUT", 1)
    commands = tmp_path / "commands"
    commands.mkdir()
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")

    def make(hangs: str) -> SlurmCluster:
        os.mkfifo(tmp_path / "never")  # nobody ever opens its other end
        for name, answer in (ANSWERS | {hangs: f"exec cat {tmp_path / 'never'}"}).items():
            (commands / name).write_text(f"#!/bin/sh\n{answer}\n")
            (commands / name).chmod(0o755)
        return SlurmCluster(Profile(kind="slurm"), tmp_path / "sweep", "0123456789", 1, 1)

    return make


@pytest.fixture
def trials(digits, tmp_path) -> list[TrialFolder]:
    return [TrialFolder.request(tmp_path / "trials", digits(init_seed=seed)) for seed in range(2)]


@pytest.mark.parametrize("count", [1, 2])
def test_sbatch(cluster, trials, count):
    """Alone, and for an array, which submitit submits in another way."""
    with pytest.raises(OSError, match=r"^sbatch did not answer within 1 s$"):
        cluster("sbatch").submit(trials[:count], exclude="")
    assert all(trial.job() is None for trial in trials)


def test_squeue(cluster):
    with pytest.raises(OSError, match=r"^squeue did not answer within 1 s$"):
        cluster("squeue").states(["1"])


def test_scancel(cluster):
    with pytest.raises(OSError, match=r"^scancel did not answer within 1 s$"):
        cluster("scancel").cancel(["1"])


def test_scontrol(cluster, trials):
    with pytest.raises(OSError, match=r"^scontrol did not answer within 1 s$"):
        cluster("scontrol").submit(trials, exclude="")


def test_sacct_that_hangs_is_not_asked_again(cluster, tmp_path):
    """Accounting is an extra; without it a job that squeue has forgotten counts as lost."""
    made = cluster("sacct")
    assert made.states(["1"]) == {}
    Path(tmp_path / "commands" / "sacct").write_text("#!/bin/sh\necho '1|COMPLETED|node1'\n")
    made._next_question = 0.0
    assert made.states(["1"]) == {}
