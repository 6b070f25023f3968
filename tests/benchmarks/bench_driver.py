"""What a sweep's driver costs the machine that it runs on and the disk that the trials' folders are on.

    python tests/benchmarks/bench_driver.py [start] [cpu] [memory] [disk] [growth]      all by default; about 20 minutes

The driver is the real one, with MLflow's SQLite. Its jobs are stand-ins: one process beside it writes into the trials'
folders what jobs would write there, at the times at which jobs would. Memory is the driver's resident set. Metadata
operations are counted by strace: the calls of the driver that name a path in the sweep's folder (stat, open, link,
rename, mkdir, unlink and the like; a folder that is listed is opened).
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from cluster.trial_folder import JobState, State, TrialFolder

MIB = 2**20


class StandIns:
    """A cluster whose jobs are lines in a file, which `write` carries out."""

    max_submissions = 3
    trials_per_job = 1
    pack = 1

    def __init__(self, folder: Path, concurrent: int) -> None:
        self.folder = folder
        self.jobs_in_flight = concurrent
        self._ids = itertools.count(1)

    def submit(self, trials: Sequence[TrialFolder], exclude: str) -> None:
        for trial in trials:
            trial.record_job(str(next(self._ids)), self.folder / "log")
        with open(self.folder / "jobs", "a") as file:
            file.writelines(f"{trial.path}\n" for trial in trials)

    def adopt(self, trials: Sequence[TrialFolder]) -> None: ...

    def states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        return {job_id: JobState("RUNNING") for job_id in job_ids}

    def cancel(self, job_ids: Sequence[str]) -> None: ...


def drive(arguments: list[str]) -> None:
    """Be the driver, with the CPU time of its first submission written down; by stand-ins where they are asked for."""
    from sweeps import launch

    folder, kind, *rest = arguments
    make = launch.make_cluster

    def cluster(profile, sweep, sweep_id, concurrent, pack=1):
        made = make(profile, sweep, sweep_id, concurrent, pack)
        if kind == "stand-ins":
            made = StandIns(Path(folder), concurrent)
        submit = made.submit

        def first(trials, exclude):
            submit(trials, exclude)
            made.submit = submit
            children = resource.getrusage(resource.RUSAGE_CHILDREN)
            (Path(folder) / "first").write_text(str(time.process_time() + children.ru_utime + children.ru_stime))

        made.submit = first
        return made

    launch.make_cluster = cluster
    sys.argv = ["launch.py", *rest]
    launch.app()


def write(folder: Path, epochs: int, seconds: float) -> None:
    """Train the trials that are submitted: an epoch every `seconds`, with noise, or all at once where that is 0."""
    result = {
        "train_loss": 1.0,
        "val_loss": 1.0,
        "val_top5": 99.0,
        "lr": {"prompt": 0.1},
        "parameters": {"prompt": 5376},
    }
    result |= {"images_per_second": 1.0, "peak_memory_mib": 1.0, "optimizer_state_mib": 0.0, "order": 1, "packed": 1}
    result |= {"whole": True, "test_loss": None, "test_top1": None, "test_top5": None, "seconds": max(seconds, 0.01)}
    due: list[tuple[float, str, int]] = []
    attempts = {}
    (folder / "jobs").touch()
    with open(folder / "jobs") as jobs:
        while True:
            for line in jobs:
                path = line.strip()
                attempts[path] = TrialFolder(Path(path)).claim()
                # spread over the epoch, as trials are that started at different times
                first = seconds * (0.1 + 0.9 * (hash(path) % 1000) / 1000)
                heapq.heappush(due, (time.monotonic() + first, path, 1))
            while due and due[0][0] <= time.monotonic():
                _, path, epoch = heapq.heappop(due)
                score = {"epoch": epoch, "val_top1": (hash((path, epoch)) % 9000) / 100, "time": time.time()}
                attempts[path].append(result | score)
                if epoch == epochs:
                    attempts.pop(path).end(State.FINISHED)
                else:
                    noise = 1 + 0.04 * (hash((path, epoch)) % 100 / 100 - 0.5)
                    heapq.heappush(due, (time.monotonic() + seconds * noise, path, epoch + 1))
            time.sleep(0.02)


class Run:
    """A driver over stand-ins in a folder of its own."""

    def __init__(self, trials: int, concurrent: int, epochs: int, seconds: float, kind: str = "stand-ins") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lorvp-driver-"))
        spec = {
            "name": "driver",
            "trial": {"backbone": {"name": "lorvp_tiny_32.cifar10"}, "dataset": {"name": "digits"}, "epochs": epochs},
            "space": {"prompt.lr": {"log_uniform": [0.005, 0.2]}},
            "search": {"algorithm": "random", "trials": trials, "concurrent": concurrent},
            "control": None,
            "output": str(self.folder / "runs"),
        }
        (self.folder / "spec.yaml").write_text(json.dumps(spec))
        self.kind, self.arguments = kind, (str(epochs), str(seconds))

    def __enter__(self) -> Run:
        here = [sys.executable, __file__]
        environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        self.log = open(self.folder / "log", "w")
        self.writer = None
        if self.kind == "stand-ins":
            self.writer = subprocess.Popen([*here, "write", str(self.folder), *self.arguments])
        command = [*here, "drive", str(self.folder), self.kind, str(self.folder / "spec.yaml")]
        self.driver = psutil.Popen(command, stdout=self.log, stderr=self.log, env=environment)
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.driver, self.writer):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        self.log.close()

    @property
    def sweep(self) -> Path:
        return self.folder / "runs" / "driver"

    def running(self) -> int:
        """Trials that were submitted."""
        jobs = self.folder / "jobs"
        return len(jobs.read_text().splitlines()) if jobs.exists() else 0

    def ended(self) -> int:
        return len(list(self.sweep.glob("trials/*/attempts/*/end.json")))

    def until(self, condition) -> None:
        while not condition():
            assert self.driver.poll() is None, (self.folder / "log").read_text()[-3000:]
            time.sleep(0.2)

    def cpu(self) -> float:
        times = self.driver.cpu_times()
        return times.user + times.system + times.children_user + times.children_system

    def resident(self) -> float:
        return self.driver.memory_info().rss / MIB


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def start(repeats: int = 5) -> None:
    seconds = []
    for _ in range(repeats):
        with Run(1, 1, epochs=1, seconds=60, kind="local") as run:
            run.until((run.folder / "first").exists)
            seconds.append(float((run.folder / "first").read_text()))
            for child in run.driver.children(recursive=True):
                child.kill()
    shown = f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
    row(f"from the command to the first job submitted, CPU, median of {repeats}", shown, "4 s")


def cpu(trials: int = 200, concurrent: int = 8) -> None:
    with Run(trials, concurrent, epochs=1, seconds=0) as run:
        run.until((run.sweep / "results.parquet").exists)
        search = run.cpu()
    begun = float((run.folder / "first").read_text())
    shown = f"{search / trials:.3f} s; without its start {(search - begun) / trials:.3f} s"
    row(f"CPU a trial, {trials} trivial trials, all included", shown, "0.05 s")


def memory(counts: Sequence[int] = (8, 100, 500)) -> None:
    shown = []
    for count in counts:
        with Run(count, count, epochs=5, seconds=20) as run:
            run.until(lambda: run.running() == count)  # noqa: B023
            time.sleep(30)  # epochs are sent to MLflow meanwhile
            shown.append(f"{run.resident():.0f}")
    row(
        f"driver resident, {' / '.join(map(str, counts))} running trials",
        f"{' / '.join(shown)} MiB",
        "300 / 400 / 600 MiB",
    )


def operations(count: int, seconds: float, window: float) -> float:
    """Metadata operations a second, with `count` trials running."""
    epochs = round(3 * window / seconds) + 5
    with Run(count, count, epochs, seconds) as run:
        run.until(lambda: run.running() == count)
        time.sleep(1.2 * seconds)  # each has had an epoch
        trace = run.folder / "trace"
        command = ["strace", "-f", "-qq", "-e", "trace=%file", "-o", str(trace), "-p", str(run.driver.pid)]
        tracer = subprocess.Popen(command)
        time.sleep(window)
        tracer.send_signal(signal.SIGINT)
        tracer.wait()
        return len(re.findall(re.escape(str(run.sweep)), trace.read_text())) / window


def disk() -> None:
    shown = [f"{operations(count, 60, 60):.1f}" for count in (8, 100, 500)]
    row("metadata operations a second, 8 / 100 / 500 running, epochs of 60 s", " / ".join(shown), "10 / 60 / 250")
    row("the same, 8 running, epochs of 2 s", f"{operations(8, 2, 30):.1f}", "60")


def growth(trials: int = 5000, concurrent: int = 50) -> None:
    with Run(trials, concurrent, epochs=1, seconds=0) as run:
        marks = []
        for mark in (trials // 10, trials // 5, trials - trials // 10, trials - 100):
            run.until(lambda: run.ended() >= mark)  # noqa: B023
            marks.append((run.ended(), run.cpu(), run.resident()))
    (a, cpu_a, _), (b, cpu_b, memory_b), (c, cpu_c, _), (d, cpu_d, memory_d) = marks
    early, late = (cpu_b - cpu_a) / (b - a), (cpu_d - cpu_c) / (d - c)
    more = 1024 * (memory_d - memory_b) / (d - b)
    row(f"CPU a trial: trials {a} to {b}, {c} to {d}", f"{early:.3f} s, {late:.3f} s", "no more than 0.01 s apart")
    row(f"memory a trial, from {b} to {d}", f"{more:.2f} KiB", "1 KiB")


PARTS = {"start": start, "cpu": cpu, "memory": memory, "disk": disk, "growth": growth}


def main() -> None:
    match sys.argv[1:]:
        case ["drive", *arguments]:
            drive(arguments)
        case ["write", folder, epochs, seconds]:
            write(Path(folder), int(epochs), float(seconds))
        case names:
            row("", "measured", "goal")
            row("---", "---", "---")
            for name in names or PARTS:
                PARTS[name]()


if __name__ == "__main__":
    main()
