"""The score that says beforehand whether a prompt is worth it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from lorvp import training, triage


def test_logme_is_the_largest_evidence():
    """Of the Gaussian that the two precisions make of the labels, whatever the precisions; more images or less."""
    random = np.random.default_rng(0)
    for count, width in ((40, 6), (12, 20)):
        x = random.normal(size=(count, width))
        labels = np.arange(count) % 2
        found = triage.logme(torch.from_numpy(x), torch.from_numpy(labels))

        def evidence(alpha: float, beta: float) -> float:
            covariance = np.eye(count) / beta + x @ x.T / alpha  # noqa: B023
            ours = [multivariate_normal(cov=covariance).logpdf((labels == c) * 1.0) for c in (0, 1)]  # noqa: B023
            return np.mean(ours) / count  # noqa: B023

        grid = [evidence(alpha, beta) for alpha in np.logspace(-2, 4, 40) for beta in np.logspace(-2, 3, 40)]
        assert found == pytest.approx(max(grid), abs=0.02)


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


def test_a_prompt_is_found_worth_it_on_digits(digits):
    config = digits(dataset={"name": "digits", "val_fraction": 0.2})
    found = triage.triage(config, training.load(config))
    assert len(found.prompted) == 6
    assert found.log_ratio == max(found.prompted.values()) - found.plain
    assert found.best.startswith("gradient")
    assert found.log_ratio > 0
