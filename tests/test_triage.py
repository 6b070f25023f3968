"""The score that says beforehand whether a prompt is worth it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from lorvp import training, triage


@pytest.mark.parametrize(("count", "width"), [(40, 6), (12, 20), (30, 30)])
def test_logme_is_the_largest_evidence(count, width):
    """Of the Gaussian that the two precisions make of the labels, whatever the precisions."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 2
    x = random.normal(size=(count, width)) + labels[:, None]
    precisions = [(alpha, beta) for alpha in np.logspace(-3, 5, 25) for beta in np.logspace(-2, 4, 30)]

    def evidence(y: np.ndarray, alpha: float, beta: float) -> float:
        covariance = np.eye(count) / beta + x @ x.T / alpha
        return multivariate_normal(cov=covariance).logpdf(y) / count

    expected = np.mean([max(evidence((labels == c) * 1.0, *each) for each in precisions) for c in (0, 1)])
    assert triage.logme(torch.from_numpy(x), torch.from_numpy(labels)) == pytest.approx(expected, abs=0.02)


def test_features_that_tell_the_classes_apart_score_higher():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    noise = torch.randn(300, 10, generator=random)
    scores = [triage.logme(noise + gap * torch.eye(10)[labels], labels) for gap in (0, 1, 3)]
    assert scores == sorted(scores)


def test_the_nearest_of_a_rank():
    random = torch.Generator().manual_seed(0)
    made = torch.randn(3, 16, 2, generator=random) @ torch.randn(3, 2, 16, generator=random)
    torch.testing.assert_close(triage.low_rank(made, 2), made)
    assert torch.linalg.matrix_rank(triage.low_rank(torch.randn(3, 16, 16), 4)).tolist() == [4, 4, 4]


@pytest.mark.slow
def test_a_prompt_is_found_worth_it_on_digits(digits):
    config = digits(dataset={"name": "digits", "val_fraction": 0.2})
    found = triage.triage(config, training.load(config))
    assert len(found.prompted) == 6
    assert found.log_ratio == max(found.prompted.values()) - found.plain
    assert found.best.startswith("gradient")
    assert found.log_ratio > 0
