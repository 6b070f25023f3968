"""Whole sweeps on real SLURM daemons: what a sweep does there when nothing goes wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest
from support.slurm import CONTROL, attempts, finish, installed, make_sweep, no_jobs, noted, started  # noqa: F401  a fixture
from support.slurm_sim import PROFILE, TYPES
from support.sweep import SPEC, Sweep
from support.waiting import wait_for
from typer.testing import CliRunner

from cluster.trial_folder import State, StopReason, TrialFolder
from sweeps import launch
from sweeps.spec import file as spec_file

pytest_plugins = ["support.slurm"]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]
PROBE = "echo on $SLURMD_NODENAME with GPU $CUDA_VISIBLE_DEVICES"


@pytest.mark.usefixtures("installed")
def test_the_simulation_leaves_nothing():
    with started(accounting=True) as slurm:
        job = slurm.say("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 600").strip()
        running = lambda: "RUNNING" in slurm.say("squeue", "--noheader", f"--jobs={job}", "--format=%T")  # noqa: E731
        wait_for("start of the job", running)
        assert "RUNNING" in slurm.say("sacct", "--noheader", f"--jobs={job}", "--format=State")
    folder = str(slurm.folder)

    def left() -> list[list[str]]:
        found = [p.info for p in psutil.process_iter(["cmdline", "environ"]) if folder in str(p.info)]
        return [info["cmdline"] for info in found if info["cmdline"] and "pytest" not in " ".join(info["cmdline"])]

    wait_for("end of the daemons and the job", lambda: not left())
    assert not slurm.folder.exists()


@pytest.mark.alone
@pytest.mark.usefixtures("installed")
def test_the_simulation_starts_soon():
    begun = time.monotonic()
    with started(accounting=True):
        assert time.monotonic() - begun < 10


@pytest.mark.usefixtures("installed")
def test_two_simulations_side_by_side():
    """Each has ports of its own."""
    with started() as one, started() as other:
        assert abs(one.ports.first - other.ports.first) >= one.ports.SIZE
        for slurm in (one, other):
            assert slurm.say("sinfo", "--noheader", "--Node", "--format=%T", "--partition=gpu").split() == ["idle"] * 3


OF_THE_SHELL = {
    **{"LOGNAME": "somebody", "SQUEUE_PARTITION": "scavenge", "SQUEUE_FORMAT": "%i", "SQUEUE_STATES": "FAILED"},
    **{"SBATCH_JOB_NAME": "mine", "SBATCH_EXPORT": "NONE", "SLURM_EXPORT_ENV": "NONE", "SBATCH_PARTITION": "none"},
    **{"SLURM_JOB_ID": "1", "SLURM_MEM_PER_CPU": "500", "SLURM_NTASKS": "7", "SLURM_CPUS_PER_TASK": "3"},
    **{"SBATCH_NO_REQUEUE": "1", "SCANCEL_STATE": "PENDING"},
}
"""What a user's settings and an allocation that the driver runs in (`salloc --mem-per-cpu`) tell SLURM's commands."""


def test_grid_on_three_nodes(slurm, tmp_path):
    """4 cells and the control; the type of GPU asked for is the one got, whatever the shell says to SLURM."""
    sweep = make_sweep(
        slurm,
        tmp_path,
        PROFILE.replace("flight: 2", "flight: 4")
        + 'setup: ["echo on $SLURMD_NODENAME with GPU $CUDA_VISIBLE_DEVICES"]\n',
        grid=("algorithm: tpe, trials: 4,", "algorithm: grid,"),
        axes=("{log_uniform: [0.005, 0.2]}", "{choice: [0.05]}"),
        mappings=("[rlm, flm, ilm, lp]", "[flm, lp]"),
        short=("epochs: 3", "epochs: 1"),
    )
    sweep.environment |= OF_THE_SHELL
    output = finish(sweep, slurm, sweep.start(), trials=5)
    sweep.check_model(output)
    assert attempts(sweep) == ["0001"] * 5
    assert "small: 5 trials" in output
    for trial in sweep.trials():
        first = Path(trial.job()["log"]).read_text()
        node, gpu = first.split("on ", 1)[1].split()[0], first.split("GPU ", 1)[1].split()[0]
        assert TYPES[slurm.nodes.index(node)] == "rtx8000"
        assert gpu in "01"


@pytest.mark.usefixtures("installed")
def test_array_limit_below_the_number_of_trials(tmp_path):
    with started(MaxArraySize="3") as slurm:
        concurrent, short = ("concurrent: 2", "concurrent: 5"), ("epochs: 3", "epochs: 1")
        sweep = make_sweep(
            slurm, tmp_path, PROFILE.replace("flight: 2", "flight: 8"), concurrent=concurrent, short=short
        )
        finish(sweep, slurm, sweep.start(), trials=5)


def test_several_trials_by_one_job(slurm, tmp_path):
    """A job that is requeued while it trains its second goes on with that, and no other job takes it."""
    sweep = make_sweep(
        slurm,
        tmp_path,
        PROFILE.replace("flight: 2", "flight: 1") + "trials_per_job: 3\n",
        few=("trials: 4, seed: 1, concurrent: 2", "trials: 5, seed: 1, concurrent: 1"),
        alone=(CONTROL, "control: null\n"),
        short=("epochs: 3", "epochs: 2"),
    )
    sweep.holds.set("cluster.job.NEXT_TRIAL_SECONDS", 300.0)  # however long the search takes here
    between = sweep.holds.hold("handing over")
    driver = sweep.start()
    between.reached(driver)
    wait_for("second trial of the job", lambda: [job for job in sweep.jobs().values() if job and job["place"] == 2])
    (second,) = [trial for trial in sweep.trials() if trial.job() and trial.job()["place"] == 2]
    step = sweep.holds.hold("step", trial=second.name, attempt="0001", epoch=2)
    between.release()
    step.reached(driver)
    before = sweep.results()
    assert len(before[second.name]) == 1
    slurm.say("scontrol", "requeue", second.job_id)
    finish(sweep, slurm, driver, trials=5)
    sweep.check_kept(before)
    assert sorted((trial.job_id, trial.job()["place"]) for trial in sweep.trials()) == [
        ("1", 1), ("1", 2), ("1", 3), ("2", 1), ("2", 2)
    ]  # fmt: skip
    assert [trial.name for trial in sweep.trials() if trial.newest().path.name == "0002"] == [second.name]


def test_early_stopping_ends_jobs_soon(slurm, tmp_path):
    """A trial that is given up ends in the step that it is in, and its job with it."""
    sweep = make_sweep(
        slurm,
        tmp_path,
        asha=("rule: none", "rule: asha"),
        grid=("algorithm: tpe, trials: 4, seed: 1, concurrent: 2", "algorithm: grid, seed: 1, concurrent: 1"),
        axes=("{log_uniform: [0.005, 0.2]}", "{choice: [0.005, 100.0]}"),  # the second spoils every image
        ranks=("[1, 4]", "[4]"),
        mappings=("[rlm, flm, ilm, lp]", "[lp]"),
        head=("  batch_size: 32\n", "  batch_size: 32\n  head: {init: fitted}\n"),  # good from its first epoch on
        alone=(CONTROL, "control: null\n"),
    )
    spec = spec_file.load(sweep.folder / "sweep.yaml", [f"output={sweep.folder / 'runs'}"])
    good, bad = (TrialFolder(spec.trials / spec.trial_config(cell).content_hash()) for cell in spec.cells())
    step = sweep.holds.hold("step", trial=bad.name, epoch=2, step=2)
    driver = sweep.start()
    step.reached(driver)
    wait_for("word to stop", bad.stop_reason, driver)
    assert bad.stop_reason() == StopReason.SEARCH
    assert bad.ended() is None
    step.release()
    driver.end()
    sweep.check_complete(trials=2)
    assert (good.ended().state, bad.ended().state) == (State.FINISHED, State.STOPPED)
    assert len(bad.results()) == 1
    no_jobs(slurm)


def test_detached_driver(slurm, tmp_path):
    """The driver is a job, requeues itself when its time ends, and is cancelled with its jobs."""
    sweep = make_sweep(slurm, tmp_path, two=("trials: 4", "trials: 2"), alone=(CONTROL, "control: null\n"))
    step = sweep.holds.hold("step", epoch=2, step=3)
    assert "the driver is job 1" in sweep.run("--detach")
    step.reached(count=2)
    noted(sweep)
    before, jobs = sweep.results(), sweep.jobs()
    assert "driver: job 1, running node" in sweep.run("--status")
    slurm.say("scancel", "--batch", "--signal=USR2", "1")
    log = sweep.path / "driver-1.log"
    wait_for("second start of the driver", lambda: log.read_text().count("sweep small in") == 2)
    assert "ending: the jobs go on" in log.read_text()
    assert jobs == sweep.jobs()
    cancelling = sweep.start("--cancel")
    sweep.all_asked_to_stop(cancelling)
    step.release()
    cancelling.end()
    no_jobs(slurm)
    sweep.check_kept(before)
    assert "no driver runs" in sweep.run("--status")
    assert not any(trial.ended() for trial in sweep.trials())
    sweep.run("--detach", "--resume")
    log = sweep.path / json.loads((sweep.path / "driver.json").read_text())["log"]
    wait_for("end of the sweep", lambda: log.exists() and "as a model" in log.read_text())
    no_jobs(slurm)
    sweep.check_complete(trials=2)
    sweep.check_kept(before)


def test_dry_run_shows_the_exact_sbatch_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profile.yaml").write_text(
        PROFILE + "container: apptainer exec --nv lab.sif\nsbatch: {reservation: lab}\n"
    )
    Sweep(tmp_path, SPEC + f"cluster: {tmp_path / 'profile.yaml'}\n")
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
