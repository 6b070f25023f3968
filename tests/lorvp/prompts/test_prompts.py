from __future__ import annotations

import math

import pytest
import torch

from lorvp.errors import UserError
from lorvp.prompts.base import initialise
from lorvp.prompts.border.config import BorderConfig
from lorvp.prompts.border.prompt import BorderPrompt
from lorvp.prompts.full_image.config import FullImageConfig
from lorvp.prompts.full_image.prompt import FullImagePrompt
from lorvp.prompts.low_rank.config import LowRankConfig
from lorvp.prompts.low_rank.prompt import LowRankPrompt


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_low_rank_prompt_as_published():
    prompt = LowRankPrompt(LowRankConfig(rank=4), 224)
    assert count(prompt) == 5376
    assert prompt.B.shape == (3, 224, 4)
    assert prompt.A.shape == (3, 4, 224)
    assert prompt.B.abs().max() == 0
    assert prompt.A.std().item() == pytest.approx(0.01, rel=0.05)
    assert not prompt.pattern().any()


def test_low_rank_prompt_has_its_rank_and_is_not_clamped():
    prompt = LowRankPrompt(LowRankConfig(rank=3, init_b="normal", init_a="normal", init_std=1), 33)
    assert all(torch.linalg.matrix_rank(channel) == 3 for channel in prompt.pattern())
    torch.testing.assert_close(prompt.pattern()[1], prompt.B[1] @ prompt.A[1])
    assert prompt.pattern().abs().max() > 1


def test_gradient_of_a_is_zero_at_the_start():
    prompt = LowRankPrompt(LowRankConfig(), 16)
    (prompt.pattern() * torch.randn(3, 16, 16)).sum().backward()
    assert prompt.A.grad.abs().max() == 0
    assert prompt.B.grad.abs().max() > 0


@pytest.mark.parametrize(("init", "bound"), [("xavier", math.sqrt(6 / (200 + 5))), ("kaiming", math.sqrt(6 / 5))])
def test_fans_are_those_of_the_factor_matrices(init, bound):
    """B's channels are 200 x 5 matrices: fan_in 5, fan_out 200."""
    tensor = initialise(torch.empty(3, 200, 5), init, 0.01)
    assert 0.97 * bound < tensor.abs().max() <= bound


def test_other_inits():
    assert 0.0099 < initialise(torch.empty(3, 50, 50), "uniform", 0.01).abs().max() <= 0.01
    with pytest.raises(ValueError, match="unknown init 'orthogonal'; one of zero, normal"):
        initialise(torch.empty(3, 2, 2), "orthogonal", 0.01)


def test_border_prompt_as_its_paper_counts_it():
    prompt = BorderPrompt(BorderConfig(init="normal"), 224)
    assert count(prompt) == 69840
    pattern = prompt.pattern()
    assert pattern.shape == (3, 224, 224)
    assert (pattern[:, 30:-30, 30:-30] == 0).all()
    assert (pattern != 0).sum() == count(prompt)
    assert count(BorderPrompt(BorderConfig(), 32)) == 12 * 4 * (32 - 4)
    with pytest.raises(UserError, match="below 112"):
        BorderPrompt(BorderConfig(pad=112), 224)


def test_full_image_prompt():
    assert count(FullImagePrompt(FullImageConfig(), 224)) == 3 * 224 * 224
