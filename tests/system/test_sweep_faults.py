"""Whole sweeps on this machine whose drivers are killed, interrupted, and started again."""

from __future__ import annotations

import json
import re
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.sweep import SHARING, SPEC, Sweep, empty_store, small_disk
from support.waiting import wait_for

import lorvp
from cluster.trial_folder import StopReason, TrialFolder

pytestmark = pytest.mark.slow


def test_driver_killed_and_resumed(tmp_path):
    """While it asks for its third trial, which is written down and not yet requested."""
    sweep = Sweep(tmp_path, cold=True)
    sweep.cold_jobs = False
    third = sweep.holds.hold("suggested", number=3)
    driver = sweep.start()
    third.reached(driver)
    driver.kill()
    wait_for("end of a trial without a driver", lambda: any(trial.ended() for trial in sweep.trials()))
    ended = {trial.name: trial.results() for trial in sweep.trials() if trial.ended()}
    before = sweep.results()
    third.release()
    sweep.run("--resume")
    sweep.check_complete(trials=5)
    sweep.check_kept(before)
    assert sweep.results().items() >= ended.items()


def test_drivers_interrupted_and_resumed(tmp_path):
    """Three in a row: each runs alone, SIGINT and SIGTERM end the jobs, too, and a second signal ends one at once."""
    sweep = Sweep(tmp_path, SPEC.replace("rule: asha", "rule: none"), profile=SHARING)
    step = sweep.holds.hold("step", epoch=2, step=3)
    driver = sweep.start()
    step.reached(driver, count=2)
    assert f"another driver runs this sweep: process {driver.pid} on" in sweep.run("--resume", code=2)
    assert "--resume goes on" in sweep.interrupt(driver, signal.SIGINT)
    assert not sweep.processes()
    before = sweep.results()
    interrupted = [trial for trial in sweep.trials() if trial.stop_reason() == StopReason.INTERRUPT]
    assert interrupted
    assert not any(trial.ended() for trial in interrupted)
    step = sweep.holds.hold("step", epoch=2, step=4)
    driver = sweep.start("--resume")
    step.reached(driver, count=2)
    assert "--resume goes on" in sweep.interrupt(driver, signal.SIGTERM)
    assert not sweep.processes()
    step = sweep.holds.hold("step", epoch=2, step=5)
    driver = sweep.start("--resume")
    held = step.reached(driver, count=2)
    driver.signal(signal.SIGINT)
    driver.says("ending: ")
    sweep.all_asked_to_stop(driver)
    driver.signal(signal.SIGINT)
    driver.end(code=130)
    assert all(each.alive() for each in held)  # which the driver would have waited for
    step.release()
    wait_for("end of the jobs, which are told to stop", lambda: not any(each.alive() for each in held))
    sweep.run("--resume")
    sweep.check_complete(trials=5)
    sweep.check_kept(before)


def test_the_disk_under_sqlite_is_full_for_a_while(tmp_path):
    """That is one line, whatever is sent meanwhile; once there is room, all of it arrives."""
    text = SPEC.replace("trials: 4", "trials: 2").replace("rule: asha", "rule: none")
    sweep = Sweep(tmp_path, text, profile=SHARING)
    with small_disk(tmp_path / "small", "4m") as disk:
        shutil.copyfile(empty_store(), disk / "mlflow.db")
        sweep.environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{disk / 'mlflow.db'}"
        step = sweep.holds.hold("step", epoch=2, step=3)
        driver = sweep.start()
        step.reached(driver, count=2)
        wait_for("an epoch in MLflow", lambda: any("val_top1" in run.data.metrics for run in sweep.runs()), driver)
        filler = disk / "filler"
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass
        step.release()
        driver.says(r"trying again: \(sqlite3.OperationalError\) (database or disk is full|disk I/O error)")
        wait_for("end of all trials", lambda: all(trial.ended() for trial in sweep.trials()), driver)
        filler.unlink()
        assert driver.end().count("sqlite3") <= 2
        sweep.check_complete(trials=3)


CONFIRMED = """\
name: small
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: digits, max_per_class: 20, val_fraction: 0.2}
  prompt: {optimizer: adam}
  epochs: 2
  batch_size: 32
  precision: fp32
space:
  method: {choice: [lorvp, linear_probe]}
  head.lr: {log_uniform: [0.05, 1]}
  prompt.lr: {log_uniform: [0.005, 0.2], when: {method: lorvp}}
search: {algorithm: tpe, trials: 4, seed: 1, concurrent: 2, equal: method}
early_stopping: {rule: asha, grace_epochs: 1, reduction_factor: 2}
confirm: {seeds: [3, 4]}
"""


def test_confirmation_killed_resumed_and_made_longer(tmp_path):
    """Killed while it trains the choice, which is written down before that."""
    sweep = Sweep(tmp_path, CONFIRMED, profile=SHARING)

    def stages() -> dict[str, list[TrialFolder]]:
        found = {True: [], False: []}
        for trial in sweep.trials():
            found[trial.config.read_test].append(trial)
        return {"search": found[False], "confirm": found[True]}

    choice = sweep.holds.hold("chosen")
    driver = sweep.start()
    choice.reached(driver)
    chosen = (sweep.path / "confirm.json").read_text()
    assert not stages()["confirm"]
    confirms = next(iter(json.loads(chosen)["chosen"][0]["seeds"].values()))
    step = sweep.holds.hold("step", trial=confirms, epoch=2)
    choice.release()
    step.reached(driver)
    driver.kill()
    step.release()
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
