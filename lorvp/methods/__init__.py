"""Methods: a prompt, an adapter and a head on a backbone. The trial's loop knows none of their kinds."""

from __future__ import annotations

from lorvp.config import TrialConfig
from lorvp.methods.base import Method
from lorvp.models.backbone import Backbone
from lorvp.utils import plugins


def make(config: TrialConfig, backbone: Backbone, classes: int) -> Method:
    """Build the method of `config`, at its start. Raises UserError for a backbone that it can't work on."""
    adapter: type[Method] = plugins.load(f"lorvp.adapters.{config.adapter.kind}.adapter")
    return adapter(config, backbone, classes)
