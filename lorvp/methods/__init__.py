"""Ways to adapt a backbone. A file each, found by name (`method`); the trial's loop knows none of them."""

from __future__ import annotations

from lorvp.config import TrialConfig
from lorvp.methods.base import Method
from lorvp.models.backbone import Backbone
from lorvp.utils import plugins


def make(config: TrialConfig, backbone: Backbone, classes: int) -> Method:
    """Build the method of `config`; `lorvp+vpt` is both at once, as each leaves to the next what it does not change.

    Raises UserError for a backbone that it can't work on.
    """
    parts: list[type[Method]] = [plugins.load("methods", name) for name in config.methods]
    kind: type[Method] = type(config.method, tuple(parts), {}) if len(parts) > 1 else parts[0]
    return kind(config, backbone, classes)
