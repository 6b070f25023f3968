"""A sweep as a user starts it: a spec in a folder of its own, real drivers and jobs, SQLite and MLflow."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import mlflow
import pandas as pd
import psutil
import pytest

import lorvp
from cluster.trial_folder import State, TrialFolder
from lorvp.predict import predict
from support import warm
from support.holds import Holds
from support.waiting import wait_for

LAUNCH = Path(__file__).parent.parent.parent / "sweeps" / "launch.py"

SPEC = """\
name: small
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: digits, max_per_class: 20, val_fraction: 0.2}
  prompt: {optimizer: adam}
  optimizer: {lr: 0.5}
  epochs: 3
  batch_size: 32
  precision: fp32
space:
  head.kind: {choice: [rlm, flm, ilm, lp]}
  prompt.rank: {choice: [1, 4]}
  prompt.lr: {log_uniform: [0.005, 0.2]}
search: {algorithm: tpe, trials: 4, seed: 1, concurrent: 2}
early_stopping: {rule: asha, grace_epochs: 1, reduction_factor: 2}
control: {}
"""


SHARING = "kind: local\ntrials_per_job: 99\n"
"""A profile whose jobs take trial after trial: where jobs are not what a test is about, their starts only take time."""


@cache
def empty_store() -> Path:
    """MLflow's tables, which take 3 s to make; a sweep finds them as those of an earlier one."""
    path = Path(tempfile.mkdtemp(prefix="lorvp-store-")) / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    atexit.register(shutil.rmtree, path.parent)
    return path


class Driver:
    """One call of `sweeps/launch.py`. Its output goes to a file, so that it can be read at any time."""

    def __init__(
        self, folder: Path, environment: dict[str, str], *arguments: str, cold: bool = False, cold_jobs: bool = False
    ) -> None:
        self.log = Path(tempfile.mkstemp(prefix="driver-", suffix=".log", dir=folder)[1])
        self.process: subprocess.Popen | warm.Process
        command = [str(LAUNCH), "sweep.yaml", *arguments]
        with open(self.log, "w") as log:
            environment = environment | ({} if cold_jobs else warm.for_jobs(environment))
            if cold:
                self.process = subprocess.Popen(
                    [sys.executable, *command], cwd=folder, env=environment, stdout=log, stderr=log
                )
            else:
                self.process = warm.start(command, folder, environment, log, log)

    @property
    def pid(self) -> int:
        return self.process.pid

    def ended(self) -> bool:
        return self.process.poll() is not None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def says(self, pattern: str) -> str:
        """Waits for it to say something that the regular expression matches; gives that."""
        found = wait_for(f"{pattern!r} of the driver", lambda: re.search(pattern, self.output()), self)
        return found[0]

    def is_on(self) -> None:
        """Waits until it looks after its sweep."""
        self.says("sweep small in")

    def signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def kill(self) -> None:
        """Ends it as a power cut would."""
        self.process.kill()
        self.process.wait()

    def end(self, code: int = 0) -> str:
        """Waits for its end; what it said."""
        wait_for("end of the driver", self.ended, self)
        assert self.process.returncode == code, self.output()
        return self.output()


class Sweep:
    """A spec in a folder of its own, what launching it leaves there, and the holds on its processes."""

    def __init__(
        self,
        folder: Path,
        text: str = SPEC,
        environment: dict[str, str] | None = None,
        profile: str = "",
        cold: bool = False,
    ) -> None:
        self.folder = folder
        self.cold = cold
        """Whether its drivers and jobs have to import their libraries, as a user's have to."""
        self.cold_jobs = cold
        """Whether jobs have to; they alone can be stopped by SIGSTOP, too."""
        self._drivers: list[Driver] = []
        if profile:
            (folder / "profile.yaml").write_text(profile)
            text += "cluster: profile.yaml\n"
        (folder / "runs").mkdir()
        shutil.copyfile(empty_store(), folder / "runs" / "mlflow.db")
        (folder / "sweep.yaml").write_text(text)
        self.holds = Holds(folder / "of_the_test")
        usual = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        self.environment = usual | self.holds.environment() | (environment or {})

    def start(self, *arguments: str) -> Driver:
        how = {"cold": self.cold, "cold_jobs": self.cold_jobs}
        self._drivers.append(Driver(self.folder, self.environment, *arguments, **how))
        return self._drivers[-1]

    def run(self, *arguments: str, code: int = 0) -> str:
        return self.start(*arguments).end(code)

    @property
    def path(self) -> Path:
        return self.folder / "runs" / "small"

    def trials(self) -> list[TrialFolder]:
        return TrialFolder.requested(self.path / "trials")

    def results(self) -> dict[str, list]:
        """The epochs recorded so far, of each trial."""
        return {trial.name: trial.results() for trial in self.trials()}

    def jobs(self) -> dict[str, dict | None]:
        return {trial.name: trial.job() for trial in self.trials()}

    def check_kept(self, before: dict[str, list]) -> None:
        """With their times: no epoch that was recorded was trained again."""
        for name, results in before.items():
            assert TrialFolder(self.path / "trials" / name).results()[: len(results)] == results

    def all_asked_to_stop(self, driver: Driver | None = None) -> None:
        """Waits until each trial that has not ended has been told to: held jobs see it once they are released."""
        asked = lambda: all(trial.ended() or trial.stop_reason() for trial in self.trials())  # noqa: E731
        wait_for("word to stop for every trial", asked, driver)

    def interrupt(self, driver: Driver, signum: signal.Signals) -> str:
        """Ends a driver whose jobs are held, and with it these; what it said."""
        driver.signal(signum)
        self.all_asked_to_stop(driver)
        self.holds.release_all()
        return driver.end(code=130)

    def processes(self) -> set[int]:
        """The drivers and jobs of this sweep that live here."""
        named = [p for p in psutil.process_iter(["cmdline"]) if str(self.folder) in " ".join(p.info["cmdline"] or [])]
        drivers = {driver.pid for driver in self._drivers if not driver.ended()}
        return drivers | {process.pid for process in named if _lives(process)}

    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.tracking_uri)

    @property
    def tracking_uri(self) -> str:
        return self.environment.get("MLFLOW_TRACKING_URI", f"sqlite:///{self.folder / 'runs' / 'mlflow.db'}")

    def runs(self) -> list:
        client = self.client()
        return client.search_runs([client.get_experiment_by_name("lorvp").experiment_id], max_results=1000)

    def check_complete(self, trials: int) -> None:
        """Every trial ended, its epochs once in its folder and once in MLflow, one run a trial, nothing left over."""
        folders = self.trials()
        assert len(folders) == trials
        runs = self.runs()
        parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        assert len(parents) == 1
        assert Counter(run.data.tags["lorvp.trial"] for run in runs if run not in parents) == Counter(
            trial.name for trial in folders
        )
        by_name = {run.data.tags.get("lorvp.trial"): run for run in runs}
        for trial in folders:
            run = by_name[trial.name]
            epochs = [result["epoch"] for result in trial.results()]
            assert epochs == list(range(1, len(epochs) + 1))
            history = self.client().get_metric_history(run.info.run_id, "val_top1")
            assert sorted((m.step, m.value) for m in history) == [(r["epoch"], r["val_top1"]) for r in trial.results()]
            assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
            end = trial.ended()
            assert (end.state == State.FINISHED) == (len(epochs) == trial.config.epochs)
            assert run.data.tags["state"] == {"finished": "finished", "stopped": "stopped early"}[end.state]
            assert run.info.status == "FINISHED"
            last = trial.results()[-1]
            assert (run.data.tags["device"], run.data.tags["precision"]) == (last["device"], last["precision"])
            assert last["device"]
            artifacts = {a.path for a in self.client().list_artifacts(run.info.run_id, "bundle")}
            names = {"README.md", "config.json", "example.png", "model.safetensors"}
            names |= {"prompt.png", "example_prompted.png"} if trial.config.method == "lorvp" else set()
            assert artifacts == {f"bundle/{name}" for name in names}
        assert not (self.path / "ray").exists()
        wait_for("end of the sweep's processes", lambda: not self.processes())

    def check_model(self, output: str) -> None:
        """The registered model says of an image what the bundle says, by the lines that the sweep ended with."""
        bundle = Path(re.search(r"best prompt: (\S+)", output)[1])
        uri = re.search(r"as a model:  (\S+)", output)[1]
        mlflow.set_tracking_uri(self.tracking_uri)
        found = mlflow.pyfunc.load_model(uri).predict(pd.DataFrame({"image": [(bundle / "example.png").read_bytes()]}))
        (expected,) = predict(lorvp.load(bundle), [bundle / "example.png"], top=1)
        assert [(found["class"][0], pytest.approx(found["probability"][0], abs=1e-4))] == expected.classes


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A disk of its own for a folder, with little room."""
    if os.geteuid():
        pytest.skip("a disk of its own needs root")
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
