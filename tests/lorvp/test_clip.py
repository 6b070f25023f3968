from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorvp import clip, methods
from lorvp.config import TrialConfig
from lorvp.errors import UserError
from lorvp.models.backbone import Backbone

TOWER = {
    "name": "vit_base_patch32_clip_224.openai",
    "pretrained": False,
    "kwargs": {"depth": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 24},
}


def test_texts_are_the_source_classes(tmp_path):
    texts = torch.nn.functional.normalize(torch.randn(30, 24), dim=1)
    save_file({"texts": texts}, tmp_path / "texts.safetensors")
    values = {"backbone": TOWER | {"zero_shot": tmp_path / "texts.safetensors"}, "dataset": {"name": "digits"}}
    config = TrialConfig.model_validate(values | {"head": {"kind": "fm"}})
    backbone = Backbone(config.backbone, "fp32")
    assert backbone.source_classes == 30
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        seen = backbone.model.head[0](backbone(images, "features")).numpy()
        expected = 100 * seen / np.linalg.norm(seen, axis=1, keepdims=True) @ texts.numpy().T
        np.testing.assert_allclose(backbone(images, "logits").numpy(), expected, rtol=1e-4, atol=1e-3)
        assert methods.make(config, backbone, 10)(images).shape == (2, 10)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"texts": torch.ones(3, 7)}, "texts of width 7, and the backbone gives 24"),
        ({"a": torch.ones(1)}, "is not what"),
    ],
)
def test_other_files(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "texts.safetensors")
    values = {"backbone": TOWER | {"zero_shot": tmp_path / "texts.safetensors"}, "dataset": {"name": "digits"}}
    values["head"] = {"kind": "fm"}
    with pytest.raises(UserError, match=message):
        Backbone(TrialConfig.model_validate(values).backbone, "fp32")


def test_the_command_says_what_is_missing_or_writes_unit_vectors(tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    arguments = ["ViT-B-32", "", "--classes", str(tmp_path / "names.txt"), "--out", str(tmp_path / "out.safetensors")]
    import typer

    app = typer.Typer()
    app.command()(clip.main)
    result = CliRunner().invoke(app, arguments)
    try:
        import open_clip  # noqa: F401
    except ImportError:
        assert "pip install 'lorvp[clip]'" in str(result.exception)
        assert not (tmp_path / "out.safetensors").exists()
        return
    assert result.exit_code == 0
    texts = load_file(tmp_path / "out.safetensors")["texts"]
    assert texts.shape[0] == 2
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
