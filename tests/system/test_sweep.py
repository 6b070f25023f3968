"""Whole sweeps, as a user starts them; what ends their drivers is in test_sweep_faults.py."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import shutil

import mlflow
import pyarrow.parquet as pq
import pytest
from conftest import Server
from safetensors.torch import save_file
from support.sweep import LAUNCH, SHARING, SPEC, Sweep

import lorvp
from cluster.trial_folder import State, TrialFolder
from lorvp.data.prepare import prepare
from sweeps.results.outcome import Outcome
from sweeps.results.paired import recorded

pytestmark = pytest.mark.slow


def test_a_sweep_from_yaml_to_mlflow(tmp_path):
    """Of a user whose files nobody else may read, in a temporary folder with a path longer than a socket's may be."""
    sweep = Sweep(tmp_path, cold=True)
    shutil.rmtree(tmp_path / "runs")  # this one makes its own
    long = tmp_path / ("t" * 100) / ("u" * 100)
    long.mkdir(parents=True)
    sweep.environment["TMPDIR"] = str(long)
    before = os.umask(0o077)
    try:
        output = sweep.run()
    finally:
        os.umask(before)
    sweep.cold = False
    written = [path for path in (sweep.path / "trials").rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if path.stat().st_mode & 0o077]
    sweep.check_complete(trials=5)
    sweep.check_model(output)
    for phrase in (
        "small: 5 trials",
        "best trial",
        "control",
        "difference: val",
        "report:",
        "try it:      python -m lorvp.predict",
        "mlflow ui --backend-store-uri",
    ):
        assert phrase in output
    best = re.search(r"best prompt: (\S+)", output)[1]
    assert lorvp.load(best).class_names[9] == "9"
    table = pq.read_table(sweep.path / "results.parquet").to_pylist()
    assert len(table) == sum(map(len, sweep.results().values()))
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
    before = sweep.results()
    sweep.environment["TMPDIR"] = str(tmp_path / "none")  # there is no such folder
    sweep.run("--resume", "--set", "search.trials=5")
    sweep.check_complete(trials=6)
    for name, results in before.items():
        assert TrialFolder(sweep.path / "trials" / name).results() == results
        assert len(list((sweep.path / "trials" / name / "attempts").iterdir())) == 1


def test_a_sweep_says_what_its_gain_shows_and_is_confirmed_by_the_command_that_it_prints(tmp_path):
    text = SPEC.replace("[rlm, flm, ilm, lp]", "[lp]").replace("rule: asha", "rule: none")
    sweep = Sweep(tmp_path, text, profile=SHARING)
    output = sweep.run()
    found = Outcome.read(sweep.path)
    best, control = found.best(), found.control()
    for entry in (best, control):
        splits = recorded(entry.trial)
        assert 100 * splits["val"].right.mean() == pytest.approx(entry.best()["val_top1"])
        assert 100 * splits["test"].right.mean() == pytest.approx(entry.test_top1())
    gain = found.gain()
    assert (gain.split, gain.images) == ("test", 359)
    assert gain.points == pytest.approx(best.test_top1() - control.test_top1())
    said = [line for line in output.splitlines() if line.startswith(("difference", "test:", "val is"))]
    assert said == found.verdict()[2:]
    assert gain.in_words() in said[1]
    (parent,) = [run for run in sweep.runs() if "mlflow.parentRunId" not in run.data.tags]
    assert parent.data.metrics == {
        "gain": pytest.approx(gain.points, abs=1e-4),
        "gain_low": pytest.approx(gain.low, abs=1e-4),
        "gain_high": pytest.approx(gain.high, abs=1e-4),
        "gain_images": 359,
    }
    assert (parent.data.tags["gain.split"], parent.data.tags["gain.verdict"]) == ("test", gain.in_words())
    (model,) = sweep.client().search_model_versions("name = 'small'")
    page = html.unescape((sweep.path / "report.html").read_text())
    for line in said:
        assert line in page
        assert line in parent.data.tags["mlflow.note.content"]
        assert line in model.description
    steps = [line for line in output.splitlines() if line.startswith("next: ")]
    assert all(step.removeprefix("next: ") in page for step in steps)
    program, launcher, spec, *arguments = shlex.split(steps[0].partition(" new seeds: ")[2])
    assert (program, launcher, spec) == ("python", "sweeps/launch.py", "sweep.yaml")
    before = sweep.results()
    confirmed = sweep.run(*arguments)
    sweep.check_complete(trials=5 + 5)
    assert {name: sweep.results()[name] for name in before} == before
    found = Outcome.read(sweep.path)
    gain = found.gain()
    assert (gain.images, len(found.comparison.best_row().entries)) == (359, 5)
    assert found.control().trial.name == control.trial.name
    assert all(line in confirmed for line in found.verdict())
    assert re.search(r"mean of 5 seeds, 95 % t interval; \d+ val and 359 test images", confirmed)
    assert re.search(r"the model, \w+, less the control: .* 95 % interval over 359 images", confirmed)
    assert "confirm it" not in confirmed
    (parent,) = [run for run in sweep.runs() if "mlflow.parentRunId" not in run.data.tags]
    assert parent.data.metrics["gain"] == pytest.approx(gain.points, abs=1e-4)
    assert parent.data.metrics["gain_low"] == pytest.approx(gain.low, abs=1e-4)


def test_failing_trials_do_not_end_the_sweep(tmp_path):
    text = SPEC.replace("prompt.lr: {log_uniform: [0.005, 0.2]}", "prompt.lr: {choice: [0.05, 1e30]}")
    text = text.replace("optimizer: adam", "optimizer: sgd").replace("rule: asha", "rule: none")
    text = text.replace("[rlm, flm, ilm, lp]", "[lp]").replace("algorithm: tpe, trials: 4,", "algorithm: grid,")
    sweep = Sweep(tmp_path, text, profile=SHARING)
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
    assert "no trial finished" in Sweep(tmp_path / "none", everything, profile=SHARING).run(code=1)


def test_imagenet_sweep_on_a_small_folder(tmp_path, image_root):
    """The paper's spec, pointed at a small folder of ImageNet's layout and a local checkpoint of two narrow blocks."""
    import timm

    kwargs = {"depth": 2, "embed_dim": 192, "num_heads": 3}
    model = timm.create_model("vit_base_patch16_224_miil.in21k", pretrained=False, **kwargs)
    checkpoint = tmp_path / "vit.safetensors"
    save_file(model.state_dict(), checkpoint)
    sweep = Sweep(tmp_path, (LAUNCH.parent / "lorvp_imagenet.yaml").read_text())
    assert "python -m lorvp.data prepare imagenet --size 224" in sweep.run(code=2)
    overrides = {
        "name": "small",
        "trial.dataset.root": prepare("imagenet", image_root, tmp_path / "data", partial=True),
        "trial.backbone.checkpoint": checkpoint,
        "trial.backbone.kwargs": json.dumps(kwargs),
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
    sweep = Sweep(tmp_path, text + "failure_limit: {share: 0.4, trials: 5}\n", profile=SHARING)
    output = sweep.run(code=1)
    assert re.search(r"given up: [345] of the first \d trials failed", output)  # the fifth may end in the same look
    assert re.search(r"failed: \d+ diverged", output)
    assert "diverged: train loss is nan in epoch 1" in output
    assert len(sweep.trials()) < 40
    (parent,) = [run for run in sweep.runs() if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "FAILED"
    failed = next(trial for trial in sweep.trials() if trial.ended() and trial.ended().state == State.FAILED)
    assert "failed" in sweep.run("--follow", failed.name[:6])
