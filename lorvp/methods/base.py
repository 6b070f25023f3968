"""What methods share: a backbone, read by a label mapping."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lorvp import mappings
from lorvp.config import TrialConfig
from lorvp.data.loader import Batches
from lorvp.errors import UserError
from lorvp.mappings.base import count, greedy_matching
from lorvp.models.architectures import no_classifier
from lorvp.models.backbone import Backbone, ForwardFeatures
from lorvp.utils import distributed
from lorvp.utils.device import MicroBatches


class Method(nn.Module):
    """A backbone, read by a label mapping. A subclass adds what it trains before, within or after it.

    Raises UserError for a mapping of source classes where the backbone has none.

    Its starting values are drawn with the config's init seed, the mapping's apart from the rest, so that methods with
    the same mapping start from the same head.
    """

    class_names: Sequence[str]
    """Of a loaded bundle: what each of its logits stands for."""
    reads_frozen = False
    """Whether it trains the label mapping alone: what the backbone says of an image is then always the same."""
    stage = 0
    """Of `TrialConfig.stages`, that which is trained."""

    def __init__(self, config: TrialConfig, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.classes = classes
        kind = mappings.load(config.label_mapping)
        if kind.reads == "logits" and not backbone.source_classes:
            raise UserError(no_classifier(config))
        with torch.random.fork_rng():
            torch.manual_seed(config.init_seed)
            self.mapping = kind(backbone.source_classes, self.features(), classes)
        self.counts: torch.Tensor | None = None
        """For the next mapping, of the epoch under way (`ilm: streamed`): (source classes, classes) int32."""
        self._tops: list[torch.Tensor] = []
        self.recounting: torch.Tensor | None = None
        """Of a pass over the training images for the next mapping, while it is under way: as `counts`."""
        self.micro_batches = MicroBatches(max(config.batch_size, config.eval_batch_size))

    def features(self) -> int:
        """How many features a head reads."""
        return self.backbone.features

    def starts_plain(self) -> bool:
        """Whether, before its first step, it says of the images what the backbone says of them as they are."""
        return True

    @property
    def side(self) -> int:
        """Of the images that it takes, in pixels: L, or what they are shrunk to."""
        return self.backbone.image_size

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Images of any size, uint8 or float in [0, 1], as (N, 3, side, side) float32 in [0, 1]: resized once."""
        return self.backbone.prepare(images, self.side)

    def placed(self, images: torch.Tensor) -> torch.Tensor:
        """What the method makes of images (N, 3, side, side) in [0, 1] before a prompt is added to them."""
        return images

    def added(self) -> torch.Tensor | None:
        """The method's input prompt, if it has one: (3, L, L), in units of pixels in [0, 1]."""
        return None

    def said(self, images: torch.Tensor, output: str, through: ForwardFeatures | None = None) -> torch.Tensor:
        """What it makes the backbone say of images as `prepare` gives them: (N, source classes) `logits` or (N, d)
        `features`."""
        return self.backbone(self.placed(images), output, self.added(), through)

    def penalty(self) -> torch.Tensor | None:
        """What is added to the mean loss in training, if anything: a scalar."""
        return None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images of any size, uint8 or float in [0, 1], (N, 3, H, W), to downstream logits (N, classes) float32."""
        said = self.said(self.prepare(images), self.mapping.reads)
        if self.counts is not None and torch.is_grad_enabled():
            self._tops.append(said.detach().argmax(1))
        return self.mapping(said)

    def count(self, labels: torch.Tensor) -> None:
        """Counts what was just seen in training, images of these classes (n,), for the next mapping."""
        if self._tops and self.counts is not None:
            count(self.counts, torch.cat(self._tops), labels)
            self.forget()

    def forget(self) -> None:
        """Leaves what was just seen out of the counts: it will be seen again."""
        self._tops.clear()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the learning rate they take: prompt, tokens, head, backbone; none of them empty."""
        head = list(self.mapping.parameters())
        return {"head": head} if head else {}

    def read_plain(self, said: torch.Tensor) -> torch.Tensor:
        """What a head that starts fitted reads of what the backbone says of images as they are (N, d): (N, d)."""
        return said

    def start_head(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Puts in a head that was fitted to `read_plain` of what the backbone says."""
        self.mapping.head.load_state_dict({"weight": weight, "bias": bias})

    def start_stage(self, before: Method) -> None:
        """Takes what an earlier stage, `before`, has trained; the label mapping is a new one."""
        kept = {name: tensor for name, tensor in before.tuned().items() if not name.startswith("mapping.")}
        self.load_tuned(self.tuned() | kept)

    def start_epoch(
        self, epoch: int, batches: Callable[[], Batches], frozen_tops: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Called before each epoch, from 1 on: makes the label mapping anew where it is one that counts.

        `batches` starts a pass over the training images, on the device, or goes on with one that was left half-way
        (`recounting`); of several processes each sees its share.
        `frozen_tops` gives the source class (N,) that the backbone takes each of all of them for without a prompt, and
        their labels (N,).
        """
        if self.mapping.recount == "never" or (self.mapping.recount == "once" and epoch > 1):
            return
        device = self.backbone.mean.device
        counts = torch.zeros(self.backbone.source_classes, self.classes, dtype=torch.int32, device=device)
        with torch.inference_mode():
            if epoch == 1 and self.starts_plain():
                count(counts, *frozen_tops())
            elif self.counts is not None:
                counts = distributed.all_reduce_sum(self.counts)
            else:
                self.recounting = counts = counts if self.recounting is None else self.recounting
                for images, labels in batches():
                    count(counts, torch.cat(self.micro_batches.run(self._top, images)), labels)
                counts, self.recounting = distributed.all_reduce_sum(counts), None
        self.mapping.index.copy_(greedy_matching(counts))
        if self.mapping.recount == "epoch" and self.config.ilm == "streamed":
            self.counts = torch.zeros_like(counts)

    def _top(self, images: torch.Tensor) -> torch.Tensor:
        return self.said(self.prepare(images), "logits").argmax(1)

    def tuned(self) -> dict[str, torch.Tensor]:
        """All that was chosen or learned, by name, on the CPU: what a bundle stores. A frozen backbone is not in it."""
        return {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.state_dict().items()
            if self._tunes(name)
        }

    def load_tuned(self, tuned: dict[str, torch.Tensor]) -> None:
        """Puts `tuned()` of the same method back.

        Raises RuntimeError naming what differs (names, shapes, dtypes), and for source classes that there are not.
        """
        own = {name: tensor for name, tensor in self.state_dict().items() if self._tunes(name)}
        missing, unexpected = sorted(own.keys() - tuned.keys()), sorted(tuned.keys() - own.keys())
        if missing or unexpected:
            raise RuntimeError(f"not the same method: missing {missing}, unexpected {unexpected}")
        for name, tensor in tuned.items():
            if (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype):
                raise RuntimeError(f"{name} is {_kind(tensor)}, and should be {_kind(own[name])}")
        index = tuned.get("mapping.index")
        if index is not None and not ((index >= 0) & (index < self.backbone.source_classes)).all():
            raise RuntimeError(f"mapping.index has others than the backbone's {self.backbone.source_classes} classes")
        self.load_state_dict(tuned, strict=False)

    def _tunes(self, name: str) -> bool:
        return self.config.trains_backbone or not name.startswith("backbone.")


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
