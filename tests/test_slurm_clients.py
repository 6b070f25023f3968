"""SLURM's commands that hang: each is ended in time, by whomever it was called, and that is said in its name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cluster import slurm
from cluster.folder import TrialFolder
from cluster.profile import Profile
from cluster.relay import Relay
from cluster.slurm import SlurmCluster

ANSWERS = {"scontrol": "echo MaxArraySize = 1001", "srun": "exit 0", "squeue": "exit 0", "scancel": "exit 0"}


@pytest.fixture
def answering(tmp_path, monkeypatch):
    """A cluster whose commands answer as one says, and else that there is nothing."""
    commands = tmp_path / "commands"
    commands.mkdir()
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")

    def make(**answers: str) -> SlurmCluster:
        for name, answer in (ANSWERS | answers).items():
            (commands / name).write_text(f"#!/bin/sh\n{answer}\n")
            (commands / name).chmod(0o755)
        return SlurmCluster(Profile(kind="slurm"), tmp_path / "sweep", "0123456789", 1, 1)

    return make


@pytest.fixture
def cluster(answering, tmp_path, monkeypatch):
    """A cluster whose command of this name hangs; the others answer."""
    monkeypatch.setattr(slurm, "CLIENT_TIMEOUT", 1)
    os.mkfifo(tmp_path / "never")  # nobody ever opens its other end
    return lambda hangs: answering(**{hangs: f"exec cat {tmp_path / 'never'}"})


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


def lost(cluster: SlurmCluster, trial: TrialFolder, tmp_path: Path) -> None:
    """A submission of which the answer was lost: the job waits, and its id is not noted."""
    (cluster.folder / f"{cluster.name}-1.json").write_text(json.dumps([trial.name]))
    row = f"{cluster.name}-1|7|PENDING|Priority|"
    script = f'#!/bin/sh\ncase "$*" in *%T*) echo "{row}";; *) echo "{cluster.name}-1|7|{cluster.name}-1";; esac\n'
    (tmp_path / "commands" / "squeue").write_text(script)


def test_who_only_looks_adopts_nothing(answering, trials, tmp_path):
    """`--status` beside a driver: the driver finds its job by what it has written down, and submits no other."""
    made = answering(sbatch="exit 1")
    lost(made, trials[0], tmp_path)
    Relay(tmp_path / "trials", made)
    assert trials[0].job() is None
    assert len(list(made.folder.glob("*.json"))) == 1


def test_an_adopted_job_is_alive_whatever_was_answered_before(answering, trials, tmp_path):
    made = answering(sbatch="echo submitted >> submissions")
    relay = Relay(tmp_path / "trials", made)
    assert made.states([]) == {}  # the answer that is kept for a while
    lost(made, trials[0], tmp_path)
    made.jobs_in_flight = 1
    relay.poll()
    assert trials[0].job()["id"] == "7"
    assert relay.states[trials[0].name].state == "PENDING"
    assert trials[1].job() is None
