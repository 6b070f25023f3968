"""Whole sweeps on real SLURM daemons, and what a cluster does to their jobs."""

from __future__ import annotations

import getpass
import re
import signal
import subprocess

import psutil
import pytest
import torch
from support.slurm import (
    CONTROL,
    TWO,
    attempts,
    finish,
    held_in_epoch_2,
    make_sweep,
    node_of,
    noted,
    started,
    wait_for_attempt,
)
from support.slurm_sim import PROFILE, Simulation
from support.sweep import Driver, small_disk
from support.waiting import wait_for

from cluster.trial_folder import Cause, TrialFolder
from sweeps.spec import file as spec_file

pytest_plugins = ["support.slurm"]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


SCAVENGE = PROFILE.replace("partition: gpu", "partition: scavenge")
"""Whose jobs give way to those of other partitions."""


def test_what_happens_to_two_jobs(slurm, tmp_path):
    """A signal before python has its handlers, stops, a requeue, a scancel by someone else, and a preemption."""
    sweep = make_sweep(slurm, tmp_path, SCAVENGE, **TWO)
    sweep.cold_jobs = True
    begin = sweep.holds.hold("start")
    driver = sweep.start()
    held = begin.reached(driver, count=2)
    noted(sweep, driver)
    jobs = sweep.jobs()
    first, second = sweep.trials()
    slurm.say("scancel", "--signal=USR2", first.job_id)
    (killed,) = [each for each in held if each.job == first.job_id]
    wait_for("end of the process", lambda: not killed.alive(), driver)
    step = sweep.holds.hold("step", epoch=2, step=3)
    begin.release()
    step.reached(driver, count=2)
    wait_for("note of the new job", lambda: first.job() != jobs[first.name], driver)
    assert second.job() == jobs[second.name]

    # suspended by SLURM and stopped by a signal: neither is taken for dead, nobody starts another
    jobs = sweep.jobs()
    (suspended,) = [each for each in step.those() if each.trial == first.name]
    slurm.say("scontrol", "suspend", first.job_id)
    wait_for("stop of the process", lambda: suspended.process().status() == psutil.STATUS_STOPPED, driver)
    sweep.holds.asked_again(driver)
    assert "suspended" in sweep.run("--status")
    slurm.say("scancel", "--signal=STOP", second.job_id)
    (stopped,) = [each for each in step.those() if each.trial == second.name]
    wait_for("stop of the other", lambda: stopped.process().status() == psutil.STATUS_STOPPED, driver)
    sweep.holds.asked_again(driver)
    slurm.say("scancel", "--signal=CONT", second.job_id)
    later = sweep.holds.hold("step", epoch=3, step=2, attempt="0001")
    step.release()
    (other,) = later.reached(driver)
    assert other.trial == second.name
    assert len(first.results()) == 1
    slurm.say("scontrol", "resume", first.job_id)
    later.reached(driver, count=2)
    assert sweep.jobs() == jobs
    assert attempts(sweep) == ["0001", "0001"]

    # requeued, and cancelled by someone else
    before = sweep.results()
    again = sweep.holds.hold("step", epoch=3, step=3, attempt="0002")
    slurm.say("scontrol", "requeue", first.job_id)
    slurm.say("scancel", second.job_id)
    again.reached(driver, count=2)
    wait_for("note of the new job", lambda: second.job() != jobs[second.name], driver)
    assert first.job() == jobs[first.name]

    # preempted by a higher partition, where the site requeues what it preempts
    jobs = sweep.jobs()
    preempted(slurm, driver, sweep.trials(), attempt="0002")
    finish(sweep, slurm, driver, trials=2)
    sweep.check_kept(before)
    assert sweep.jobs() == jobs
    assert attempts(sweep) == ["0003", "0003"]


@pytest.mark.usefixtures("installed")
def test_power_loss_under_a_running_job(tmp_path):
    with started(accounting=True) as slurm:
        sweep = make_sweep(slurm, tmp_path, **TWO)
        driver, step, trial = held_in_epoch_2(sweep)
        before = sweep.results()
        slurm.power_loss(node_of(slurm, trial))
        wait_for_attempt(trial, "0002", driver)
        step.release()
        finish(sweep, slurm, driver, trials=2)
        sweep.check_kept(before)
        assert trial.newest().path.name == "0002"


def test_split_brain(slurm, tmp_path):
    """A node's slurmd is killed and its job lives on, while SLURM starts the job again elsewhere.

    The stale copy writes its checkpoint when the new one has begun; it says no more.
    """
    sweep = make_sweep(slurm, tmp_path, one=("trials: 4", "trials: 1"), alone=(CONTROL, "control: null\n"))
    step = sweep.holds.hold("step", epoch=2)
    driver = sweep.start()
    step.reached(driver)
    writes = sweep.holds.hold("checkpoint", attempt="0001")
    step.release()
    (held,) = writes.reached(driver)
    (trial,) = sweep.trials()
    stale = trial.newest()
    before = stale.results()
    node = node_of(slurm, trial)
    slurm.kill_daemon(node)
    slurm.say("scontrol", "update", f"nodename={node}", "state=down", "reason=dead")  # SLURM would take 15 s
    wait_for_attempt(trial, "0002", driver)
    assert held.alive()
    writes.release()
    wait_for("end of the stale copy", lambda: not held.alive())
    assert stale.results() == before
    assert stale.ended() is None
    finish(sweep, slurm, driver, trials=1)
    sweep.check_kept({trial.name: before})
    assert trial.newest().path.name == "0002"


def preempted(slurm: Simulation, driver: Driver, trials: list[TrialFolder], attempt: str) -> None:
    """Jobs of a higher partition take both nodes of the type that the trials want, until they have run."""
    release = slurm.folder / "go"
    wait = f"--wrap=until [ -e {release} ]; do sleep 0.1; done"
    command = ["sbatch", "--parsable", "--partition=gpu", "--gres=gpu:rtx8000:2", "--ntasks=1", "--array=0-1", wait]
    job = slurm.say(*command, "--output=/dev/null", "--mem=100M").strip()
    states = ["squeue", "--noheader", "--array", f"--jobs={job}", "--format=%T"]
    wait_for("preemption", lambda: slurm.say(*states).split() == ["RUNNING"] * 2, driver)
    assert [trial.newest().path.name for trial in trials] == [attempt] * len(trials)
    release.touch()


@pytest.mark.usefixtures("installed")
def test_preempted_and_cancelled(tmp_path):
    """Where the site cancels what it preempts, the driver submits anew."""
    with started(PreemptMode="CANCEL") as slurm:
        sweep = make_sweep(slurm, tmp_path, SCAVENGE, **TWO)
        driver, _, _ = held_in_epoch_2(sweep, attempt="0001")
        before, jobs = sweep.results(), sweep.jobs()
        preempted(slurm, driver, sweep.trials(), attempt="0001")
        finish(sweep, slurm, driver, trials=2)
        sweep.check_kept(before)
        assert all(job["id"] != jobs[name]["id"] for name, job in sweep.jobs().items())
        assert attempts(sweep) == ["0002", "0002"]


@pytest.mark.usefixtures("installed")
def test_a_site_that_lets_a_user_have_two_jobs(tmp_path):
    """It refuses the array of four: two of them run, the others are submitted when there is room, and why is said."""
    with started(accounting=True, AccountingStorageEnforce="limits") as slurm:
        for words in ("add account lab", f"add user {getpass.getuser()} account=lab MaxSubmitJobs=2"):
            slurm.say("sacctmgr", "--immediate", *words.split())
        concurrent = ("concurrent: 2", "concurrent: 4")
        profile = PROFILE.replace("flight: 2", "flight: 4") + "account: lab\n"
        sweep = make_sweep(slurm, tmp_path, profile, concurrent=concurrent, alone=(CONTROL, "control: null\n"))
        sweep.holds.set("cluster.job_manager.MAX_WAIT", 2.0)
        step = sweep.holds.hold("step", epoch=2, step=3)
        driver = sweep.start()
        step.reached(driver, count=2)
        driver.says("trying again: submission refused, again in . s: sbatch: AssocMaxSubmitJobLimit; ")
        assert len([job for job in sweep.jobs().values() if job]) == 2
        step.release()
        finish(sweep, slurm, driver, trials=4)
        assert attempts(sweep) == ["0001"] * 4


@pytest.mark.usefixtures("installed")
def test_a_node_whose_prolog_fails(tmp_path):
    """SLURM holds the job for ever: it is cancelled, which is said, and another goes to another node."""
    prolog = tmp_path / "prolog"
    prolog.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" != node1 ]\n')
    prolog.chmod(0o755)
    with started(Prolog=str(prolog)) as slurm:
        sweep = make_sweep(slurm, tmp_path, **TWO)
        driver = sweep.start()
        driver.says("launch failed requeued held: job .* is cancelled, and another submitted")
        finish(sweep, slurm, driver, trials=2)
        assert attempts(sweep) == ["0001", "0001"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_nodes_whose_gpus_torch_can_not_use(slurm, tmp_path):
    """Each is left out from then on; a trial that none of them can train fails, and says why."""
    profile = PROFILE.replace("allow_cpu: true", "requeues: 2")
    sweep = make_sweep(slurm, tmp_path, profile, one=("trials: 4", "trials: 1"), alone=(CONTROL, "control: null\n"))
    said = sweep.run(code=1)
    (trial,) = sweep.trials()
    assert trial.ended().cause == Cause.NODE_FAILURE
    assert trial.ended().reason.startswith("its job ended 3 times without a result: node failure on node")
    assert not trial.results()
    logs = " ".join(path.read_text() for path in (sweep.path / "jobs").glob("*_log.out"))
    found = re.findall("node failure on (node[123]): the job was given a GPU", logs)
    assert sorted(set(found)) == ["node1", "node2"]  # which have GPUs of that type
    assert "Requested node configuration is not available" in said  # without both; then any of them may be tried again


@pytest.mark.usefixtures("installed")
def test_time_limit_shorter_than_a_trial(tmp_path):
    """It nears while the trial is in a step, since it is lowered then: the checkpoint loses no step.

    Nor where the site lets no job be requeued any more: then a new job goes on there.
    """
    # a slow machine may take longer than until the limit itself
    with started(OverTimeLimit="10", JobRequeue="0") as slurm:
        sweep = make_sweep(slurm, tmp_path, one=("trials: 4", "trials: 1"), alone=(CONTROL, "control: null\n"))
        step = sweep.holds.hold("step", epoch=2, step=3, attempt="0001")
        signalled = sweep.holds.hold("signalled")
        again = sweep.holds.hold("step", attempt="0002")
        driver = sweep.start()
        step.reached(driver)
        (trial,) = sweep.trials()
        before = sweep.results()
        slurm.say("scontrol", "update", f"jobid={trial.job_id}", "timelimit=1")
        signalled.reached(driver)
        slurm.say("scontrol", "update", f"jobid={trial.job_id}", "timelimit=30")  # for the next start
        step.release()
        signalled.release()
        (goes_on,) = again.reached(driver)
        assert (goes_on.epoch, goes_on.step, goes_on.restarts) == (2, 3, 1)
        assert trial.job()["submissions"] == 1
        first = trial.job_id
        slurm.say("scontrol", "update", f"jobid={first}", "requeue=0")
        signalled = sweep.holds.hold("signalled")
        anew = sweep.holds.hold("step", attempt="0003")
        slurm.say("scancel", "--signal=USR2", first)
        signalled.reached(driver)
        again.release()
        signalled.release()
        (goes_on,) = anew.reached(driver)
        assert (goes_on.epoch, goes_on.step, goes_on.restarts) == (2, 3, 0)
        wait_for("note of the new job", lambda: trial.job_id != first, driver)
        anew.release()
        finish(sweep, slurm, driver, trials=1)
        sweep.check_kept(before)
        assert trial.job()["submissions"] == 2


def test_tracking_server_away_for_a_while(slurm, tmp_path, server):
    sweep = make_sweep(slurm, tmp_path, **TWO)
    sweep.environment["MLFLOW_TRACKING_URI"] = server.uri
    driver, step, _ = held_in_epoch_2(sweep)
    server.stop(signal.SIGKILL)
    last = sweep.holds.hold("step", epoch=3)
    step.release()
    last.reached(driver, count=2)
    driver.says("trying again: ")
    server.start()
    last.release()
    finish(sweep, slurm, driver, trials=2)


@pytest.mark.usefixtures("installed")
def test_disk_full_in_one_trials_folder(tmp_path):
    """It is said, the other trials go on, and so does this one once there is room."""
    changes = {
        "grid": ("algorithm: tpe, trials: 4,", "algorithm: grid,"),
        "axes": ("{log_uniform: [0.005, 0.2]}", "{choice: [0.05]}"),
        "mappings": ("[rlm, flm, ilm, lp]", "[lp]"),
        "short": ("epochs: 3", "epochs: 2"),
    }
    sweep = make_sweep(None, tmp_path, **changes)
    spec = spec_file.load(sweep.folder / "sweep.yaml", [f"output={sweep.folder / 'runs'}"])
    full = TrialFolder(spec.trials / spec.trial_config(spec.cells()[0]).content_hash())
    with small_disk(full.path, "32k"), started() as slurm:  # in this order: the nodes see what was mounted before them
        sweep.environment |= {"SLURM_CONF": slurm.environment["SLURM_CONF"]}
        driver = sweep.start()
        others = lambda: [trial for trial in sweep.trials() if trial.ended() and trial.name != full.name]  # noqa: E731
        wait_for("end of the others", lambda: len(others()) == 2, driver)
        driver.says(f"disk full: {full.path}")
        assert full.ended() is None
        subprocess.run(["mount", "-o", "remount,size=64m", full.path], check=True)
        finish(sweep, slurm, driver, trials=3)
