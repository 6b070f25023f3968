"""Fine-tuning: the backbone itself is trained."""

from __future__ import annotations

from torch import nn

from lorvp.config import TrialConfig
from lorvp.methods.base import Method
from lorvp.models.backbone import Backbone


class FineTuning(Method):
    """Everything is trained, the loaded backbone itself; BatchNorm's statistics stay."""

    def __init__(self, config: TrialConfig, backbone: Backbone, classes: int) -> None:
        super().__init__(config, backbone, classes)
        backbone.model.requires_grad_(True)
        if self.mapping.input == "features":
            backbone.model.get_classifier().requires_grad_(False)  # nothing reads it

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return all of the backbone that the output depends on."""
        return [parameter for parameter in self.backbone.model.parameters() if parameter.requires_grad]
