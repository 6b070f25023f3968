"""What a cluster costs a sweep, measured on a real SLURM of four nodes here. Needs what `make slurm-up` needs.

    python tests/bench_slurm.py [start] [driver] [handover]      all three by default; about 25 minutes on 2 cores

start: from submitting a trial to its first training step, beside SLURM's own start of an empty job, in turns.
driver: CPU time and memory of a sweep's driver, with Ray's processes, over 200 trials of one epoch.
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

import psutil
from conftest import digits_values
from slurm_sim import PROFILE, Simulation

from cluster.folder import TrialFolder
from cluster.profile import Profile
from cluster.relay import Relay, make_cluster
from lorvp.config import TrialConfig

LAUNCH = Path(__file__).parent.parent / "sweeps" / "launch.py"
NODES = ("rtx8000",) * 4
MIB = 2**20
FOLLOWERS = ("ray::TuneTrial", "ray::ResourceTrainable")
"""What Ray calls the process of an actor that follows a trial: idle, and in a step."""


def row(what: str, measured: str, goal: str) -> None:
    print(f"| {what} | {measured} | {goal} |", flush=True)


def start(slurm: Simulation, folder: Path, repeats: int = 7) -> None:
    profile = Profile(kind="slurm", gres="gpu:rtx8000:1", cpus_per_gpu=1, memory_gb_per_gpu=1.5)
    cluster = make_cluster(profile, folder, "benchmark", concurrent=1)
    relay = Relay(folder / "trials", cluster)
    empty, trials = [], []
    for i in range(repeats):
        stamp = folder / f"empty{i}"
        begun = time.time()
        slurm.say("sbatch", "--gres=gpu:rtx8000:1", "--output=/dev/null", f"--wrap=date +%s.%N > {stamp}")
        slurm.wait(lambda: stamp.exists() and stamp.read_text().strip() != "")  # noqa: B023
        empty.append(float(stamp.read_text()) - begun)
        config = TrialConfig.model_validate(digits_values(epochs=1, init_seed=i, label_mapping="lp"))
        trial = TrialFolder.request(folder / "trials", config)
        begun = time.time()
        relay.poll()
        slurm.wait(lambda: trial.ended() is not None, seconds=60)  # noqa: B023
        (result,) = trial.results()
        trials.append(result["time"] - result["seconds"] - begun)
        relay.poll()
    own = statistics.median(trials) - statistics.median(empty)
    row("submit to an empty job's start, median of 7", f"{statistics.median(empty):.2f} s", "")
    row("submit to a trial's first training step, median of 7", f"{statistics.median(trials):.2f} s", "")
    row("the trial's beyond the empty job's", f"{own:.2f} s", "at most 8 s")


def spec(name: str, folder: Path, profile: str, trials: int, concurrent: int, epochs: int, size: int) -> Path:
    values = digits_values(epochs=epochs)
    del values["prompt"], values["optimizer"]["prompt_lr"]
    values["dataset"]["max_per_class"] = size
    sweep = {
        "name": name,
        "trial": values,
        "space": {"optimizer.prompt_lr": {"log_uniform": [0.005, 0.2]}},
        "search": {"algorithm": "random", "trials": trials, "concurrent": concurrent},
        "cluster": str(folder / f"{name}.profile.yaml"),
        "output": str(folder / "runs"),
    }
    (folder / f"{name}.profile.yaml").write_text(profile)
    (folder / f"{name}.yaml").write_text(json.dumps(sweep))
    return folder / f"{name}.yaml"


def tree(driver: psutil.Process) -> tuple[dict[int, float], float, float, int]:
    """The driver's and Ray's processes: CPU seconds of each, memory of all and of those that follow a trial, in MiB."""
    cpu: dict[int, float] = {}
    memory = following = 0.0
    followers = 0
    for process in [driver, *driver.children(recursive=True)]:
        try:
            with process.oneshot():
                times = process.cpu_times()
                cpu[process.pid] = times.user + times.system
                own = process.memory_full_info().pss / MIB
                memory += own
                if any(name in " ".join(process.cmdline()) for name in FOLLOWERS):
                    following += own
                    followers += 1
        except psutil.Error:
            continue
    return cpu, memory, following, followers


def driver(slurm: Simulation, folder: Path, trials: int = 200, concurrent: int = 8) -> None:
    profile = PROFILE.replace("flight: 2", f"flight: {concurrent}")
    file = spec("driver", folder, profile, trials, concurrent, epochs=1, size=4)
    with open(folder / "driver.log", "w") as log:
        process = psutil.Popen([sys.executable, str(LAUNCH), str(file)], stdout=log, stderr=log)
    seen: dict[int, float] = {}
    samples: list[tuple[int, float, float, float]] = []  # trials ended, CPU seconds, memory, memory of a follower
    folders = folder / "runs" / "driver" / "trials"
    while process.poll() is None:
        cpu, memory, following, followers = tree(process)
        seen |= cpu  # those that are gone keep their last figure
        ended = len(list(folders.glob("*/attempts/*/end.json")))
        if followers == concurrent:
            samples.append((ended, sum(seen.values()), memory, following / followers))
        time.sleep(1)
    assert process.returncode == 0, (folder / "driver.log").read_text()[-2000:]

    def at(ended: int) -> tuple[int, float, float, float]:
        return min(samples, key=lambda sample: abs(sample[0] - ended))

    quarter = trials // 4
    first = (at(quarter)[1] - samples[0][1]) / (at(quarter)[0] - samples[0][0])
    last = (samples[-1][1] - at(trials - quarter)[1]) / (samples[-1][0] - at(trials - quarter)[0])
    row(
        f"CPU of driver and Ray, a trial of {trials}, all included",
        f"{sum(seen.values()) / trials:.2f} s",
        "at most 1 s",
    )
    row(f"its growth: the first {quarter} trials, the last {quarter}", f"{first:.2f} s, {last:.2f} s", "none")
    followers = statistics.median(sample[3] for sample in samples)
    row("memory (PSS) of what follows a running trial", f"{followers:.0f} MiB", "at most 120 MiB")
    growth = f"{at(quarter)[2]:.0f} MiB, {samples[-1][2]:.0f} MiB"
    row(f"memory of driver and Ray, {concurrent} trials running: after {quarter}, at the end", growth, "no growth")


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
    parts = {"start": start, "driver": driver, "handover": handover}
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
