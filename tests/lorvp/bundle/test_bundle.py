from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import lorvp
from lorvp import methods
from lorvp.bundle import io as bundle
from lorvp.config import BackboneConfig
from lorvp.errors import UserError
from lorvp.models.backbone import Backbone
from lorvp.models.tiny import VIT_WEIGHTS, WEIGHTS
from lorvp.training.loop import train


@pytest.fixture
def saved(digits, tmp_path):
    results = list(train(digits(head={"kind": "fm"}), folder=tmp_path))
    return tmp_path / "bundle", results


def test_bundle_holds_what_is_needed_to_use_it(saved):
    folder, results = saved
    names = ["README.md", "config.json", "example.png", "example_prompted.png", "model.safetensors", "prompt.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    description = json.loads((folder / "config.json").read_text())
    assert description["class_names"] == [str(d) for d in range(10)]
    assert description["metrics"]["val_top1"] == max(r.val_top1 for r in results)
    assert description["source"]["mean"] == [0.5] * 3
    with Image.open(folder / "prompt.png") as picture:
        assert picture.size == (224, 224)
    plain, prompted = (np.asarray(Image.open(folder / f"example{which}.png")) for which in ("", "_prompted"))
    assert plain.shape == prompted.shape == (224, 224, 3)
    assert (plain != prompted).any()
    found = load_file(folder / "model.safetensors")
    spectrum = torch.linalg.svdvals(found["prompt.B"] @ found["prompt.A"])
    torch.testing.assert_close(torch.tensor(description["prompt"]["singular_values"]), spectrum[:, :16])


def test_a_class_of_several_source_classes_is_loaded_as_it_was(digits, tmp_path):
    """The tensor has a row for each class; with one source class a class it is what it was, a vector."""
    few = {"name": "digits", "max_classes": 5, "max_per_class": 20}
    for sources, shape in ((1, (5,)), (2, (5, 2))):
        folder = tmp_path / str(sources)
        folder.mkdir()
        (*_, last) = train(digits(dataset=few, head={"kind": "ilm", "sources_per_class": sources}), folder=folder)
        index = load_file(folder / "bundle" / "model.safetensors")["mapping.index"]
        assert (index.shape, len(index.unique())) == (shape, 5 * sources)
        model = lorvp.load(folder / "bundle")
        assert torch.equal(model.mapping.index, index)
        images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
        assert model(images).shape == (3, 5)
        assert last.test_top1 is not None
        said = (folder / "bundle" / "README.md").read_text()
        assert ("label mapping ilm of 2 source classes a class." in said) == (sources == 2)


def test_the_folder_is_one_of_the_hubs(saved):
    folder, results = saved
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "lorvp"
    assert card.data.license == "apache-2.0"
    by_split = {result.dataset_split: result.metric_value for result in card.data.eval_results}
    assert by_split == {
        "val": pytest.approx(max(r.val_top1 for r in results) / 100, abs=1e-6),
        "test": pytest.approx(results[-1].test_top1 / 100, abs=1e-6),
    }
    for value in (max(r.val_top1 for r in results), results[-1].test_top1):
        assert f"| {value:.2f} |" in card.text


@pytest.mark.parametrize("mapping", ["rlm", "flm", "ilm", "fm", "lp"])
def test_loaded_module_equals_the_trials_own(digits, tmp_path, monkeypatch, mapping):
    kept = {}
    save = bundle.save

    def spy(folder, method, *rest, **named):
        kept["method"] = method
        save(folder, method, *rest, **named)

    monkeypatch.setattr(bundle, "save", spy)
    list(train(digits(head={"kind": mapping}), folder=tmp_path))
    loaded = lorvp.load(tmp_path / "bundle")
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    with torch.inference_mode():
        expected = kept["method"](images)
        torch.testing.assert_close(loaded(images), expected, rtol=0, atol=1e-5)
        resized = loaded.backbone.prepare(images)
        torch.testing.assert_close(loaded(resized), expected, rtol=0, atol=1e-5)
        as_bytes = (resized * 255).round().byte()
        torch.testing.assert_close(loaded(as_bytes), expected, rtol=0, atol=1e-5)
    assert not loaded.training
    assert loaded.class_names == [str(d) for d in range(10)]


def test_bundles_that_cannot_be_loaded(saved):
    folder, _ = saved
    with pytest.raises(UserError, match="not a prompt bundle"):
        lorvp.load(folder.parent)
    description = json.loads((folder / "config.json").read_text())

    def write(**changes):
        (folder / "config.json").write_text(json.dumps(description | changes))

    write(format_version=99)
    with pytest.raises(UserError, match="bundle format 99"):
        lorvp.load(folder)
    write(format_version=3, config={"label_mapping": "fm"})  # of the form before parts
    with pytest.raises(UserError, match="bundle format 3, and this lorvp reads 4: tune it again, or load it with the"):
        lorvp.load(folder)
    write(source=description["source"] | {"digest": "0" * 16})
    with pytest.raises(UserError, match="tuned on other weights"):
        lorvp.load(folder)
    write(class_names=["a", "b"])
    with pytest.raises(UserError, match="don't fit together"):
        lorvp.load(folder)
    write()
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="altered since the bundle was written"):
        lorvp.load(folder)
    write(sha256=hashlib.sha256(b"\xff" * 64).hexdigest())
    with pytest.raises(UserError, match="don't fit together"):
        lorvp.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="missing from the bundle"):
        lorvp.load(folder)


def test_a_prompt_as_a_picture():
    pattern = torch.zeros(3, 16, 16)
    pattern[0, 0, 0], pattern[1, 1, 1] = 0.5, -0.5
    pixels = np.asarray(bundle.picture(pattern))
    assert pixels.shape == (224, 224, 3)
    assert pixels[0, 0, 0] == 255
    assert pixels[14, 14, 1] == 0
    assert pixels[100, 100].tolist() == [128] * 3


def test_the_quickstarts_backbone_is_small_and_says_where_it_is_from(digits):
    assert WEIGHTS.stat().st_size <= 1_000_000
    with safe_open(WEIGHTS, "pt") as weights:
        metadata = weights.metadata()
    assert metadata["command"].startswith("python -m lorvp.tiny --data")
    assert float(metadata["cifar10_test_top1"]) > 75
    backbone = Backbone(digits().backbone, "fp32")
    assert 0.25e6 < sum(p.numel() for p in backbone.parameters()) < 0.35e6


def test_the_comparisons_backbone_is_small_and_says_where_it_is_from():
    assert VIT_WEIGHTS.stat().st_size <= 1_000_000
    with safe_open(VIT_WEIGHTS, "pt") as weights:
        metadata = weights.metadata()
    assert "--model lorvp_tiny_vit_32" in metadata["command"]
    assert float(metadata["cifar10_test_top1"]) > 50
    backbone = Backbone(BackboneConfig(name="lorvp_tiny_vit_32.cifar10"), "fp32")
    assert 0.4e6 < sum(p.numel() for p in backbone.parameters()) < 0.5e6


def test_parameter_count_of_the_paper(digits):
    """10,506 with ResNet-18's head for CIFAR-10."""
    config = digits(backbone={"name": "resnet18", "pretrained": False}, prompt={"rank": 4})
    method = methods.make(config, Backbone(config.backbone, "fp32"), 10)
    assert sum(p.numel() for group in method.groups().values() for p in group) == 10506
