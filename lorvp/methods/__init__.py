"""Ways to adapt a frozen backbone. A file each, found by name (`method`); the trial's loop knows none of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lorvp import distributed
from lorvp.backbone import Backbone
from lorvp.config import TrialConfig
from lorvp.mapping import MAPPINGS, count_matrix, greedy_matching
from lorvp.pipeline import Batches


class Method(nn.Module):
    """A frozen backbone, read by a label mapping. A subclass adds what it trains before, within or after it.

    Its starting values are drawn with the config's init seed, the mapping's apart from the rest, so that methods with
    the same mapping start from the same head.
    """

    def __init__(self, config: TrialConfig, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classes = classes
        with torch.random.fork_rng():
            torch.manual_seed(config.init_seed)
            self.mapping = MAPPINGS[config.label_mapping](backbone.source_classes, backbone.features, classes)

    def added(self) -> torch.Tensor | None:
        """The method's input prompt, if it has one: (3, L, L), in units of pixels in [0, 1]."""
        return None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images of any size, uint8 or float in [0, 1], (N, 3, H, W), to downstream logits (N, classes) float32."""
        return self.mapping(self.backbone(self.backbone.prepare(images), self.mapping.reads, self.added()))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the learning rate they take: `prompt` and `head`, those that are not empty."""
        head = list(self.mapping.parameters())
        return {"head": head} if head else {}

    def start_epoch(self, epoch: int, batches: Callable[[], Batches]) -> None:
        """Called before each epoch, from 1 on: makes the label mapping anew where it is one that counts.

        `batches` starts a pass over the training images, on the device; of several processes each sees its share.
        """
        if self.mapping.recount == "epoch" or (self.mapping.recount == "once" and epoch == 1):
            with torch.inference_mode():
                added = self.added() if self.mapping.recount == "epoch" else None
                seen = (
                    (self.backbone(self.backbone.prepare(images), "logits", added), labels)
                    for images, labels in batches()
                )
                device = self.backbone.mean.device
                counts = count_matrix(seen, self.backbone.source_classes, self.classes, device)
            self.mapping.index.copy_(greedy_matching(distributed.total(counts)))

    def tuned(self) -> dict[str, torch.Tensor]:
        """All that was chosen or learned, by name, on the CPU: what a bundle stores. The backbone is not in it."""
        return {
            name: tensor.detach().cpu().clone()
            for name, tensor in self.state_dict().items()
            if not name.startswith("backbone.")
        }

    def load_tuned(self, tuned: dict[str, torch.Tensor]) -> None:
        """Puts `tuned()` of the same method back. Raises RuntimeError when names or shapes differ."""
        missing, unexpected = self.load_state_dict(tuned, strict=False)
        missing = [name for name in missing if not name.startswith("backbone.")]
        if missing or unexpected:
            raise RuntimeError(f"not the same method: missing {missing}, unexpected {unexpected}")
