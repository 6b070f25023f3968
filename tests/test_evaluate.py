"""How good a bundle is on prepared sets: whole, in part, numbered."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import digits_values, make
from typer.testing import CliRunner

from lorvp import bundle, evaluate, store
from lorvp.config import TrialConfig
from lorvp.errors import UserError
from lorvp.training import train


def test_evaluation_of_a_bundle(image_root, tmp_path):
    """All classes; a part of them, restricted to their logits; numbered ones; and classes that it doesn't know."""
    folder = make("image_folder", image_root, tmp_path, size=32).folder
    values = digits_values(dataset={"name": "store", "root": folder, "val_fraction": 0.25}, epochs=3, batch_size=9)
    results = list(train(TrialConfig.model_validate(values), tmp_path))
    method = bundle.load(tmp_path / "bundle")
    whole = evaluate.evaluate(method, store.Store.open(folder), batch_size=5)
    assert whole.top1 == pytest.approx(results[-1].test_top1)
    assert (whole.images, whole.classes) == (12, 3)
    shutil.copytree(image_root / "val", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "n02")
    part = make("imagenet-r", tmp_path / "part", tmp_path, size=32)
    with torch.inference_mode():
        pixels = torch.from_numpy(part.splits["test"].read(np.arange(8))).permute(0, 3, 1, 2)
        restricted = method(pixels)[:, [0, 2]].argmax(1).numpy()
    found = evaluate.evaluate(method, part)
    assert found.top1 == pytest.approx(100 * np.mean(restricted == part.splits["test"].labels))
    assert (found.images, found.classes) == (8, 2)
    for number, name in enumerate(("n01", "n02", "n03")):
        shutil.copytree(image_root / "val" / name, tmp_path / "numbered" / str(number))
    assert evaluate.evaluate(method, make("imagenet-v2", tmp_path / "numbered", tmp_path, size=32)).top1 == whole.top1
    (tmp_path / "part" / "n01").rename(tmp_path / "part" / "n09")
    with pytest.raises(UserError, match="1 of its classes are not the bundle's: n09"):
        evaluate.evaluate(method, make("imagenet-a", tmp_path / "part", tmp_path, size=32))
    arguments = [str(tmp_path / "bundle"), "--data", str(folder), "--out", str(tmp_path / "found.parquet")]
    shown = CliRunner().invoke(evaluate.app, arguments)
    assert f"{whole.top1:.2f}" in shown.output
    assert pq.read_table(tmp_path / "found.parquet").to_pylist()[0]["top1"] == whole.top1


def test_intervals():
    low, high = evaluate.wilson(81, 100)
    assert (low, high) == pytest.approx((72.22, 87.49), abs=0.01)
    assert evaluate.wilson(0, 50)[0] == pytest.approx(0)
