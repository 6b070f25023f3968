"""What only a GPU can show."""

from __future__ import annotations

import math

import pytest
import torch

import lorvp
from lorvp.training import CHECKPOINT, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mapping", ["ilm", "lp"])
def test_a_trial_on_the_gpu(digits, tmp_path, precision, mapping):
    """Learns, continues from its checkpoint, and its bundle gives the same on the GPU."""
    config = digits(precision=precision, label_mapping=mapping, optimizer={"lr": 0.5, "clip_grad_norm": 1.0}, epochs=4)
    results = list(train(config, folder=tmp_path))
    assert results[-1].train_loss < results[0].train_loss
    assert all(math.isfinite(r.val_loss) for r in results)
    assert list(train(config, resume_from=tmp_path / CHECKPOINT)) == results
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, device="cuda")
    model = lorvp.load(tmp_path / "bundle", device="cuda")
    with torch.inference_mode():
        assert model(images).isfinite().all()
        torch.testing.assert_close(model(images), model(images.cpu().cuda()), rtol=0, atol=1e-5)


def test_counts_of_a_recount_stay_under_200_mib():
    from lorvp.mapping import count_matrix

    def batches():
        for _ in range(3):
            yield torch.randn(64, 21841, device="cuda"), torch.randint(1000, (64,), device="cuda")

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    count_matrix(batches(), 21841, 1000, torch.device("cuda"))
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20
