"""What only a GPU can show."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import make
from PIL import Image

import lorvp
from lorvp.bench.__main__ import CLASSES, measured_peak
from lorvp.config import DatasetConfig
from lorvp.data import datasets, loader
from lorvp.data.resize import resize
from lorvp.estimate.memory import predict
from lorvp.training.checkpoint import CHECKPOINT
from lorvp.training.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mapping", ["ilm", "lp"])
def test_a_trial_on_the_gpu(digits, tmp_path, precision, mapping):
    """Learns, continues from its checkpoint, and its bundle gives the same on the GPU."""
    parts = {"prompt": {"optimizer": "sgd", "lr": 0.5}, "head": {"kind": mapping}}
    config = digits(precision=precision, **parts, optimizer={"lr": 0.5, "clip_grad_norm": 1.0}, epochs=4)
    results = list(train(config, folder=tmp_path))
    assert results[-1].train_loss < results[0].train_loss
    assert all(math.isfinite(r.val_loss) for r in results)
    assert list(train(config, resume_from=tmp_path / CHECKPOINT)) == results
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, device="cuda")
    model = lorvp.load(tmp_path / "bundle", device="cuda")
    with torch.inference_mode():
        assert model(images).isfinite().all()
        torch.testing.assert_close(model(images), model(images.cpu().cuda()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [28, 32, 64, 300])
def test_resizing_on_the_gpu_is_pils(side):
    images = np.random.default_rng(0).integers(0, 256, (5, side, side, 3), dtype=np.uint8)
    expected = [np.asarray(Image.fromarray(i).resize((224, 224), Image.Resampling.BILINEAR)) for i in images]
    resized = resize(torch.from_numpy(images).permute(0, 3, 1, 2).cuda(), 224)
    assert np.array_equal(resized.permute(0, 2, 3, 1).cpu().numpy(), np.stack(expected))


@pytest.mark.parametrize("kept", [False, True])
def test_batches_arrive_as_they_were_sent(image_root, tmp_path, kept):
    """Copied beside the work on the batch before, and its memory not used again too early."""
    folder = make("image_folder", image_root, tmp_path, size=64).folder
    splits = datasets.load(DatasetConfig(name="store", root=folder, val_fraction=0.25), 64)
    device = torch.device("cuda")
    there = loader.cache_on_device(splits, device, fraction=0.5 if kept else 0.0)
    assert isinstance(there.train, datasets.ArrayImages) == kept
    for epoch in range(20):
        order = loader.epoch_order(len(splits.train), 0, epoch)
        expected = loader.batches(splits.train, 4, order)
        for (pixels, labels), (ours, our_labels) in zip(
            expected, loader.batches(there.train, 4, order, device), strict=True
        ):
            busy = ours.float().repeat(64, 1, 1, 1)
            for _ in range(20):
                busy = busy.sin()
            assert torch.equal(ours.cpu(), pixels)
            assert torch.equal(our_labels.cpu(), labels)


def test_counts_of_a_recount_stay_under_200_mib():
    from lorvp.mappings.base import count

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    counts = torch.zeros(21841, 1000, dtype=torch.int32, device="cuda")
    for _ in range(3):
        count(counts, torch.randn(64, 21841, device="cuda").argmax(1), torch.randint(1000, (64,), device="cuda"))
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["resnet18", "vit_small_patch16_224", "convnext_tiny"])
def test_a_trial_takes_the_memory_that_was_predicted(digits, name, precision):
    """Workspaces of cuDNN and cuBLAS are not predicted: the batch is large enough for them to be a small part."""
    backbone = {"name": name, "pretrained": False}
    config = digits(backbone=backbone, precision=precision, epochs=1, batch_size=128, eval_batch_size=128)
    assert predict(config, CLASSES).peak == pytest.approx(measured_peak(config, torch.device("cuda"))[0], rel=0.25)
