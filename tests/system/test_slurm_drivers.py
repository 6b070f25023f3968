"""Whole sweeps on real SLURM daemons whose drivers end, or find no controller."""

from __future__ import annotations

import re
import signal
import socket

import pytest
from support.slurm import TWO, alive, attempts, finish, held_in_epoch_2, make_sweep, no_jobs
from support.waiting import wait_for

pytest_plugins = ["support.slurm"]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_drivers_that_end_and_are_resumed(slurm, tmp_path):
    """One sweep through the ends of five drivers: refused beside another, killed, SIGTERM, SIGINT, --leave-running."""
    sweep = make_sweep(slurm, tmp_path, **TWO)
    driver, _, _ = held_in_epoch_2(sweep)
    said = sweep.run("--resume", code=2)
    assert f"another driver runs this sweep: process {driver.pid} on {socket.gethostname()}" in " ".join(said.split())
    driver.kill()
    before, jobs = sweep.results(), sweep.jobs()
    driver = sweep.start("--resume")
    driver.is_on()
    sweep.holds.asked_again(driver)
    assert sweep.jobs() == jobs  # re-attached, not submitted twice
    sweep.interrupt(driver, signal.SIGTERM)
    no_jobs(slurm)
    step = sweep.holds.hold("step", epoch=2, step=4)
    driver = sweep.start("--resume")
    step.reached(driver, count=2)
    sweep.interrupt(driver, signal.SIGINT)
    no_jobs(slurm)
    step = sweep.holds.hold("step", epoch=2, step=5)
    driver = sweep.start("--resume", "--leave-running")
    step.reached(driver, count=2)
    jobs = sweep.jobs()
    driver.signal(signal.SIGTERM)
    driver.end(code=130)
    assert alive(slurm) == {job["id"] for job in jobs.values()}
    assert not any(trial.stop_reason() for trial in sweep.trials())
    driver = sweep.start("--resume")
    driver.is_on()
    sweep.holds.asked_again(driver)
    step.release()
    finish(sweep, slurm, driver, trials=2)
    sweep.check_kept(before)
    assert sweep.jobs() == jobs
    assert attempts(sweep) == ["0003", "0003"]


def test_a_driver_killed_before_it_has_noted_its_jobs(slurm, tmp_path):
    """sbatch had answered: the next one finds the jobs by their name, and submits none of them again."""
    sweep = make_sweep(slurm, tmp_path, **TWO)
    noting = sweep.holds.hold("noting")
    step = sweep.holds.hold("step", epoch=2, step=3)
    driver = sweep.start()
    noting.reached(driver)
    driver.kill()
    assert not any(sweep.jobs().values())
    noting.release()
    driver = sweep.start("--resume")
    step.reached(driver, count=2)
    sweep.holds.asked_again(driver)
    assert len(alive(slurm)) == 2
    step.release()
    finish(sweep, slurm, driver, trials=2)
    assert attempts(sweep) == ["0001", "0001"]


def test_all_nodes_drained_for_a_while(slurm, tmp_path):
    """The driver and --status say why its jobs wait, and it goes on when nodes are back; --cancel needs no driver."""
    slurm.say("scontrol", "update", f"nodename={','.join(slurm.nodes)}", "state=drain", "reason=test")
    sweep = make_sweep(slurm, tmp_path, **TWO)
    step = sweep.holds.hold("step", epoch=2, step=3)
    driver = sweep.start()
    driver.says("waiting: . of the jobs cannot start: (ReqNodeNotAvail|Nodes required for job are DOWN)")
    wait_for("submission of both", lambda: len(sweep.trials()) == 2 and all(sweep.jobs().values()), driver)
    shown = ""

    def both_cannot_start() -> bool:
        nonlocal shown
        shown = sweep.run("--status")
        return shown.count("cannot start") == 2

    wait_for("reason of both to wait", both_cannot_start, driver)
    assert re.search("Nodes required for job are DOWN|ReqNodeNotAvail", shown.replace("_", " "))
    slurm.say("scontrol", "update", f"nodename={','.join(slurm.nodes)}", "state=resume")
    step.reached(driver, count=2)
    driver.kill()
    before = sweep.results()
    cancelling = sweep.start("--cancel")
    sweep.all_asked_to_stop(cancelling)
    step.release()
    assert "2 trials left unfinished" in cancelling.end()
    no_jobs(slurm)
    finish(sweep, slurm, sweep.start("--resume"), trials=2)
    sweep.check_kept(before)


def test_controller_down_during_submission(slurm, tmp_path):
    slurm.stop("slurmctld")
    sweep = make_sweep(slurm, tmp_path, **TWO)
    driver = sweep.start()
    driver.says("trying again: ")
    assert not any(sweep.jobs().values())
    shown = " ".join(sweep.run("--status").split())
    assert "the folders alone say this: squeue: " in shown
    slurm.start("slurmctld", "-D")
    finish(sweep, slurm, driver, trials=2)
    assert attempts(sweep) == ["0001", "0001"]
