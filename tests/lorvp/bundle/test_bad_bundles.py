"""Bundles and images that are broken, or meant to break: one line that says so, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make, photo
from PIL import Image
from safetensors.torch import load_file, save_file
from support.samples.bundles import saved, tuned
from typer import Typer
from typer.testing import CliRunner

from lorvp import evaluate, export, predict
from lorvp.bundle.format import DESCRIPTION, TENSORS, digest
from lorvp.errors import UserError
from lorvp.utils import cli

Defect = Callable[[Path], Any]


def header(values: Any, rest: bytes = b"") -> bytes:
    """A safetensors file with that header."""
    encoded = json.dumps(values).encode()
    return struct.pack("<Q", len(encoded)) + encoded + rest


def one(**changes: Any) -> bytes:
    """A safetensors file of one tensor, described otherwise than it is."""
    prompt = {"dtype": "F32", "shape": [3, 32, 2], "data_offsets": [0, 768]}
    return header({"prompt.B": prompt | changes}, bytes(768))


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Defect:
    def write(path: Path) -> None:
        tensors = load_file(path)
        save_file(tensors | {name: change(tensors[name])}, path)

    return write


def without(name: str) -> Defect:
    return lambda path: save_file({key: value for key, value in load_file(path).items() if key != name}, path)


def key(name: str, value: Any) -> Defect:
    """Another value in the JSON, or with `...` none."""
    *parents, last = name.split(".")

    def write(path: Path) -> None:
        description = json.loads(path.read_text())
        part = description
        for parent in parents:
            part = part[parent]
        part[last] = value
        if value is ...:
            del part[last]
        path.write_text(json.dumps(description))

    return write


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


UNFIT = "don't fit together"
TENSOR_DEFECTS: dict[str, tuple[Defect, str]] = {
    "header of 2**60 bytes": (lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}"), "header too large"),
    "header longer than the file": (lambda path: path.write_bytes(struct.pack("<Q", 4096) + b"{}"), "header length"),
    "header no JSON": (lambda path: path.write_bytes(struct.pack("<Q", 8) + b"not json"), "invalid JSON"),
    "header no UTF-8": (lambda path: path.write_bytes(struct.pack("<Q", 8) + b"\xff" * 8), "UTF-8"),
    "header a list": (lambda path: path.write_bytes(header([1, 2])), "invalid JSON"),
    "offsets outside": (lambda path: path.write_bytes(one(data_offsets=[0, 2**40])), UNFIT),
    "offsets backwards": (lambda path: path.write_bytes(one(data_offsets=[768, 0])), UNFIT),
    "shape larger than the data": (lambda path: path.write_bytes(one(shape=[2**31, 2**31, 2])), UNFIT),
    "unknown dtype": (lambda path: path.write_bytes(one(dtype="F1")), "F1"),
    "empty": (lambda path: path.write_bytes(b""), "header too small"),
    "truncated": (cut, "incomplete metadata"),
    "missing": (Path.unlink, "missing from the bundle (No such file or directory)"),
    "a folder": (folder, "missing from the bundle (Is a directory)"),
    "of another image size": (
        tensor("prompt.B", lambda prompt: torch.zeros(3, 64, 2)),
        "(prompt.B is float32 [3, 64, 2], and should be float32 [3, 32, 2])",
    ),
    "of another rank": (tensor("prompt.A", lambda prompt: prompt[:, :1].clone()), "should be float32 [3, 2, 32]"),
    "of another dtype": (tensor("prompt.B", torch.Tensor.half), "(prompt.B is float16 [3, 32, 2], and should be"),
    "of other classes": (tensor("mapping.index", lambda index: index + 5), "the backbone's 10 classes"),
    "of negative classes": (tensor("mapping.index", lambda index: index - 10), "the backbone's 10 classes"),
    "without the prompt": (without("prompt.B"), "missing ['prompt.B']"),
    "with more": (lambda path: save_file(load_file(path) | {"more": torch.zeros(1)}, path), "unexpected ['more']"),
}
JSON_DEFECTS: dict[str, tuple[Defect, str]] = {
    "a list": (lambda path: path.write_text("[]"), "not a prompt bundle"),
    "null": (lambda path: path.write_text("null"), "not a prompt bundle"),
    "empty": (lambda path: path.write_bytes(b""), "not a prompt bundle"),
    "no UTF-8": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "not a prompt bundle"),
    "truncated": (cut, "not a prompt bundle"),
    "missing": (Path.unlink, "not a prompt bundle"),
    "a folder": (folder, "not a prompt bundle"),
    "another version": (key("format_version", 99), "bundle format 99"),
    "nested without end": (lambda path: path.write_text("[" * 100_000), "not a prompt bundle (RecursionError)"),
    "no config": (key("config", ...), f"{DESCRIPTION}: config: this key is missing"),
    "config a text": (key("config", "x"), f"{DESCRIPTION}: config: "),
    "config with an unknown key": (key("config.more", 1), f"{DESCRIPTION}: config.more: no such key"),
    "config of a text for a size": (key("config.backbone.image_size", "large"), "config.backbone.image_size: "),
    "config of another image size": (key("config.backbone.image_size", 64), "should be float32 [3, 2, 64])"),
    "config of another rank": (key("config.prompt.rank", 3), "should be float32 [3, 3, 32])"),
    "config of more source classes": (key("config.head.sources_per_class", 2), "needs 20 source classes for the 10"),
    "config of no backbone": (key("config.backbone.name", "no_such_net"), "timm has no model 'no_such_net'"),
    "a class less": (key("class_names", ["a"] * 9), UNFIT),
    "no class": (key("class_names", []), f"{DESCRIPTION}: class_names: "),
    "no class names": (key("class_names", ...), f"{DESCRIPTION}: class_names: this key is missing"),
    "class names a number": (key("class_names", 10), f"{DESCRIPTION}: class_names: "),
    "class names a text": (key("class_names", "abcdefghij"), f"{DESCRIPTION}: class_names: "),
    "class names numbers": (key("class_names", list(range(10))), f"{DESCRIPTION}: class_names.0: "),
    "no source": (key("source", ...), f"{DESCRIPTION}: source: this key is missing"),
    "source a list": (key("source", []), f"{DESCRIPTION}: source: "),
    "unknown precision": (key("source.precision", "fp64"), f"{DESCRIPTION}: source.precision: "),
    "precision a list": (key("source.precision", []), f"{DESCRIPTION}: source.precision: "),
    "no digest of the backbone": (key("source.digest", ...), f"{DESCRIPTION}: source.digest: this key is missing"),
    "another backbone": (key("source.digest", "0" * 16), "tuned on other weights"),
    "no digest": (key("sha256", ...), "altered since the bundle was written"),
}


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that has an index map and a prompt of rank 2 for 32 pixels."""
    return saved(tmp_path_factory.mktemp("good") / "bundle", tuned(head={"kind": "rlm"}))


@pytest.fixture
def copy(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "bundle"))


@pytest.fixture
def said(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """What a command says on stderr, which must be one line, with exit code 2 and nothing else."""

    def run(app: Typer, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["lorvp", *map(str, arguments)])
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.run(app)
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


def sign(bundle: Path) -> None:
    """Makes the digest that of the tensors as they are, as who means harm would."""
    key("sha256", digest(bundle / TENSORS))(bundle / DESCRIPTION)


def spoil(bundle: Path, defect: Defect) -> None:
    defect(bundle / TENSORS)
    if (bundle / TENSORS).is_file():
        sign(bundle)


@pytest.mark.parametrize("case", TENSOR_DEFECTS)
def test_tensors(case, copy, said, tmp_path):
    defect, reason = TENSOR_DEFECTS[case]
    spoil(copy, defect)
    photo(tmp_path / "image.png")
    found = said(predict.app, copy, tmp_path / "image.png")
    assert str(copy) in found
    assert reason in found


@pytest.mark.parametrize("case", JSON_DEFECTS)
def test_descriptions(case, copy, said, tmp_path):
    defect, reason = JSON_DEFECTS[case]
    defect(copy / DESCRIPTION)
    photo(tmp_path / "image.png")
    assert reason in said(predict.app, copy, tmp_path / "image.png")


@pytest.mark.slow
def test_the_other_commands_say_the_same(copy, said, tmp_path, image_root):
    store = make("image_folder", image_root, tmp_path, size=32).folder
    spoil(copy, TENSOR_DEFECTS["of another image size"][0])
    expected = f"error: {copy}: a bundle whose parts are missing or don't fit together (prompt.B is float32 [3, 64, 2]"
    assert said(evaluate.app, copy, "--data", store).startswith(expected)
    assert said(export.app, copy, "--to", "torch-export", "--out", tmp_path / "model.pt2").startswith(expected)
    cut(copy / TENSORS)
    expected = f"error: {copy / TENSORS}: altered since the bundle was written; copy the bundle again\n"
    assert said(evaluate.app, copy, "--data", store) == expected
    assert said(export.app, copy, "--to", "torch-export", "--out", tmp_path / "model.pt2") == expected


def test_data_that_a_bundle_can_not_be_evaluated_on(good, said, tmp_path, image_root):
    other = make("image_folder", image_root, tmp_path, size=16).folder
    assert "16" in said(evaluate.app, good, "--data", other)
    store = make("image_folder", image_root, tmp_path, size=32).folder
    assert "3 of its classes are not the bundle's: n01, n02, n03" in said(evaluate.app, good, "--data", store)
    assert f"{good}: no prepared dataset" in said(evaluate.app, good, "--data", good)


@pytest.mark.slow
def test_a_table_that_can_not_be_written(copy, tmp_path, image_root):
    store = make("image_folder", image_root, tmp_path, size=32).folder
    key("class_names", ["n01", "n02", "n03", *"abcdefg"])(copy / DESCRIPTION)
    arguments = [str(copy), "--data", str(store), "--out", str(tmp_path / "nowhere" / "found.parquet")]
    shown = CliRunner().invoke(evaluate.app, arguments)
    assert "image_folder-32" in shown.output  # what was measured is not lost
    assert isinstance(shown.exception, UserError)
    assert str(shown.exception).startswith(f"{tmp_path / 'nowhere' / 'found.parquet'}: can't be written (")
    assert "None" not in str(shown.exception)


def truncated(path: Path, format: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


IMAGE_DEFECTS: dict[str, Defect] = {
    "text": lambda path: path.write_text("no image"),
    "empty": lambda path: path.write_bytes(b""),
    "folder": Path.mkdir,
    "missing": lambda path: None,
    "only a header": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0"),
    "truncated JPEG": lambda path: truncated(path, "JPEG"),
    "truncated PNG": lambda path: truncated(path, "PNG"),
    "truncated AVIF": lambda path: truncated(path, "AVIF"),  # of which PIL raises a RuntimeError
    "another file": lambda path: path.write_bytes(one()),
}


@pytest.mark.parametrize("case", IMAGE_DEFECTS)
def test_images(case, good, said, tmp_path):
    """Of several images none is told about where one can't be read."""
    photo(tmp_path / "good.png")
    IMAGE_DEFECTS[case](tmp_path / "image.jpg")
    found = said(predict.app, good, tmp_path / "good.png", tmp_path / "image.jpg")
    assert found.startswith(f"error: '{tmp_path / 'image.jpg'}': not a readable image (")
