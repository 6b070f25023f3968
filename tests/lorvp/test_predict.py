from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import digits_values, make
from PIL import Image
from typer.testing import CliRunner

from lorvp import predict
from lorvp.bundle import io as bundle
from lorvp.config import TrialConfig
from lorvp.data import store
from lorvp.errors import UserError
from lorvp.training.loop import train


@pytest.fixture
def tuned(image_root, tmp_path) -> Path:
    """A bundle for three classes of images that can be told apart by their colour."""
    folder = make("image_folder", image_root, tmp_path, size=32).folder
    values = digits_values(dataset={"name": "store", "root": folder, "val_fraction": 0.25}, epochs=3, batch_size=9)
    list(train(TrialConfig.model_validate(values), tmp_path))
    return tmp_path / "bundle"


def test_what_it_says_is_what_the_trial_saw(tuned, image_root, tmp_path):
    """A file is read as the store's images were: the same probabilities."""
    paths = [image_root / "val" / "n02" / f"{i}.JPEG" for i in range(4)]
    method = bundle.load(tuned)
    found = list(predict.predict(method, paths, top=2))
    kept = store.Store.open(tmp_path / "image_folder-32").splits["test"]
    pixels = torch.from_numpy(kept.read(np.arange(4, 8))).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = method(pixels).softmax(1)
    for each, row in zip(found, expected, strict=True):
        assert [name for name, _ in each.classes] == [method.class_names[i] for i in row.topk(2).indices]
        assert [value for _, value in each.classes] == pytest.approx(row.topk(2).values.tolist(), abs=1e-6)
    asked = [str(tuned), *map(str, paths), "--top", "1"]
    said = CliRunner().invoke(predict.app, asked)
    assert said.exit_code == 0
    assert [line.split()[1] for line in said.output.splitlines()[1:]] == [each.classes[0][0] for each in found]


def test_what_is_no_image_or_no_bundle(tuned, image_root, tmp_path):
    (tmp_path / "note.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"note\.jpg'?: not a readable image"):
        list(predict.predict(bundle.load(tuned), [tmp_path / "note.jpg"]))
    Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
    said = CliRunner().invoke(predict.app, [str(tmp_path), str(tmp_path / "small.png")])
    assert isinstance(said.exception, UserError)  # which lorvp.utils.cli ends in one line, with exit code 2
    assert str(said.exception) == f"{tmp_path / 'config.json'}: not a prompt bundle (FileNotFoundError)"
