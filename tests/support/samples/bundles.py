"""Bundles of methods that have trained nothing, and whose numbers matter all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import digits_values

from lorvp import methods
from lorvp.bundle import io as bundle
from lorvp.config import TrialConfig
from lorvp.methods.base import Method
from lorvp.models.backbone import Backbone
from lorvp.result import EpochResult

RESULT = EpochResult(1, 0.5, 0.5, 50.0, 90.0, {}, 1.0, 1.0, 1.0, 0.0, {}, 0.0, 1)


def tuned(precision: str = "fp32", classes: int = 10, **changes: Any) -> Method:
    """A method whose every number that it tunes is another than at its start, so that it matters."""
    config = TrialConfig.model_validate(digits_values(**{"prompt": {"rank": 2, "inner": 200}} | changes))
    torch.manual_seed(0)  # the weights, where none are read
    method = methods.make(config, Backbone(config.backbone, precision, config.backbone_speed), classes)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if config.trains_backbone or not name.startswith("backbone."):
                parameter.add_(0.1 * torch.randn_like(parameter))
    method.class_names = [str(digit) for digit in range(classes)]
    return method.eval()


def saved(folder: Path, method: Method, precision: str = "fp32") -> Path:
    example = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    bundle.save(folder, method, method.config, precision, method.class_names, 1, [RESULT], example)
    return folder
