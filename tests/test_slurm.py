"""Whole sweeps on real SLURM daemons, and what a cluster does to them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import debian
import psutil
import pytest
from slurm_sim import PACKAGES, PROFILE, TYPES, Simulation
from test_sweep import SPEC, Sweep
from typer.testing import CliRunner

from cluster.folder import State, TrialFolder
from sweeps import launch, spec_file

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def installed() -> None:
    debian.need(["slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd"], PACKAGES)
    if os.geteuid():
        debian.missing("starting SLURM's nodes in namespaces needs root")


@contextmanager
def started(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[Simulation]:
    """A cluster of three nodes, in a folder that munge trusts: pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="lorvp-slurm-"))
    folder.chmod(0o755)
    simulation = Simulation(folder, **options)
    monkeypatch.setenv("SLURM_CONF", simulation.environment["SLURM_CONF"])
    try:
        simulation.up()
        yield simulation
    finally:
        simulation.down()


def test_the_simulation_starts_soon_and_leaves_nothing(installed, monkeypatch):
    begun = time.monotonic()
    with started(monkeypatch) as slurm:
        assert time.monotonic() - begun < 10
        job = slurm.say("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 60").strip()
        slurm.wait(lambda: "RUNNING" in slurm.say("squeue", "--noheader", f"--jobs={job}", "--format=%T"))
    folder = str(slurm.folder)
    left = [p.info for p in psutil.process_iter(["cmdline", "environ"]) if folder in str(p.info)]
    assert not [info for info in left if info["cmdline"] and "pytest" not in " ".join(info["cmdline"])]
    assert not slurm.folder.exists()


@pytest.fixture
def slurm(installed, monkeypatch) -> Iterator[Simulation]:
    with started(monkeypatch) as simulation:
        yield simulation


def make_sweep(tmp_path: Path, profile: str = PROFILE, **changes: str) -> Sweep:
    """The small sweep with its trials on SLURM; `changes` replace text of the spec."""
    (tmp_path / "profile.yaml").write_text(profile)
    text = SPEC.replace("rule: asha", "rule: none") + f"cluster: {tmp_path / 'profile.yaml'}\n"
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    return Sweep(tmp_path, text)


CONTROL = "control: {}\n"
LONG = {
    "longer": ("epochs: 3", "epochs: 25"),
    "larger": ("max_per_class: 20", "max_per_class: 60"),
    "few": ("trials: 4", "trials: 2"),
    "alone": (CONTROL, "control: null\n"),
}
"""Two trials, long enough for something to happen to them."""
LONGER = LONG | {"longer": ("epochs: 3", "epochs: 60")}


def running(sweep: Sweep, process: subprocess.Popen, epochs: int = 2) -> TrialFolder:
    """A trial of the search whose job runs and has recorded `epochs`."""
    while True:
        assert process.poll() is None, process.communicate()[0]
        for trial in sweep.trials():
            if trial.config.method == "lorvp" and len(trial.results()) >= epochs and not trial.ended():
                return trial
        time.sleep(0.2)


def finish(sweep: Sweep, slurm: Simulation, process: subprocess.Popen, trials: int) -> str:
    """Waits for the driver; every trial has its epochs once, here and in MLflow, and no job is left."""
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    sweep.check_complete(trials)
    assert all(trial.ended().state == State.FINISHED for trial in sweep.trials())
    sweep.check_model(output)
    assert no_jobs(slurm)
    return output


def no_jobs(slurm: Simulation) -> bool:
    slurm.wait(lambda: slurm.say("squeue", "--noheader").strip() == "")
    return True


def kept(before: dict[str, list], sweep: Sweep) -> None:
    """No epoch that was recorded was trained again."""
    for name, results in before.items():
        assert TrialFolder(sweep.path / "trials" / name).results()[: len(results)] == results


def recorded(sweep: Sweep) -> dict[str, list]:
    return {trial.name: trial.results() for trial in sweep.trials()}


def test_grid_on_three_nodes(slurm, tmp_path):
    """12 cells and the control; the type of GPU asked for is the one got."""
    grid = ("algorithm: tpe, trials: 4,", "algorithm: grid,")
    axes = ("{log_uniform: [0.005, 0.2]}", "{choice: [0.05, 0.1]}")
    mappings = ("[rlm, flm, ilm, lp]", "[flm, ilm, lp]")
    probe = 'setup: ["echo on $SLURMD_NODENAME with GPU $CUDA_VISIBLE_DEVICES"]\n'
    sweep = make_sweep(
        tmp_path, PROFILE + probe, grid=grid, axes=axes, mappings=mappings, short=("epochs: 3", "epochs: 1")
    )
    output = finish(sweep, slurm, sweep.start(), trials=13)
    assert "small: 13 trials" in output
    for trial in sweep.trials():
        first = Path(trial.job()["log"]).read_text()
        node, gpu = first.split("on ", 1)[1].split()[0], first.split("GPU ", 1)[1].split()[0]
        assert TYPES[slurm.nodes.index(node)] == "rtx8000"
        assert gpu in "01"


def test_drivers_that_end_and_are_resumed(slurm, tmp_path):
    """One sweep through the ends of five drivers: refused beside another, killed, SIGTERM, SIGINT, --leave-running."""
    sweep = make_sweep(tmp_path, **LONG | {"longer": ("epochs: 3", "epochs: 120")})
    process = sweep.start()
    running(sweep, process)
    said = sweep.run("--resume", code=2)
    assert f"another driver runs this sweep: process {process.pid} on {socket.gethostname()}" in " ".join(said.split())
    process.kill()
    process.wait()
    jobs = {trial.name: trial.job() for trial in sweep.trials() if trial.job()}
    for signum in (signal.SIGTERM, signal.SIGINT):
        before = recorded(sweep)
        process = sweep.resume()
        wait_for_epochs(sweep, process, before, more=2)
        if signum == signal.SIGTERM:  # the first after the kill: re-attached, not submitted twice
            assert jobs.items() <= {trial.name: trial.job() for trial in sweep.trials()}.items()
        process.send_signal(signum)
        output, _ = process.communicate(timeout=90)
        assert process.returncode == 130, output
        assert no_jobs(slurm)
        kept(before, sweep)
    before = recorded(sweep)
    process = sweep.resume("--leave-running")
    wait_for_epochs(sweep, process, before, more=2)
    jobs = {trial.name: trial.job() for trial in sweep.trials()}
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 130, output
    alive = set(slurm.say("squeue", "--noheader", "--array", "--states=PENDING,RUNNING", "--format=%i").split())
    open_jobs = {jobs[trial.name]["id"] for trial in sweep.trials() if trial.name in jobs and not trial.ended()}
    assert open_jobs
    assert open_jobs <= alive <= {job["id"] for job in jobs.values() if job}  # a trial ends just before its job does
    kept(before, sweep)
    before = recorded(sweep)
    finish(sweep, slurm, sweep.start("--resume"), trials=2)
    kept(before, sweep)
    assert jobs == {trial.name: trial.job() for trial in sweep.trials()}


def wait_for_epochs(sweep: Sweep, process: subprocess.Popen, before: dict[str, list], more: int) -> None:
    """Until every trial has recorded so many epochs since `before`."""
    while any(len(trial.results()) < len(before[trial.name]) + more for trial in sweep.trials()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)


def test_all_nodes_drained_for_a_while(slurm, tmp_path):
    """The driver and --status say why its jobs wait, and it goes on when nodes are back; --cancel needs no driver."""
    slurm.say("scontrol", "update", f"nodename={','.join(slurm.nodes)}", "state=drain", "reason=test")
    sweep = make_sweep(tmp_path, **LONG)
    process = sweep.start()
    slurm.wait(lambda: sum(trial.job() is not None for trial in sweep.trials()) == 2, seconds=60)
    shown = sweep.run("--status")
    assert shown.count("cannot start") == 2
    assert "Nodes required for job are DOWN" in shown.replace("_", " ") or "ReqNodeNotAvail" in shown
    slurm.say("scontrol", "update", f"nodename={','.join(slurm.nodes)}", "state=resume")
    running(sweep, process)
    process.kill()
    output, _ = process.communicate()
    assert re.search("waiting: . of the jobs cannot start: (ReqNodeNotAvail|Nodes required for job are DOWN)", output)
    assert "2 trials left unfinished" in sweep.run("--cancel")
    assert no_jobs(slurm)
    before = recorded(sweep)
    finish(sweep, slurm, sweep.start("--resume"), trials=2)
    kept(before, sweep)


def test_one_requeued_and_one_cancelled_by_someone_else(slurm, tmp_path):
    sweep = make_sweep(tmp_path, **LONG)
    process = sweep.start()
    running(sweep, process, epochs=1)
    slurm.wait(lambda: all(trial.results() for trial in sweep.trials()))
    before = recorded(sweep)
    first, second = sweep.trials()
    slurm.say("scontrol", "requeue", first.job()["id"])
    slurm.say("scancel", second.job()["id"])
    finish(sweep, slurm, process, trials=2)
    kept(before, sweep)
    assert [trial.newest().path.name for trial in (first, second)] == ["0002", "0002"]


def test_power_loss_under_a_running_job(slurm, tmp_path):
    sweep = make_sweep(tmp_path, **LONG)
    process = sweep.start()
    trial = running(sweep, process)
    before = recorded(sweep)
    slurm.power_loss(slurm.say("squeue", "--noheader", f"--jobs={trial.job()['id']}", "--format=%N").strip())
    finish(sweep, slurm, process, trials=2)
    kept(before, sweep)
    assert trial.newest().path.name == "0002"


def test_split_brain(slurm, tmp_path):
    """A node's slurmd is killed and its job lives on, while SLURM starts the job again elsewhere."""
    sweep = make_sweep(tmp_path, **LONGER)
    process = sweep.start()
    trial = running(sweep, process)
    stale = trial.newest()
    node = slurm.say("squeue", "--noheader", f"--jobs={trial.job()['id']}", "--format=%N").strip()
    slurm.kill_daemon(node)
    slurm.say("scontrol", "update", f"nodename={node}", "state=down", "reason=dead")  # SLURM would take 15 s
    slurm.wait(lambda: trial.newest().path.name == "0002", seconds=60)
    before = trial.newest().results()
    assert stale.results()[: len(before)] == before
    assert len(before) > 2  # the stale copy had gone on until then
    finish(sweep, slurm, process, trials=2)
    assert trial.newest().path.name == "0002"
    kept({trial.name: before}, sweep)
    assert stale.ended() is None
    assert len(stale.results()) < len(trial.results())


def test_controller_down_during_submission(slurm, tmp_path):
    slurm.stop("slurmctld")
    sweep = make_sweep(tmp_path, **LONG)
    process = sweep.start()
    slurm.wait(lambda: len(sweep.trials()) == 2, seconds=60)
    time.sleep(20)
    assert not any(trial.job() for trial in sweep.trials())
    slurm.start("slurmctld", "-D")
    output = finish(sweep, slurm, process, trials=2)
    assert "trying again" in output
    assert [trial.newest().path.name for trial in sweep.trials()] == ["0001", "0001"]


def test_suspended_and_resumed(slurm, tmp_path):
    """A suspended job is not taken for dead: nobody starts another."""
    sweep = make_sweep(tmp_path, **LONG)
    process = sweep.start()
    trial = running(sweep, process)
    job = trial.job()
    slurm.say("scontrol", "suspend", job["id"])
    time.sleep(2)
    recorded_then = len(trial.results())
    time.sleep(8)
    assert len(trial.results()) == recorded_then
    assert "suspended" in sweep.run("--status")
    slurm.say("scontrol", "resume", job["id"])
    finish(sweep, slurm, process, trials=2)
    assert trial.job() == job
    assert trial.newest().path.name == "0001"


def test_tracking_server_away_for_a_while(slurm, tmp_path, server):
    sweep = make_sweep(tmp_path, **LONG)
    sweep.environment["MLFLOW_TRACKING_URI"] = server.uri
    process = sweep.start()
    running(sweep, process)
    server.stop(signal.SIGKILL)
    time.sleep(30)
    server.start()
    assert "trying again" in finish(sweep, slurm, process, trials=2)


def test_disk_full_in_one_trials_folder(installed, tmp_path, monkeypatch):
    """It is said, the other trials go on, and so does this one once there is room."""
    grid = ("algorithm: tpe, trials: 4,", "algorithm: grid,")
    axes = ("{log_uniform: [0.005, 0.2]}", "{choice: [0.05]}")
    mappings = ("[rlm, flm, ilm, lp]", "[lp]")
    sweep = make_sweep(tmp_path, grid=grid, axes=axes, mappings=mappings)
    spec = spec_file.load(sweep.folder / "sweep.yaml", [f"output={sweep.folder / 'runs'}"])
    full = spec.trials / spec.trial_config(spec.cells()[0]).content_hash()
    full.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", full], check=True)
    try:
        with started(monkeypatch) as slurm:
            sweep.environment |= {"SLURM_CONF": slurm.environment["SLURM_CONF"]}
            process = sweep.start()
            slurm.wait(lambda: sum(trial.ended() is not None for trial in sweep.trials()) == 2, seconds=90)
            time.sleep(10)
            assert TrialFolder(full).ended() is None
            subprocess.run(["mount", "-o", "remount,size=64m", full], check=True)
            assert f"disk full: {full}" in finish(sweep, slurm, process, trials=3)
    finally:
        subprocess.run(["umount", full], check=True)


def test_several_trials_by_one_job(slurm, tmp_path):
    """A job that is requeued between its trials goes on with the one that it was handed last."""
    few = ("trials: 4, seed: 1, concurrent: 2", "trials: 5, seed: 1, concurrent: 1")
    alone = LONG["alone"]  # a control ends while Ray starts, for which its job may not care to wait
    profile = PROFILE.replace("flight: 2", "flight: 1") + "trials_per_job: 3\n"
    sweep = make_sweep(tmp_path, profile, few=few, alone=alone, longer=("epochs: 3", "epochs: 40"))
    process = sweep.start()
    slurm.wait(
        lambda: any(trial.job() and trial.job()["place"] == 2 and trial.results() for trial in sweep.trials()), 90
    )
    (trial,) = [trial for trial in sweep.trials() if trial.job() and trial.job()["place"] == 2]
    before = recorded(sweep)
    slurm.say("scontrol", "requeue", trial.job()["id"])
    finish(sweep, slurm, process, trials=5)
    kept(before, sweep)
    assert sorted((trial.job()["id"], trial.job()["place"]) for trial in sweep.trials()) == [
        ("1", 1), ("1", 2), ("1", 3), ("2", 1), ("2", 2)
    ]  # fmt: skip
    interrupted = [trial for trial in sweep.trials() if trial.newest().path.name == "0002"]
    assert [trial.job()["place"] > 1 for trial in interrupted] == [True]


def test_detached_driver(slurm, tmp_path):
    """The driver is a job, requeues itself when its time ends, and is cancelled with its jobs."""
    sweep = make_sweep(tmp_path, **LONG | {"longer": ("epochs: 3", "epochs: 150")})
    assert "the driver is job 1" in sweep.run("--detach")
    slurm.wait(lambda: any(len(trial.results()) >= 2 for trial in sweep.trials()), seconds=90)
    before = recorded(sweep)
    jobs = {trial.name: trial.job() for trial in sweep.trials()}
    assert "driver: job 1, running node" in sweep.run("--status")
    slurm.say("scancel", "--batch", "--signal=USR2", "1")
    log = sweep.path / "driver-1.log"
    slurm.wait(lambda: log.read_text().count("sweep small in") == 2, seconds=90)
    assert "ending: the jobs go on" in log.read_text()
    kept(before, sweep)
    assert jobs == {trial.name: trial.job() for trial in sweep.trials()}
    sweep.run("--cancel")
    assert no_jobs(slurm)
    assert "no driver runs" in sweep.run("--status")
    assert not any(trial.ended() for trial in sweep.trials())
    sweep.run("--detach", "--resume")
    log = Path(json.loads((sweep.path / "driver.json").read_text())["log"])
    slurm.wait(lambda: log.exists() and "as a model" in log.read_text(), seconds=180)
    assert no_jobs(slurm)
    sweep.check_complete(trials=2)
    kept(before, sweep)


def preempt(slurm: Simulation) -> None:
    """Jobs of a higher partition take both nodes of the type that the trials want."""
    command = ["sbatch", "--partition=gpu", "--gres=gpu:rtx8000:2", "--ntasks=1", "--array=0-1", "--wrap=sleep 10"]
    slurm.say(*command, "--output=/dev/null", "--mem=100M")


def test_preempted_and_cancelled(installed, tmp_path, monkeypatch):
    """Where the site cancels what it preempts, the driver submits anew."""
    with started(monkeypatch, PreemptMode="CANCEL") as slurm:
        sweep = make_sweep(tmp_path, PROFILE.replace("partition: gpu", "partition: scavenge"), **LONGER)
        process = sweep.start()
        trial = running(sweep, process)
        before, job = recorded(sweep), trial.job()
        preempt(slurm)
        slurm.wait(lambda: trial.newest().path.name == "0002", seconds=90)
        assert trial.job()["id"] != job["id"]
        finish(sweep, slurm, process, trials=2)
        kept(before, sweep)


def test_preempted_by_a_higher_partition(slurm, tmp_path):
    sweep = make_sweep(tmp_path, PROFILE.replace("partition: gpu", "partition: scavenge"), **LONGER)
    process = sweep.start()
    trial = running(sweep, process)
    before = recorded(sweep)
    preempt(slurm)
    slurm.wait(lambda: trial.newest().path.name == "0002", seconds=90)
    finish(sweep, slurm, process, trials=2)
    kept(before, sweep)
    assert any(t.newest().path.name >= "0002" for t in sweep.trials())


def test_time_limit_shorter_than_a_trial(slurm, tmp_path):
    """A limit of a minute, and a trial that needs more; the checkpoint of the signal loses no step."""
    changes = {
        "longer": ("epochs: 3", "epochs: 64"),
        "larger": ("max_per_class: 20", "max_per_class: 100"),
        "one": ("trials: 4", "trials: 1"),
        "alone": (CONTROL, "control: null\n"),
        "mapping": ("[rlm, flm, ilm, lp]", "[ilm]"),
    }
    sweep = make_sweep(tmp_path, PROFILE.replace("minutes: 30", "minutes: 1"), **changes)
    process = sweep.start()
    finish(sweep, slurm, process, trials=1)
    (trial,) = sweep.trials()
    assert trial.newest().path.name >= "0002"


def test_accounting_off(installed, tmp_path, monkeypatch):
    with started(monkeypatch, accounting=False) as slurm:
        sweep = make_sweep(tmp_path, **LONG)
        process = sweep.start()
        slurm.say("scancel", running(sweep, process).job()["id"])
        finish(sweep, slurm, process, trials=2)


def test_array_limit_below_the_number_of_trials(installed, tmp_path, monkeypatch):
    with started(monkeypatch, MaxArraySize="3") as slurm:
        sweep = make_sweep(
            tmp_path, PROFILE.replace("flight: 2", "flight: 8"), concurrent=("concurrent: 2", "concurrent: 5")
        )
        finish(sweep, slurm, sweep.start(), trials=5)


def test_early_stopping_ends_jobs_soon(slurm, tmp_path):
    asha = ("rule: none", "rule: asha")
    sweep = make_sweep(tmp_path, asha=asha, longer=("epochs: 3", "epochs: 30"))
    process = sweep.start()
    stopped: dict[str, float] = {}
    slowest = 0.0
    while process.poll() is None:
        jobs = slurm.say("squeue", "--noheader", "--array", "--states=PENDING,RUNNING", "--format=%i").split()
        for trial in sweep.trials():
            if trial.stop_reason():
                start = stopped.setdefault(trial.name, time.monotonic())
                if trial.job()["id"] in jobs:
                    slowest = max(slowest, time.monotonic() - start)
        time.sleep(0.3)
    assert process.returncode == 0, process.communicate()[0]
    sweep.check_complete(trials=5)
    assert stopped
    assert slowest <= 10
    assert no_jobs(slurm)


def test_dry_run_shows_the_exact_sbatch_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    container = "container: apptainer exec --nv lab.sif\nsbatch: {reservation: lab}\n"
    make_sweep(tmp_path, PROFILE + container)
    result = CliRunner().invoke(launch.app, ["sweep.yaml", "--dry-run"])
    assert result.exit_code == 0, result.output
    for line in (
        "#SBATCH --gres=gpu:rtx8000:1",
        "#SBATCH --mem=1536M",
        "#SBATCH --reservation=lab",
        "#SBATCH --time=30",
        "#SBATCH --requeue",
        "apptainer exec --nv lab.sif",
    ):
        assert line in result.output
    assert not (tmp_path / "runs" / "small").exists()
