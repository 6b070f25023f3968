"""MLflow: the sweep is a run, its trials are nested in it. The driver is the only writer, and the folders the source.

Runs are found by tags, so that a driver that starts again goes on where the last one was killed: a run is never made
twice, and an epoch that MLflow has is not sent again.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the follower tries again by itself
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # of each run, with the password in it

import mlflow
from mlflow.entities import LifecycleStage, Metric, Param, Run, RunTag
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from sqlalchemy.exc import SQLAlchemyError

from cluster.trial_folder import End, State, TrialFolder
from lorvp.bundle.format import describe
from lorvp.errors import UserError
from lorvp.utils.explain import without_passwords
from lorvp.utils.files import publish
from sweeps.lock import Holder
from sweeps.results.leaderboard import epoch_metrics
from sweeps.results.paired import Gain
from sweeps.spec.model import Spec, shortened
from sweeps.tracking import registry
from sweeps.tracking.retry import first_line
from sweeps.tracking.store import SQLITE, tracking_uri

# A store that fails is told in a line by who tries again; MLflow would write down a traceback each time.
logging.getLogger("mlflow.store").setLevel(logging.CRITICAL)

SWEEP, TRIAL, STATE = "lorvp.sweep", "lorvp.trial", "state"
PACKAGES = ("lorvp", "torch", "timm", "ray", "optuna", "mlflow", "submitit")
STATE_TAGS = {State.FINISHED: "finished", State.STOPPED: "stopped early", State.FAILED: "failed"}
SUMMARY = {"val_top1": "best_val_top1", "epoch": "best_epoch"}
"""What a bundle's figures are called where they stand for a trial: beside those of each epoch."""
NOT_METRICS = ("order", "packed", "whole")
"""Of an epoch, what is no measure of it: results.parquet has these."""
DRAFT_SECONDS = 3600.0
"""After which a driver of another machine is no longer making tables, whatever the clocks say: it takes seconds."""


class Tracker:
    """Writes one sweep to MLflow. Raises UserError when the store can't be reached at the start."""

    def __init__(self, spec: Spec, sweep_id: str, spec_text: str) -> None:
        self.spec = spec
        self.sweep_id = sweep_id
        self._param_names = shortened(spec.named_keys())
        self.uri = tracking_uri(spec)
        spec.output.mkdir(parents=True, exist_ok=True)
        try:
            make_tables(self.uri)
            self.client = mlflow.MlflowClient(self.uri)
            self.experiment = self._experiment()
            runs = self._runs(f"tags.`{SWEEP}` = '{sweep_id}'")
            self._begin_sweep(runs, spec_text)
        except (mlflow.MlflowException, SQLAlchemyError, OSError, ImportError) as error:  # of a database's driver
            place = without_passwords(self.uri)
            raise UserError(f"MLflow at {place} can't be used: {first_line(error)}") from None
        self.runs = {run.data.tags[TRIAL]: run for run in runs if TRIAL in run.data.tags}
        # a run without its parameters is one that was begun when a driver was killed, or a server's answer got lost
        self._begun = {name for name, run in self.runs.items() if not run.data.params}
        self.runs = {name: run for name, run in self.runs.items() if name not in self._begun}
        self._started = dict(self.runs)
        self._closed: set[str] = set()  # what this driver has closed, or found closed
        self._epochs_sent = {name: int(run.data.metrics.get("epoch", 0)) for name, run in self.runs.items()}

    def _begin_sweep(self, runs: list[Run], spec_text: str) -> None:
        """Make the sweep's own run, or go on with the one among `found`."""
        parents = [run for run in runs if TRIAL not in run.data.tags]
        if parents:
            self.parent = parents[0]
            self.client.update_run(self.parent.info.run_id, "RUNNING")
        else:
            tags = {SWEEP: self.sweep_id, "git.commit": git_commit(), "python": platform.python_version()}
            tags |= {f"version.{package}": version(package) for package in PACKAGES}
            tags |= {"stage": "sweep"}
            self.parent = self.client.create_run(self.experiment, tags=tags, run_name=self.spec.name)
        run_id, values = self.parent.info.run_id, self.spec.model_dump(mode="json", by_alias=True)
        try:
            self.client.log_text(run_id, spec_text, "spec.yaml")
            self.client.log_dict(run_id, values, "spec.json")
            self.client.log_text(run_id, "\n".join(installed_packages()), "environment.txt")
        except Exception:
            if not parents:  # the next try makes another
                with suppress(Exception):
                    self.client.delete_run(run_id)
            raise

    def record(self, trial: TrialFolder, results: list[dict[str, Any]], control: bool) -> None:
        """Send what MLflow has not got of the trial's epochs, in one batch."""
        if trial.name in self._closed:
            return
        params = [] if trial.name in self.runs else self._begin(trial, control)
        new = [result for result in results if result["epoch"] > self._epochs_sent.get(trial.name, 0)]
        metrics = [
            Metric(key, value, int(result["time"] * 1000), result["epoch"])
            for result in new
            for key, value in _metrics(result).items()
        ]
        tags = _device_tags(new[-1]) if new and new[0]["epoch"] == 1 else []
        if params or metrics:
            self.client.log_batch(self._started[trial.name].info.run_id, metrics=metrics, params=params, tags=tags)
        self.runs[trial.name] = self._started[trial.name]
        if new:
            self._epochs_sent[trial.name] = new[-1]["epoch"]

    def end(self, trial: TrialFolder, end: End, control: bool) -> None:
        """Close the trial's run: its state, the best epoch's figures and its bundle."""
        if trial.name in self._closed:
            return
        if trial.name not in self.runs:
            self.record(trial, [], control)
        run = self.runs[trial.name]
        if run.info.status == "RUNNING":  # else an earlier driver has closed it
            self._close(run.info.run_id, trial, end)
        self._closed.add(trial.name)
        self._begun.discard(trial.name)
        for state in (self.runs, self._started, self._epochs_sent):
            state.pop(trial.name, None)

    def _close(self, run_id: str, trial: TrialFolder, end: End) -> None:
        tags = [RunTag(STATE, STATE_TAGS[end.state])]
        metrics: list[Metric] = []
        if end.reason:
            tags.append(RunTag("reason", end.reason[:5000]))
        if end.cause:
            tags.append(RunTag("failure", end.cause))
        if results := trial.results():
            tags += _device_tags(results[-1])  # a trial may have gone on elsewhere
        attempt = trial.newest()
        if attempt and attempt.bundle.is_dir():
            metrics_of_bundle = describe(attempt.bundle)["metrics"]
            tags.append(RunTag("selection", metrics_of_bundle["selection"]))
            now = int(time.time() * 1000)
            summary = {
                SUMMARY.get(key, key): metrics_of_bundle[key] for key in ("val_top1", "epoch", "test_top1", "test_top5")
            }
            metrics = [Metric(key, round(value, 4), now, 0) for key, value in summary.items() if value is not None]
            self.client.log_artifacts(run_id, str(attempt.bundle), "bundle")
        self.client.log_batch(run_id, metrics=metrics, tags=tags)
        # last: a run that does not run is complete
        self.client.set_terminated(run_id, "FAILED" if end.state == State.FAILED else "FINISHED")

    def register(self, bundle: Path, trial: str, verdict: list[str]) -> str:
        """Make a registered model of the best prompt, called as the sweep; its URI."""
        return registry.register(self.client, self.uri, self.parent.info.run_id, self.spec.name, bundle, trial, verdict)

    def retry(self, send: Callable[[], None], patience: float = 60.0) -> bool:
        """Whether MLflow took it, within `patience` s: at its end, a sweep does not fail because a server is away."""
        deadline = time.monotonic() + patience
        while True:
            try:
                send()
                return True
            except (mlflow.MlflowException, OSError):
                if time.monotonic() > deadline:
                    return False
                time.sleep(1)

    def close(self, status: str, files: list[Path], verdict: list[str], gain: Gain | None = None) -> None:
        """End the sweep's run with `status` (FINISHED, FAILED, KILLED).

        The sweep's own files, and what lies in its folders, become artifacts, the verdict the description. The gain
        over the control becomes metrics, by which sweeps can be compared, and what it shows a tag.
        """
        run_id = self.parent.info.run_id
        for file in files:
            if file.is_dir():
                self.client.log_artifacts(run_id, str(file), file.name)
            else:
                self.client.log_artifact(run_id, str(file))
        if verdict:
            self.client.set_tag(run_id, MLFLOW_RUN_NOTE, "\n".join(f"- {line}" for line in verdict))
        if gain is not None:
            self._send_gain(run_id, gain)
        self.client.set_terminated(run_id, status)

    def _send_gain(self, run_id: str, gain: Gain) -> None:
        values = {"gain": gain.points, "gain_low": gain.low, "gain_high": gain.high, "gain_images": gain.images}
        now = int(time.time() * 1000)
        metrics = [Metric(key, round(value, 4), now, 0) for key, value in values.items() if value is not None]
        tags = [RunTag("gain.split", gain.split)]
        if words := gain.in_words():
            tags.append(RunTag("gain.verdict", words))
        self.client.log_batch(run_id, metrics=metrics, tags=tags)

    def _experiment(self) -> str:
        name = self.spec.tracking.experiment
        existing = self.client.get_experiment_by_name(name)
        if existing:
            if existing.lifecycle_stage != LifecycleStage.ACTIVE:
                raise UserError(
                    f"tracking.experiment: {name!r} is in MLflow's trash; `mlflow experiments restore --experiment-id "
                    f"{existing.experiment_id}` with MLFLOW_TRACKING_URI={without_passwords(self.uri)} brings it back, "
                    "--set tracking.experiment=NAME takes another"
                )
            return existing.experiment_id
        database = self.uri.split(":")[0].split("+")[0] in DATABASE_ENGINES  # a server knows where it keeps artifacts
        artifacts = (self.spec.output / "mlartifacts").as_uri() if database else None
        kind = {"mlflow.experimentKind": "custom_model_development"}  # the page of training runs, not of chats
        try:
            return self.client.create_experiment(name, artifact_location=artifacts, tags=kind)
        except mlflow.MlflowException:  # another sweep may have been faster
            existing = self.client.get_experiment_by_name(name)
            if existing is None:
                raise
            return existing.experiment_id

    def _runs(self, query: str) -> list[Run]:
        runs: list[Run] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment], query, max_results=1000, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs

    def _begin(self, trial: TrialFolder, control: bool) -> list[Param]:
        """Make the trial's run, or finds one that was made and has no parameters yet; these are still to be sent."""
        query = f"tags.`{SWEEP}` = '{self.sweep_id}' and tags.`{TRIAL}` = '{trial.name}'"
        begun = self._runs(query) if trial.name in self._begun else []
        self._begun.add(trial.name)
        config = trial.config
        tags = {
            SWEEP: self.sweep_id,
            TRIAL: trial.name,
            "mlflow.parentRunId": self.parent.info.run_id,
            STATE: "running",
            "control": str(control).lower(),
            "stage": self.spec.stage(config),
            "method": config.method,
            "backbone": config.backbone.name,
            "dataset": config.dataset.title,
            "mapping": config.head.kind,
        }
        if config.rank is not None:
            tags["rank"] = str(config.rank)
        name = f"control-{trial.name}" if control else trial.name
        run = begun[0] if begun else self.client.create_run(self.experiment, tags=tags, run_name=name)
        self._started[trial.name] = run
        values = config.values() | self.spec.params(config)
        return [Param(short, _param_text(values[key])) for key, short in self._param_names.items() if key in values]


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """Return an epoch's, what the user compares by before all else: MLflow's pages begin with the first."""
    values = {key: value for key, value in epoch_metrics(result).items() if key not in NOT_METRICS}
    return {"val_top1": values.pop("val_top1")} | values


def _device_tags(result: dict[str, Any]) -> list[RunTag]:
    """Return the GPU or processor, NVIDIA's driver and the precision of an epoch, as tags."""
    return [RunTag(key, result[key]) for key in ("device", "driver", "precision") if result.get(key)]


def _param_text(value: Any) -> str:
    """Return a parameter as MLflow's table has room for it; a bundle has the whole."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def make_tables(uri: str) -> None:
    """Have MLflow make the tables of a SQLite file that is not there yet, under another name until they are whole.

    It takes seconds, within which a driver may be killed; MLflow goes on with no file that has a part of them. What
    killed drivers have left is removed.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or "?" in uri:
        return
    remove_drafts(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=draft_prefix(path, Holder.this_process()), dir=path.parent) as folder:
        draft = Path(folder) / path.name
        mlflow.MlflowClient(f"{SQLITE}{draft}").search_experiments()
        publish(draft, path)  # unless another sweep has been faster


def draft_prefix(path: Path, maker: Holder) -> str:
    """Return the prefix of the folder in which a driver makes this file's tables; it names the driver."""
    return f".{path.name}.{maker.host}.{maker.process}.{maker.started:.0f}."


def remove_drafts(path: Path) -> None:
    """Remove the folders of drivers that were killed as they made the tables of this file."""
    for draft in path.parent.glob(f".{path.name}.*/"):
        with suppress(OSError):  # another driver may do the same
            if not _in_use(draft, path):
                shutil.rmtree(draft)


def _in_use(draft: Path, path: Path) -> bool:
    try:
        host, process, started, name = draft.name.removeprefix(f".{path.name}.").rsplit(".", 3)
        maker = Holder(host, int(process), float(started), name)
    except ValueError:  # of an earlier version of this project
        maker = None
    if maker and maker.here():
        return maker.lives_here()
    return time.time() - draft.stat().st_mtime < DRAFT_SECONDS


def installed_packages() -> list[str]:
    """List what can be imported here, as `pip freeze` names it; by the names of folders, as their files take 0.4 s."""
    folders = [folder for path in sys.path if path for folder in Path(path).glob("*.dist-info")]
    return sorted({folder.stem.replace("-", "==", 1) for folder in folders}, key=str.lower)


def git_commit() -> str:
    """Return the commit of this checkout, `-dirty` where it was edited; empty outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
