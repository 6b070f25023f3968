"""Ways to adapt a frozen backbone. A file each, found by name (`method`); the trial's loop knows none of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lorvp import distributed
from lorvp.backbone import Backbone
from lorvp.config import TrialConfig
from lorvp.mapping import MAPPINGS, count, greedy_matching
from lorvp.pipeline import Batches


class Method(nn.Module):
    """A frozen backbone, read by a label mapping. A subclass adds what it trains before, within or after it.

    Its starting values are drawn with the config's init seed, the mapping's apart from the rest, so that methods with
    the same mapping start from the same head.
    """

    reads_frozen = False
    """Whether it trains the label mapping alone: what the backbone says of an image is then always the same."""

    def __init__(self, config: TrialConfig, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.classes = classes
        with torch.random.fork_rng():
            torch.manual_seed(config.init_seed)
            self.mapping = MAPPINGS[config.label_mapping](backbone.source_classes, backbone.features, classes)
        self.counts: torch.Tensor | None = None
        """For the next mapping, of the epoch under way (`ilm: streamed`): (source classes, classes) int32."""
        self._tops: list[torch.Tensor] = []

    def added(self) -> torch.Tensor | None:
        """The method's input prompt, if it has one: (3, L, L), in units of pixels in [0, 1]."""
        return None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images of any size, uint8 or float in [0, 1], (N, 3, H, W), to downstream logits (N, classes) float32."""
        said = self.backbone(self.backbone.prepare(images), self.mapping.reads, self.added())
        if self.counts is not None and torch.is_grad_enabled():
            self._tops.append(said.detach().argmax(1))
        return self.mapping(said)

    def count(self, labels: torch.Tensor) -> None:
        """Counts what was just seen in training, images of these classes (n,), for the next mapping."""
        if self._tops:
            count(self.counts, torch.cat(self._tops), labels)
            self.forget()

    def forget(self) -> None:
        """Leaves what was just seen out of the counts: it will be seen again."""
        self._tops.clear()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the learning rate they take: `prompt` and `head`, those that are not empty."""
        head = list(self.mapping.parameters())
        return {"head": head} if head else {}

    def start_epoch(
        self, epoch: int, batches: Callable[[], Batches], frozen_tops: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Called before each epoch, from 1 on: makes the label mapping anew where it is one that counts.

        `batches` starts a pass over the training images, on the device; of several processes each sees its share.
        `frozen_tops` gives the source class (N,) that the backbone takes each of all of them for without a prompt, and
        their labels (N,).
        """
        if self.mapping.recount == "never" or (self.mapping.recount == "once" and epoch > 1):
            return
        device = self.backbone.mean.device
        counts = torch.zeros(self.backbone.source_classes, self.classes, dtype=torch.int32, device=device)
        with torch.inference_mode():
            added = self.added() if self.mapping.recount == "epoch" else None
            if added is None or not added.any():
                count(counts, *frozen_tops())
            elif self.counts is not None:
                counts = distributed.total(self.counts)
            else:
                for images, labels in batches():
                    logits = self.backbone(self.backbone.prepare(images), "logits", added)
                    count(counts, logits.argmax(1), labels)
                counts = distributed.total(counts)
        self.mapping.index.copy_(greedy_matching(counts))
        if self.mapping.recount == "epoch" and self.config.ilm == "streamed":
            self.counts = torch.zeros_like(counts)

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
