from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import digits_values, make
from typer.testing import CliRunner

from lorvp.bench.__main__ import CLASSES, measured_peak
from lorvp.config import TrialConfig
from lorvp.errors import UserError
from lorvp.estimate.memory import Prediction, predict
from sweeps import launch
from sweeps.plan.memory import dataset_on_gpu

TINY = {"name": "lorvp_tiny_32"}
RESNET = {"name": "resnet18", "image_size": 64}
VIT = {"name": "vit_tiny_patch16_224", "image_size": 64, "kwargs": {"depth": 2}}


def trial(backbone: dict[str, Any], **changes: Any) -> TrialConfig:
    values = {"backbone": {"pretrained": False} | backbone, "epochs": 1, "precision": "fp32", "eval_batch_size": 1}
    return TrialConfig.model_validate(digits_values(**values | changes))


def measured(config: TrialConfig) -> object:
    """Within 15 %, or the one weight that a convolution of oneDNN's packs anew, which shows in the smallest trial."""
    return pytest.approx(measured_peak(config, torch.device("cpu"))[0], rel=0.15, abs=0.7)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize("backbone", [TINY, RESNET, VIT], ids=lambda backbone: backbone["name"])
def test_training_takes_what_was_predicted(backbone, batch):
    config = trial(backbone, batch_size=batch)
    assert predict(config, CLASSES).peak == measured(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "linear_probe", "eval_batch_size": 64},
        {"precision": "fp16"},
        {"head": {"kind": "fm"}},
        {"method": "acavp"},
        {"method": "evp"},
    ],
    ids=str,
)
def test_so_do_other_trials(changes):
    config = trial(VIT, batch_size=16, **changes)
    assert predict(config, CLASSES).peak == measured(config)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [TINY, VIT], ids=lambda backbone: backbone["name"])
def test_memory_grows_with_the_batch_and_shrinks_with_the_precision(backbone):
    def training(batch: int, precision: str) -> float:
        return predict(trial(backbone, batch_size=batch, precision=precision)).training

    small, middle, large = (training(batch, "fp32") for batch in (32, 64, 128))
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.02)
    # more than half: the images stay in fp32, and so do the tokens that a ViT normalises
    assert 0.45 < (training(128, "fp16") - training(64, "fp16")) / (large - middle) < 0.75


def test_auto_is_16_bit():
    """Whatever this machine would take."""
    assert predict(trial(TINY, precision="auto")) == predict(trial(TINY, precision="bf16"))


def test_gpus_share_the_batch():
    def both(batch: int, gpus: int) -> Prediction:
        return predict(trial(TINY, batch_size=batch, eval_batch_size=batch), gpus=gpus)

    assert both(32, 4) == both(8, 1)


def test_weights_need_not_be_there(tmp_path):
    elsewhere = RESNET | {"pretrained": True, "checkpoint": tmp_path / "none.safetensors"}
    assert predict(trial(elsewhere)) == predict(trial(RESNET))
    with pytest.raises(UserError, match="timm has no model"):
        predict(trial({"name": "resnet19"}))


SPEC = """\
name: plan
trial:
  backbone: {name: lorvp_tiny_32}
  dataset: {name: digits}
  epochs: 1
space:
  prompt.lr: {log_uniform: [1e-3, 0.1]}
  batch_size: {choice: [8, 64, 32]}
search: {algorithm: random, trials: 2}
"""


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """What --dry-run says of memory on a GPU of so many GB, with overrides of the spec."""
    monkeypatch.chdir(tmp_path)

    def run(gpu_memory_gb: float | None, *overrides: str) -> str:
        Path("sweep.yaml").write_text(SPEC)
        Path("gpu.yaml").write_text("kind: local\n" + (f"gpu_memory_gb: {gpu_memory_gb}\n" if gpu_memory_gb else ""))
        options = [f"--set={override}" for override in ("cluster=gpu.yaml", *overrides)]
        result = CliRunner().invoke(launch.app, ["sweep.yaml", "--dry-run", *options])
        assert result.exit_code == 0, result.output
        (line,) = [line for line in result.output.splitlines() if line.startswith("peak GPU memory")]
        return line

    return run


@pytest.mark.slow
def test_dry_run_says_what_fits(planned):
    said = planned(48)
    assert said.startswith("peak GPU memory: about 0.")
    assert said.endswith("in evaluation at batch 512 (16-bit), fits the 48 GB of profile gpu.yaml")
    assert "in training at batch 64 (fp32), fits" in planned(48, "trial.eval_batch_size=8", "trial.precision=fp32")
    assert planned(None).endswith("in evaluation at batch 512 (16-bit)")


@pytest.mark.slow
def test_dry_run_says_what_would_fit(planned):
    said = planned(0.03, "trial.eval_batch_size=8", "space.batch_size={choice: [32, 512]}")
    assert "in training at batch 512 (16-bit), does NOT fit the 0.03 GB of profile gpu.yaml" in said
    fitting = int(said.split("batch_size ")[1].removesuffix(" would"))
    for batch, verdict in ((fitting, ", fits "), (fitting + 32, "does NOT fit")):
        changes = (f"trial.batch_size={batch}", "trial.eval_batch_size=8", "space={prompt.rank: {choice: [1]}}")
        assert verdict in planned(0.03, *changes)
    assert planned(0.001).endswith("; no batch_size would, no eval_batch_size would")


@pytest.mark.slow
def test_dry_run_looks_at_the_largest_trial(planned):
    backbones = "space.backbone.name={choice: [lorvp_tiny_32, resnet10t]}"
    methods = "space.method={choice: [linear_probe, lorvp]}"
    batch = "space.batch_size={choice: [8, 64], when: {optimizer.name: adam}}"
    optimizers = "space.optimizer.name={choice: [sgd, adam]}"
    said = planned(48, backbones, methods, optimizers, batch, "trial.batch_size=8", "trial.eval_batch_size=8")
    assert "in training at batch 64, backbone.name resnet10t, method lorvp (16-bit)" in said


@pytest.mark.slow
def test_dry_run_takes_the_most_tokens(planned):
    backbone, method = "trial.backbone.name=lorvp_tiny_vit_32", "trial.method=vpt"
    tokens = "space={adapter.count: {choice: [1, 50, 10]}, adapter.deep: {choice: [true, false]}}"
    said = planned(48, backbone, method, tokens, "trial.eval_batch_size=8")
    assert "in training at batch 256, adapter.count 50, adapter.deep True (16-bit)" in said


def test_dry_run_says_why_nothing_is_known(planned):
    said = planned(48, "trial.backbone={name: lorvp_tiny_vit_32, kwargs: {deepness: 3}}")
    assert said.startswith("peak GPU memory: can't be predicted: backbone lorvp_tiny_vit_32: can't be built: ")
    assert "unexpected keyword argument 'deepness'" in said


def test_a_backbone_without_a_classifier_is_taken_with_as_many_classes_as_any():
    headless, plain = (trial({"name": "lorvp_tiny_vit_32", "kwargs": {"num_classes": n}}) for n in (0, 1000))
    assert predict(headless).training > 0.9 * predict(plain).training > predict(headless, classes=2).training


def test_a_dataset_that_is_kept_on_the_gpu_counts(image_root, tmp_path):
    there = make("image_folder", image_root, tmp_path, size=64).folder
    config = trial(TINY, dataset={"name": "store", "root": there})
    size = (24 + 12) * 3 * 64 * 64
    assert dataset_on_gpu(config, 5 * size) == (3, size)
    assert dataset_on_gpu(config, 3 * size) == (3, 0)
    assert dataset_on_gpu(trial(TINY, dataset={"name": "store", "root": tmp_path}), 5 * size) == (None, 0)
