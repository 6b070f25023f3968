"""How good a bundle is on prepared sets: whole, in part, numbered, corrupted."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import digits_values, make
from typer.testing import CliRunner

from lorvp import evaluate
from lorvp.bundle import io as bundle
from lorvp.config import TrialConfig
from lorvp.data import store
from lorvp.data.corruptions import CORRUPTIONS, Corruption
from lorvp.errors import UserError
from lorvp.training.loop import train


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
    (row,) = pq.read_table(tmp_path / "found.parquet").to_pylist()
    assert (row["top1"], row["corruption"], row["strength"]) == (whole.top1, None, None)


@pytest.mark.slow
def test_evaluation_of_corrupted_images(image_root, tmp_path):
    """Beside the plain ones, in any batches: an image's noise is its own."""
    folder = make("image_folder", image_root, tmp_path, size=32).folder
    values = digits_values(dataset={"name": "store", "root": folder, "val_fraction": 0.25}, epochs=1, batch_size=9)
    list(train(TrialConfig.model_validate(values), tmp_path))
    arguments = [str(tmp_path / "bundle"), "--data", str(folder), "--corruptions", "--out", str(tmp_path / "found")]
    shown = CliRunner().invoke(evaluate.app, arguments)
    assert "contrast 3" in shown.output
    rows = pq.read_table(tmp_path / "found").to_pylist()
    assert [row["corruption"] for row in rows] == [None] + [c.kind for c in CORRUPTIONS]
    assert [row["strength"] for row in rows] == [None] + [1, 2, 3] * 4
    method, opened = bundle.load(tmp_path / "bundle"), store.Store.open(folder)
    seen: list[list[torch.Tensor]] = []
    method.register_forward_pre_hook(lambda _, inputs: seen[-1].append(inputs[0]))
    for batch_size in (12, 5):
        seen.append([])
        evaluate.evaluate(method, opened, batch_size, Corruption("noise", 3))
    assert torch.equal(torch.cat(seen[-1]), torch.cat(seen[-2]))
    plain = torch.from_numpy(opened.splits["test"].read(np.arange(12))).permute(0, 3, 1, 2)
    assert torch.equal(torch.cat(seen[-1]), Corruption("noise", 3)(plain, range(12)))


def test_intervals():
    low, high = evaluate.wilson(81, 100)
    assert (low, high) == pytest.approx((72.22, 87.49), abs=0.01)
    assert evaluate.wilson(0, 50)[0] == pytest.approx(0)
