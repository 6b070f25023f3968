"""Whole sweeps, as a user starts them: real processes, Ray, SQLite and MLflow."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import mlflow
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
from conftest import Server
from safetensors.torch import save_file

import lorvp
from cluster.folder import State, TrialFolder
from lorvp.predict import predict
from lorvp.prepare import prepare

pytestmark = pytest.mark.slow
LAUNCH = Path(__file__).parent.parent / "sweeps" / "launch.py"

SPEC = """\
name: small
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: digits, max_per_class: 20, val_fraction: 0.2}
  optimizer: {lr: 0.5, prompt_name: adam}
  epochs: 3
  batch_size: 32
  precision: fp32
space:
  label_mapping: {choice: [rlm, flm, ilm, lp]}
  prompt.rank: {choice: [1, 4]}
  optimizer.prompt_lr: {log_uniform: [0.005, 0.2]}
search: {algorithm: tpe, trials: 4, seed: 1, concurrent: 2}
early_stopping: {rule: asha, grace_epochs: 1, reduction_factor: 2}
control: {}
"""


@cache
def empty_store() -> Path:
    """MLflow's tables, which take 3 s to make; a sweep finds them as those of an earlier one."""
    path = Path(tempfile.mkdtemp(prefix="lorvp-store-")) / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    atexit.register(shutil.rmtree, path.parent)
    return path


class Sweep:
    """A spec in a folder of its own, and what launching it leaves there."""

    def __init__(self, folder: Path, text: str = SPEC) -> None:
        self.folder = folder
        (folder / "runs").mkdir()
        shutil.copyfile(empty_store(), folder / "runs" / "mlflow.db")
        (folder / "sweep.yaml").write_text(text)
        self.environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(LAUNCH), "sweep.yaml", *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == code, output
        return output

    def resume(self, *arguments: str) -> subprocess.Popen[str]:
        """A driver that goes on, and has begun to start Ray."""
        process = self.start("--resume", *arguments)
        while not list((self.path / "ray").glob(f"*/session/session_*_{process.pid}")):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.2)
        return process

    @property
    def path(self) -> Path:
        return self.folder / "runs" / "small"

    def trials(self) -> list[TrialFolder]:
        return TrialFolder.requested(self.path / "trials")

    def recorded(self) -> int:
        return sum(len(trial.results()) for trial in self.trials())

    def wait_for_epochs(self, process: subprocess.Popen[str], count: int) -> None:
        while self.recorded() < count:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)

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
            artifacts = {a.path for a in self.client().list_artifacts(run.info.run_id, "bundle")}
            names = {"README.md", "config.json", "example.png", "model.safetensors"}
            names |= {"prompt.png", "example_prompted.png"} if trial.config.method == "lorvp" else set()
            assert artifacts == {f"bundle/{name}" for name in names}
        assert not (self.path / "ray").exists()
        assert not [
            p for p in psutil.process_iter(["cmdline"]) if str(self.folder) in " ".join(p.info["cmdline"] or [])
        ]

    def check_model(self, output: str) -> None:
        """The registered model says of an image what the bundle says, by the lines that the sweep ended with."""
        bundle = Path(re.search(r"best prompt: (\S+)", output)[1])
        uri = re.search(r"as a model:  (\S+)", output)[1]
        mlflow.set_tracking_uri(self.tracking_uri)
        found = mlflow.pyfunc.load_model(uri).predict(pd.DataFrame({"image": [(bundle / "example.png").read_bytes()]}))
        (expected,) = predict(lorvp.load(bundle), [bundle / "example.png"], top=1)
        assert [(found["class"][0], pytest.approx(found["probability"][0], abs=1e-4))] == expected.classes


def test_a_sweep_from_yaml_to_mlflow(tmp_path):
    sweep = Sweep(tmp_path)
    shutil.rmtree(tmp_path / "runs")  # this one makes its own
    assert "log ratio of the evidences, an image: +0." in sweep.run("--triage")
    output = sweep.run()
    sweep.check_complete(trials=5)
    sweep.check_model(output)
    for phrase in (
        "small: 5 trials",
        "best trial",
        "control",
        "difference: val",
        "triage said",
        "report:",
        "try it:      python -m lorvp.predict",
        "mlflow ui --backend-store-uri",
    ):
        assert phrase in output
    best = re.search(r"best prompt: (\S+)", output)[1]
    assert lorvp.load(best).class_names[9] == "9"
    table = pq.read_table(sweep.path / "results.parquet").to_pylist()
    assert len(table) == sweep.recorded()
    for trial in sweep.trials():
        rows = [row for row in table if row["trial"] == trial.name]
        assert [row["val_top1"] for row in rows] == [r["val_top1"] for r in trial.results()]
        assert {row["state"] for row in rows} == {trial.ended().state}
    finished = [t for t in sweep.trials() if t.ended().state == State.FINISHED and t.config.method == "lorvp"]
    best_val = max(max(r["val_top1"] for r in t.results()) for t in finished)
    assert f"val top-1 {best_val:.2f} %" in output
    # again: refused; resumed: everything is taken from the folders, and the sweep can be made longer
    assert "--resume goes on" in sweep.run(code=2)
    assert "trial.epochs is not what" in sweep.run("--resume", "--set", "trial.epochs=4", code=2)
    before = {trial.name: trial.results() for trial in sweep.trials()}
    sweep.run("--resume", "--set", "search.trials=5")
    sweep.check_complete(trials=6)
    for name, results in before.items():
        assert TrialFolder(sweep.path / "trials" / name).results() == results
        assert len(list((sweep.path / "trials" / name / "attempts").iterdir())) == 1


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A process of Ray's that has outlived its driver writes into a folder, whoever removes it."""
    ends = threading.Event()

    def keep_writing() -> None:
        while not ends.wait(0.0005):
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "log").touch()

    thread = threading.Thread(target=keep_writing)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


def test_driver_killed_and_resumed(tmp_path):
    sweep = Sweep(tmp_path)
    process = sweep.start()
    sweep.wait_for_epochs(process, 7)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended = {t.name: t.results() for t in sweep.trials() if t.ended()}
    recorded = {t.name: t.results() for t in sweep.trials()}
    assert ended
    with writing(next((sweep.path / "ray").iterdir())):
        process = sweep.resume()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    sweep.check_complete(trials=5)
    for name, results in recorded.items():
        now = TrialFolder(sweep.path / "trials" / name).results()
        assert now[: len(results)] == results  # with their times: no epoch was trained again
        if name in ended:
            assert len(now) == len(results)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_driver_interrupted_and_resumed(tmp_path, signum):
    sweep = Sweep(tmp_path)
    process = sweep.start()
    sweep.wait_for_epochs(process, 3)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "--resume goes on" in output
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    recorded = {t.name: t.results() for t in sweep.trials()}
    sweep.run("--resume")
    sweep.check_complete(trials=5)
    for name, results in recorded.items():
        assert TrialFolder(sweep.path / "trials" / name).results()[: len(results)] == results


def test_two_drivers_at_once(tmp_path):
    sweep = Sweep(tmp_path)
    process = sweep.start()
    sweep.wait_for_epochs(process, 1)
    assert f"another driver runs this sweep: process {process.pid} on" in sweep.run("--resume", code=2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


def test_failing_trials_do_not_end_the_sweep(tmp_path):
    text = SPEC.replace(
        "optimizer.prompt_lr: {log_uniform: [0.005, 0.2]}", "optimizer.prompt_lr: {choice: [0.05, 1e30]}"
    )
    text = text.replace("prompt_name: adam", "prompt_name: sgd").replace("rule: asha", "rule: none")
    text = text.replace("[rlm, flm, ilm, lp]", "[lp]").replace("algorithm: tpe, trials: 4,", "algorithm: grid,")
    sweep = Sweep(tmp_path, text)
    output = sweep.run()
    assert len(sweep.trials()) == 5
    failed = [run for run in sweep.runs() if run.data.tags.get("state") == "failed"]
    assert len(failed) == 2
    assert {run.data.tags["reason"] for run in failed} == {"train loss is nan in epoch 1"}
    assert {run.info.status for run in failed} == {"FAILED"}
    assert output.count("failed  diverged: train loss is nan in epoch 1") == 2
    assert "failed: 2 diverged" in output
    everything = SPEC.replace("lr: 0.5", "lr: 1e30").replace("[rlm, flm, ilm, lp]", "[lp]")
    everything = everything.replace("trials: 4", "trials: 1")
    (tmp_path / "none").mkdir()
    assert "no trial finished" in Sweep(tmp_path / "none", everything).run(code=1)


def test_imagenet_sweep_on_a_small_folder(tmp_path, image_root):
    """The paper's spec as it stands, pointed at a small folder of ImageNet's layout and a local checkpoint."""
    import timm

    model = timm.create_model("vit_base_patch16_224_miil.in21k", pretrained=False)
    checkpoint = tmp_path / "vit.safetensors"
    save_file(model.state_dict(), checkpoint)
    sweep = Sweep(tmp_path, (LAUNCH.parent / "lorvp_imagenet.yaml").read_text())
    assert "python -m lorvp.data prepare imagenet --size 224" in sweep.run(code=2)
    overrides = {
        "name": "small",
        "trial.dataset.root": prepare("imagenet", image_root, tmp_path / "data", partial=True),
        "trial.backbone.checkpoint": checkpoint,
        "trial.epochs": 1,
        "trial.batch_size": 9,
        "search.trials": 1,
        "search.concurrent": 2,
        "early_stopping.grace_epochs": 1,
    }
    arguments = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    output = sweep.run(*arguments)
    assert "difference: val" in output
    sweep.check_complete(trials=3)
    assert all(trial.config.backbone.checkpoint == checkpoint for trial in sweep.trials())


def test_tracking_on_a_server(tmp_path, tmp_path_factory, postgres):
    """Named by the usual environment variable, and itself backed by PostgreSQL; the trials are packed."""
    text = SPEC.replace("algorithm: tpe, trials: 4", "algorithm: random, trials: 2")
    sweep = Sweep(tmp_path, text.replace("rule: asha", "rule: median") + "pack: 2\n")
    with Server(tmp_path_factory.mktemp("server"), postgres) as server:
        sweep.environment["MLFLOW_TRACKING_URI"] = server.uri
        output = sweep.run()
        assert f"open {server.uri}" in output
        sweep.check_complete(trials=3)
    assert len({trial.job()["id"] for trial in sweep.trials()}) < 3  # packed
    local = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    assert local.get_experiment_by_name("lorvp") is None


def test_a_sweep_that_fails_from_its_start_is_ended(tmp_path):
    text = SPEC.replace("lr: 0.5", "lr: 1e30").replace("[rlm, flm, ilm, lp]", "[lp]").replace("trials: 4", "trials: 40")
    sweep = Sweep(tmp_path, text + "failure_limit: {share: 0.4, trials: 5}\n")
    output = sweep.run(code=1)
    assert "given up: 3 of the first" in output
    assert re.search(r"failed: \d+ diverged", output)
    assert "diverged: train loss is nan in epoch 1" in output
    assert len(sweep.trials()) < 10
    (parent,) = [run for run in sweep.runs() if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "FAILED"
    failed = next(trial for trial in sweep.trials() if trial.ended() and trial.ended().state == State.FAILED)
    assert "failed" in sweep.run("--follow", failed.name[:6])


CONFIRMED = """\
name: small
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: digits, max_per_class: 20, val_fraction: 0.2}
  optimizer: {lr: 0.5, prompt_name: adam}
  epochs: 2
  batch_size: 32
space:
  method: {choice: [lorvp, linear_probe]}
  optimizer.head_lr: {log_uniform: [0.05, 1]}
  optimizer.prompt_lr: {log_uniform: [0.005, 0.2], when: {method: lorvp}}
search: {algorithm: tpe, trials: 4, seed: 1, concurrent: 2, equal: method}
early_stopping: {rule: asha, grace_epochs: 1, reduction_factor: 2}
confirm: {seeds: [3, 4]}
"""


def test_confirmation_killed_resumed_and_made_longer(tmp_path):
    sweep = Sweep(tmp_path, CONFIRMED)

    def stages() -> dict[str, list[TrialFolder]]:
        found = {True: [], False: []}
        for trial in sweep.trials():
            found[trial.config.read_test].append(trial)
        return {"search": found[False], "confirm": found[True]}

    process = sweep.start()
    while sum(len(trial.results()) for trial in stages()["confirm"]) < 1:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    chosen = (sweep.path / "confirm.json").read_text()
    before = {trial.name: trial.results() for trial in stages()["search"]}
    assert len(before) == 4 + 1
    status = sweep.run("--status")
    assert len(re.findall(r"[0-9a-f]{12} +confirm ", status)) == 2 * 2 + 1
    output = sweep.run("--resume")
    sweep.check_complete(trials=5 + 5)
    assert (sweep.path / "confirm.json").read_text() == chosen
    assert {trial.name: trial.results() for trial in stages()["search"]} == before
    assert all(result["test_top1"] is None for results in before.values() for result in results)
    for trial in stages()["confirm"]:
        read = [result["test_top1"] is not None for result in trial.results()]
        assert read == [False] * (trial.config.epochs - 1) + [True]
    runs = [run.data.tags for run in sweep.runs()]
    tags = {run["lorvp.trial"]: run["stage"] for run in runs if "lorvp.trial" in run}
    assert tags == {trial.name: stage for stage, trials in stages().items() for trial in trials}
    rows = pq.read_table(sweep.path / "results.parquet").to_pylist()
    assert {row["trial"]: row["stage"] for row in rows} == tags
    comparison = pq.read_table(sweep.path / "comparison.parquet").to_pylist()
    assert [(row["method"], row["n"], row["control"]) for row in comparison] == [
        ("lorvp", 2, False),
        ("linear_probe", 2, False),
        ("linear_probe", 1, True),
    ]
    best = max(comparison[:2], key=lambda row: row["val_top1"])
    assert f"best config {best['trial']} (method {best['method']}): val top-1 {best['val_top1']:.2f} ±" in output
    assert "less the control: val" in output
    logged = Path(re.search(r"best prompt: (\S+)", output)[1])
    assert logged.parts[-4] in {trial.name for trial in stages()["confirm"]}
    assert lorvp.load(logged).class_names[9] == "9"
    sweep.check_model(output)
    (parent,) = [run for run in sweep.runs() if "mlflow.parentRunId" not in run.data.tags]
    files = {file.path for file in sweep.client().list_artifacts(parent.info.run_id)}
    assert {"comparison.md", "comparison.parquet", "results.parquet"} <= files
    assert (sweep.path / "comparison.md").read_text().startswith("# small")
    # again: nothing is trained; longer: the search goes on, and what was confirmed stays
    sweep.run("--resume")
    sweep.check_complete(trials=5 + 5)
    confirmed = {trial.name: trial.results() for trial in stages()["confirm"]}
    sweep.run("--resume", "--set", "search.trials=6")
    assert len(stages()["search"]) == 6 + 1
    sweep.check_complete(trials=len(stages()["search"]) + len(stages()["confirm"]))
    assert '"trials": 6' in (sweep.path / "confirm.json").read_text()
    for name, results in confirmed.items():
        assert TrialFolder(sweep.path / "trials" / name).results() == results
