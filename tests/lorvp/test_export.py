"""A bundle as a program: what the written file says is what the bundle says, or there is no file."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import warm
from support.samples.bundles import saved, tuned
from typer.testing import CliRunner

import lorvp
from lorvp import export
from lorvp.errors import UserError
from lorvp.methods.base import Method

VIT = {"name": "lorvp_tiny_vit_32.cifar10"}
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "pretrained": False,
    "image_size": 56,
    "kwargs": {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16, "num_classes": 20},
}
CASES: dict[str, dict[str, Any]] = {
    "lorvp, rlm": {"head": {"kind": "rlm"}},
    "lorvp, several source classes": {"classes": 5, "head": {"kind": "flm", "sources_per_class": 2}},
    "border, flm": {"prompt": {"kind": "border"}, "head": {"kind": "flm"}},
    "full_image, fm": {"prompt": {"kind": "full_image"}, "head": {"kind": "fm"}},
    "lorvp, vit": {"backbone": VIT},
    "ilm_vp, ilm": {"head": {"kind": "ilm"}},
    "autovp": {"prompt": {"inner": 200, "scale": 0.8}},
    "autovp, fixed": {"prompt": {"scale": 0.75, "learn_scale": False}},
    "evp": {},
    "acavp": {},
    "acavp, low rank": {"prompt": {"additive": "low_rank"}},
    "vpt": {"backbone": VIT, "adapter": {"count": 3}},
    "vpt, swin": {"backbone": SWIN, "adapter": {"count": 3, "deep": False, "dropout": 0.5}},
    "vpt, cnn": {"adapter": {"count": 3, "deep": False}},
    "vqt": {"backbone": VIT, "adapter": {"count": 2, "dropout": 0.5}},
    "lorvp+vpt": {"backbone": VIT, "adapter": {"count": 3}},
    "linear_probe": {},
    "fine_tuning": {},
}


def loaded(case: str, folder: Path) -> Method:
    """Of a bundle; a backbone without weights is another whenever it is made, and can't be in one."""
    values = {"method": case.split(",")[0]} | CASES[case]
    method = tuned(**values)
    return method if values.get("backbone") is SWIN else lorvp.load(saved(folder / "bundle", method))


def run(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The two lines that the command prints."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def pixels(count: int, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("to", ["torch-export", "onnx"])
def test_the_file_says_what_the_bundle_says(case, to, tmp_path):
    method = loaded(case, tmp_path)
    out = tmp_path / export.USE[to][0]
    deviation = export.export(method, to, out)
    assert 0 <= deviation <= 1e-4
    program = run(out)
    for count in (1, 3, 17):
        images = pixels(count, method.side)
        with torch.inference_mode():
            expected = method(images)
        logits = program(images)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * max(1, expected.abs().max().item()))
        assert expected.abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_exported_as_fp32(precision, tmp_path):
    method = lorvp.load(saved(tmp_path / "bundle", tuned(precision), precision))
    export.export(method, "torch-export", tmp_path / "model.pt2")
    images = pixels(16)
    logits = run(tmp_path / "model.pt2")(images)
    with torch.inference_mode():
        torch.testing.assert_close(logits, tuned("fp32")(images), rtol=0, atol=1e-4)
        own = method(images)  # still in the trial's
    assert 1e-4 < (own - logits).abs().max() < 0.1


@pytest.mark.slow
def test_mlflow_loads_it_and_it_says_what_it_is(tmp_path):
    """MLflow refuses files that may hold pickles."""
    import mlflow.pytorch
    import onnx

    method = tuned()
    export.export(method, "torch-export", tmp_path / "model.pt2")
    images = pixels(3)
    with torch.inference_mode():
        torch.testing.assert_close(mlflow.pytorch._load_model(str(tmp_path))(images), method(images))
    extra = {export.ABOUT: ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    expected = {"class_names": method.class_names, "image_size": 32, "trial": method.config.content_hash()}
    assert json.loads(extra[export.ABOUT]) == expected
    export.export(method, "onnx", tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.pt2"]  # nothing beside them
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert found == expected | {"class_names": json.dumps(method.class_names), "image_size": "32"}
    (images,), (logits,) = model.graph.input, model.graph.output
    shapes = [[d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim] for each in (images, logits)]
    assert (images.name, logits.name, shapes) == ("images", "logits", [["N", 3, 32, 32], ["N", 10]])


@pytest.mark.slow
def test_a_program_that_says_something_else_is_refused(tmp_path, monkeypatch):
    method, out = tuned(), tmp_path / "model.pt2"
    read = export._read_program
    wrong: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "0.001": lambda logits: logits + 1e-3 * logits.abs().max().clamp(min=1),
        "nan": lambda logits: logits.where(torch.arange(10) != 3, math.nan),
        "inf": lambda logits: logits[:, :1],
    }
    for deviation, change in wrong.items():
        monkeypatch.setattr(export, "_read_program", lambda path, change=change: lambda x: change(read(path)(x)))
        with pytest.raises(UserError, match=f"not written: logits deviate from the bundle's by {deviation}, 1e-04"):
            export.export(method, "torch-export", out)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command(tmp_path):
    """In a process of its own, and the lines that it prints in another, without this package."""
    saved(tmp_path / "bundle", tuned())
    said = warm.run(["-m", "lorvp.export", "bundle", "--to", "torch-export"], tmp_path, dict(os.environ))
    assert (said.returncode, said.stderr) == (0, "")
    written, deviation, *lines = said.stdout.splitlines()
    size = (tmp_path / "model.pt2").stat().st_size
    assert written == f"written: model.pt2, {size / 2**20:.2f} MiB"
    assert deviation.startswith("its logits are the bundle's, in fp32: the largest deviation is ")
    assert len(lines) == 2
    script = ["import sys, torch", "images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)", *map(str.strip, lines)]
    script += ["print(*logits.shape, 'lorvp' in sys.modules)"]
    ran = warm.run(["-c", "\n".join(script)], tmp_path, dict(os.environ))
    assert ran.stdout == "4 10 False\n", ran.stderr


def test_what_can_not_be_exported(tmp_path, monkeypatch):
    said = CliRunner().invoke(export.app, [str(tmp_path), "--to", "onnx"])
    assert isinstance(said.exception, UserError)
    assert "not a prompt bundle" in str(said.exception)
    assert CliRunner().invoke(export.app, [str(tmp_path), "--to", "tflite"]).exit_code == 2
    method = tuned()
    with pytest.raises(UserError, match=r"nowhere/model\.pt2: can't be written \(No such file or directory\)"):
        export.export(method, "torch-export", tmp_path / "nowhere" / "model.pt2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(UserError, match=r'--to onnx needs onnxscript: pip install "lorvp\[onnx\]"'):
        export.export(method, "onnx", tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_backbone_that_can_not_be_traced(tmp_path, monkeypatch):
    method = tuned()
    monkeypatch.setattr(method.backbone.model, "forward_features", lambda x: x * x.sum().item())
    with pytest.raises(UserError, match=r"^lorvp on lorvp_tiny_32.cifar10 can't be exported: .+"):
        export.export(method, "torch-export", tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
