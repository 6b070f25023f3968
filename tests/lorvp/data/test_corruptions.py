"""Corrupted images, beside NumPy's, SciPy's and PIL's own ways to them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from lorvp.data import resize
from lorvp.data.corruptions import CORRUPTIONS, KINDS, Corruption

SIDE = 48


@pytest.fixture
def images() -> torch.Tensor:
    """Smooth colours with an edge in them, (3, 3, 48, 48) uint8."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 3, 5, 5), dtype=np.uint8)
    smooth = resize.resize(torch.from_numpy(coarse), SIDE)
    smooth[..., :20] = 255 - smooth[..., :20]
    return smooth


def expected(image: np.ndarray, corruption: Corruption) -> np.ndarray:
    """What ImageNet-C's definitions make of one image, (H, W, 3) uint8; of noise nothing."""
    parameter = corruption.parameter(SIDE)
    x = image / 255
    if corruption.kind == "blur":
        x = gaussian_filter(x, sigma=(parameter, parameter, 0), mode="nearest", truncate=4)
    elif corruption.kind == "contrast":
        x = (x - x.mean((0, 1))) * parameter + x.mean((0, 1))
    else:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(parameter))
        return np.asarray(Image.open(file))
    return np.rint(255 * x)


@pytest.mark.parametrize("corruption", [c for c in CORRUPTIONS if c.kind != "noise"], ids=str)
def test_what_imagenet_c_defines(images: torch.Tensor, corruption: Corruption):
    found = corruption(images, range(3))
    assert (found.dtype, found.shape) == (torch.uint8, images.shape)
    for before, after in zip(images, found, strict=True):
        wanted = expected(before.permute(1, 2, 0).contiguous().numpy(), corruption)
        # float32 and float64 may round a half to different sides
        assert np.abs(after.permute(1, 2, 0).numpy() - wanted.astype(float)).max() <= (corruption.kind != "jpeg")
    assert not torch.equal(found, images)


def test_noise_is_that_of_the_image_and_not_of_the_batch():
    """Whatever stands beside it; another image, another seed: another noise."""
    grey = torch.full((4, 3, SIDE, SIDE), 128, dtype=torch.uint8)
    corruption = Corruption("noise", 1)
    whole = corruption(grey, [10, 11, 12, 13])
    assert torch.equal(corruption(grey[:2], [12, 10]), whole[[2, 0]])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(corruption(grey, [10, 11, 12, 13], seed=1), whole)
    assert ((whole.float() - 128) / 255).std().item() == pytest.approx(0.04, rel=0.03)
    assert ((whole.float() - 128) / 255).mean().item() == pytest.approx(0, abs=0.002)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stronger_one_is_further_away(images: torch.Tensor, kind: str):
    away = [
        (Corruption(kind, strength)(images, range(3)).float() - images.float()).abs().mean() for strength in (1, 2, 3)
    ]
    assert away == sorted(set(away))


def test_parameters_of_other_sizes():
    """Those of the nearest that is known; a blur is as wide in the picture."""
    assert [Corruption("jpeg", 3).parameter(side) for side in (28, 32, 64, 112, 128, 224, 384)] == [
        40,
        40,
        25,
        25,
        7,
        7,
        7,
    ]
    assert [Corruption("blur", 2).parameter(side) for side in (32, 64, 224, 448)] == [0.7, 1, 3, 6]
