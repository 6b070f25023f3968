"""What a cluster costs a sweep, measured on a real SLURM of four nodes here. Needs what `make slurm-up` needs.

    python tests/benchmarks/bench_slurm.py [start] [handover]      both by default; about 15 minutes on 2 cores

start: from submitting a trial to its first training step, beside SLURM's own start of an empty job, in turns.
handover: trials per minute with `trials_per_job: 8` and with 1, in turns, 32 trials of a few seconds each.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what it shares with the tests
sys.path.insert(0, str(Path(__file__).parents[2]))  # before tests/, whose folders have the packages' names

from conftest import digits_values
from support.slurm_sim import PROFILE, Simulation

from cluster.base import make_cluster
from cluster.job_manager import JobManager
from cluster.profile import Profile
from cluster.trial_folder import TrialFolder
from lorvp.config import TrialConfig

LAUNCH = Path(__file__).parents[2] / "sweeps" / "launch.py"
NODES = ("rtx8000",) * 4


def row(what: str, measured: str, goal: str) -> None:
    print(f"| {what} | {measured} | {goal} |", flush=True)


def start(slurm: Simulation, folder: Path, repeats: int = 7) -> None:
    profile = Profile(kind="slurm", gres="gpu:rtx8000:1", allow_cpu=True, cpus_per_gpu=1, memory_gb_per_gpu=1.5)
    cluster = make_cluster(profile, folder, "benchmark", concurrent=1)
    manager = JobManager(folder / "trials", cluster)
    empty, trials = [], []
    for i in range(repeats):
        stamp = folder / f"empty{i}"
        begun = time.time()
        slurm.say("sbatch", "--gres=gpu:rtx8000:1", "--output=/dev/null", f"--wrap=date +%s.%N > {stamp}")
        slurm.wait(lambda: stamp.exists() and stamp.read_text().strip() != "")  # noqa: B023
        empty.append(float(stamp.read_text()) - begun)
        config = TrialConfig.model_validate(digits_values(epochs=1, init_seed=i, head={"kind": "lp"}))
        trial = TrialFolder(manager.scan.request(config).path)  # which reads what is there, and not what was seen last
        begun = time.time()
        manager.scan.poll_all()
        manager.poll()
        slurm.wait(lambda: trial.ended() is not None, seconds=60)  # noqa: B023
        (result,) = trial.results()
        trials.append(result["time"] - result["seconds"] - begun)
        manager.scan.poll_all()
        manager.poll()
    own = statistics.median(trials) - statistics.median(empty)
    row("submit to an empty job's start, median of 7", f"{statistics.median(empty):.2f} s", "")
    row("submit to a trial's first training step, median of 7", f"{statistics.median(trials):.2f} s", "")
    row("the trial's beyond the empty job's", f"{own:.2f} s", "at most 8 s")


def spec(name: str, folder: Path, profile: str, trials: int, concurrent: int, epochs: int, size: int) -> Path:
    values = digits_values(epochs=epochs)
    values["prompt"] = {"optimizer": "adam"}
    values["dataset"]["max_per_class"] = size
    sweep = {
        "name": name,
        "trial": values,
        "space": {"prompt.lr": {"log_uniform": [0.005, 0.2]}},
        "search": {"algorithm": "random", "trials": trials, "concurrent": concurrent},
        "cluster": str(folder / f"{name}.profile.yaml"),
        "output": str(folder / "runs"),
    }
    (folder / f"{name}.profile.yaml").write_text(profile)
    (folder / f"{name}.yaml").write_text(json.dumps(sweep))
    return folder / f"{name}.yaml"


def handover(slurm: Simulation, folder: Path, trials: int = 32, rounds: int = 2) -> None:
    rates: dict[int, list[float]] = {1: [], 8: []}
    for i in range(rounds):
        for per_job, rate in rates.items():
            profile = PROFILE + f"trials_per_job: {per_job}\n"
            name = f"by{per_job}-{i}"
            file = spec(name, folder, profile, trials, concurrent=4, epochs=8, size=40)
            subprocess.run([sys.executable, str(LAUNCH), str(file)], check=True, stdout=subprocess.DEVNULL)
            done = TrialFolder.requested(folder / "runs" / name / "trials")
            assert len(done) == trials
            begun = min(trial.job()["time"] for trial in done)
            ended = max(trial.newest().last_sign() for trial in done)
            training = statistics.median(sum(r["seconds"] for r in trial.results()) for trial in done)
            rate.append(60 * trials / (ended - begun))
            print(f"{name}: {rate[-1]:.1f} trials a minute; a trial trains {training:.1f} s", file=sys.stderr)
    ratio = statistics.median(b / a for a, b in zip(rates[1], rates[8], strict=True))
    for per_job, rate in rates.items():
        row(f"trials a minute, `trials_per_job: {per_job}`", f"{statistics.median(rate):.1f}", "")
    row("ratio", f"{ratio:.2f}", "at least 2.5")


def main() -> None:
    parts = {"start": start, "handover": handover}
    folder = Path(tempfile.mkdtemp(prefix="lorvp-bench-"))
    folder.chmod(0o755)
    slurm = Simulation(folder / "slurm", types=NODES)
    os.environ["SLURM_CONF"] = slurm.environment["SLURM_CONF"]
    slurm.up()
    try:
        row("", "measured", "goal")
        row("---", "---", "---")
        for name in sys.argv[1:] or parts:
            parts[name](slurm, folder)
    finally:
        slurm.down()


if __name__ == "__main__":
    main()
