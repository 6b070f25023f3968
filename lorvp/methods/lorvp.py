"""LoR-VP: an input prompt before a frozen backbone."""

from __future__ import annotations

import torch
from torch import nn

from lorvp.config import TrialConfig
from lorvp.methods.base import Method
from lorvp.models.backbone import Backbone
from lorvp.prompts.base import Prompt
from lorvp.utils import plugins


class LoRVP(Method):
    """An input prompt, low-rank unless the config says otherwise, added before the backbone (LoR-VP, section 3)."""

    def __init__(self, config: TrialConfig, backbone: Backbone, classes: int) -> None:
        super().__init__(config, backbone, classes)
        with torch.random.fork_rng():
            torch.manual_seed(config.init_seed)
            self.prompt = self.make_prompt()

    def make_prompt(self) -> Prompt:
        """Build the prompt of `prompt.kind`, at its start."""
        kind: type[Prompt] = plugins.load("prompts", self.config.prompt.kind)
        return kind(self.config.prompt, self.backbone.image_size)

    def is_identity_at_init(self) -> bool:
        """Return whether the prompt is zero at its start."""
        return super().is_identity_at_init() and not self.prompt.pattern().any()

    @property
    def side(self) -> int:
        """Return the side of the images that the prompt takes, in pixels."""
        return self.prompt.side

    def transform_input(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (N, 3, L, L) where the prompt places them."""
        return self.prompt.transform_input(super().transform_input(images))

    def input_prompt(self) -> torch.Tensor:
        """Return the prompt's pattern, (3, L, L)."""
        return self.prompt.pattern()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the prompt's parameters and the head's."""
        return {"prompt": list(self.prompt.parameters())} | super().groups()
