"""A method at work: a backbone, the prompt before it, the adapter within it, and the label mapping on its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lorvp.config import TrialConfig
from lorvp.data.loader import Batches
from lorvp.errors import UserError
from lorvp.mappings.base import count, greedy_matching, make_mapping
from lorvp.models.architectures import no_classifier
from lorvp.models.backbone import Backbone, ForwardFeatures
from lorvp.optim.optimizers import make_optimizer
from lorvp.parts import Trained, TrainedByOptimizer
from lorvp.prompts.base import Prompt, make_prompt
from lorvp.utils import distributed
from lorvp.utils.device import MicroBatches


class Method(nn.Module):
    """A backbone with an input prompt and a label mapping. A subclass is an adapter: what is trained within it.

    Starting values are drawn with the config's init seed, those of each part apart from the rest, so that methods with
    the same label mapping start from the same head.

    Raises UserError for a mapping of source classes where the backbone has none, and for a prompt or an adapter that
    the backbone can't have.
    """

    class_names: Sequence[str]
    """The name of each class, of a loaded bundle."""
    stage = 0
    """The training under way, of `TrialConfig.stages`."""

    def __init__(self, config: TrialConfig, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.classes = classes
        if config.head.input == "logits" and not backbone.source_classes:
            raise UserError(no_classifier(config.head.kind, config.backbone.name))
        with self.seeded():
            self.mapping = make_mapping(config.head, backbone.source_classes, self.features(), classes)
        self.prompt: Prompt | None = None
        if config.prompt.trained:
            with self.seeded():
                self.prompt = make_prompt(config.prompt, backbone.image_size)
        self.counts: torch.Tensor | None = None
        """Counts of the epoch under way for the next mapping (`LabelMapping.streamed`): (source classes, classes)."""
        self._predictions: list[torch.Tensor] = []
        self.recounting: torch.Tensor | None = None
        """Counts of a pass over the training images for the next mapping, while it is under way: as `counts`, int32."""
        self.micro_batches = MicroBatches(max(config.batch_size, config.eval_batch_size))

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Draw the starting values of a part within the block, and leave torch's generator as it was."""
        with torch.random.fork_rng():
            torch.manual_seed(self.config.init_seed)
            yield

    def features(self) -> int:
        """Return the number of features that a head reads."""
        return self.backbone.features

    @property
    def trains_head_only(self) -> bool:
        """Whether the label mapping alone is trained, so that the backbone's output on an image never changes."""
        return self.config.trains_head_only

    def is_identity_at_init(self) -> bool:
        """Return whether the output before the first step is the backbone's on the images as they are."""
        return self.prompt is None or self.prompt.is_identity_at_init()

    @property
    def side(self) -> int:
        """The side of the images that the method takes, in pixels: L, or what they are shrunk to."""
        return self.backbone.image_size if self.prompt is None else self.prompt.side

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Resize images of any size, uint8 or float in [0, 1], to (N, 3, side, side) float32 in [0, 1]."""
        return self.backbone.prepare(images, self.side)

    def transform_input(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (N, 3, L, L) in [0, 1], from (N, 3, side, side), before a prompt is added to them."""
        return images if self.prompt is None else self.prompt.transform_input(images)

    def input_prompt(self) -> torch.Tensor | None:
        """Return the input prompt, if there is one: (3, L, L), in units of pixels in [0, 1]."""
        return None if self.prompt is None else self.prompt.pattern()

    def backbone_output(
        self, images: torch.Tensor, output: str, forward_features: ForwardFeatures | None = None
    ) -> torch.Tensor:
        """Return the backbone's output on images from `prepare`, with the prompt in place.

        `output` is `logits`, (N, source classes), or `features`, (N, d), both float32.
        """
        result: torch.Tensor = self.backbone(
            self.transform_input(images), output, self.input_prompt(), forward_features
        )
        return result

    def penalty(self) -> torch.Tensor | None:
        """Return what is added to the mean loss in training, if anything: a scalar."""
        return None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes) float32 from images (N, 3, H, W) of any size, uint8 or float in [0, 1]."""
        source = self.backbone_output(self.prepare(images), self.mapping.input)
        if self.counts is not None and torch.is_grad_enabled():
            self._predictions.append(source.detach().argmax(1))
        logits: torch.Tensor = self.mapping(source)
        return logits

    def count(self, labels: torch.Tensor) -> None:
        """Count the predictions of the last training batch, whose labels (n,) these are, for the next mapping."""
        if self._predictions and self.counts is not None:
            count(self.counts, torch.cat(self._predictions), labels)
            self.discard_predictions()

    def discard_predictions(self) -> None:
        """Leave the predictions of the last batch out of the counts: the batch will come again."""
        self._predictions.clear()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return what is trained by steps, by part: prompt, adapter, head; without empty parts."""
        groups = {
            "prompt": [] if self.prompt is None else list(self.prompt.parameters()),
            "adapter": self.adapter_parameters(),
            "head": list(self.mapping.parameters()) if self.config.trains_by_steps else [],
        }
        return {part: parameters for part, parameters in groups.items() if parameters}

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return what is trained within the backbone."""
        return []

    def make_optimizer(self, part: str, parameters: list[nn.Parameter], precision: str) -> torch.optim.Optimizer:
        """Make the optimizer of a part (prompt, adapter or head) of a trial in that precision."""
        options = self.config.parts[part]
        assert isinstance(options, TrainedByOptimizer)  # an adapter with an optimizer of its own makes that itself
        return make_optimizer(options, self.learning_rate(options), parameters, precision)

    def learning_rate(self, options: Trained) -> float:
        """Return the learning rate of a part, scaled by the batch size where the config asks for it."""
        return options.lr * (self.config.batch_size / 256 if self.config.scale_lr else 1)

    def head_input(self, source: torch.Tensor) -> torch.Tensor:
        """Return what a fitted head reads, from the backbone's output on the images as they are: (N, d) to (N, d)."""
        return source

    def load_head(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Put in a head that was fitted to `head_input` of the backbone's output."""
        self.mapping.head.load_state_dict({"weight": weight, "bias": bias})

    def start_stage(self, before: Method) -> None:
        """Take what an earlier stage, `before`, has trained; the label mapping is a new one."""
        kept = {
            name: tensor for name, tensor in before.trainable_state_dict().items() if not name.startswith("mapping.")
        }
        self.load_trainable_state_dict(self.trainable_state_dict() | kept)

    def start_epoch(
        self,
        epoch: int,
        batches: Callable[[], Batches],
        plain_predictions: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Make the label mapping anew before an epoch, from 1 on, where it is one that counts.

        `batches` starts a pass over the training images, on the device, or goes on with one that was left half-way
        (`recounting`); of several processes each sees its share.
        `plain_predictions` gives the source class (N,) that the backbone predicts for each training image without a
        prompt, and the labels (N,).
        """
        if self.mapping.update == "never" or (self.mapping.update == "once" and epoch > 1):
            return
        device = self.backbone.mean.device
        counts = torch.zeros(self.backbone.source_classes, self.classes, dtype=torch.int32, device=device)
        with torch.inference_mode():
            if epoch == 1 and self.is_identity_at_init():
                count(counts, *plain_predictions())
            elif self.counts is not None:
                counts = distributed.all_reduce_sum(self.counts)
            else:
                self.recounting = counts = counts if self.recounting is None else self.recounting
                for images, labels in batches():
                    count(counts, torch.cat(self.micro_batches.run(self._predict, images)), labels)
                counts, self.recounting = distributed.all_reduce_sum(counts), None
        self.mapping.index.copy_(greedy_matching(counts, self.config.head.picks))
        if self.mapping.streamed:
            self.counts = torch.zeros_like(counts)

    def _predict(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone_output(self.prepare(images), "logits").argmax(1)

    def trainable_state_dict(self) -> dict[str, torch.Tensor]:
        """Return all that was chosen or learned, by name, on the CPU: what a bundle stores; no frozen backbone."""
        return {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.state_dict().items()
            if self._is_trainable(name)
        }

    def load_trainable_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Put back what `trainable_state_dict` of the same method gave.

        Raises RuntimeError naming what differs (names, shapes, dtypes), and for source classes that there are not.
        """
        own = {name: tensor for name, tensor in self.state_dict().items() if self._is_trainable(name)}
        missing, unexpected = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
        if missing or unexpected:
            raise RuntimeError(f"not the same method: missing {missing}, unexpected {unexpected}")
        for name, tensor in state_dict.items():
            if (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype):
                raise RuntimeError(f"{name} is {_kind(tensor)}, and should be {_kind(own[name])}")
        index = state_dict.get("mapping.index")
        if index is not None and not ((index >= 0) & (index < self.backbone.source_classes)).all():
            raise RuntimeError(f"mapping.index has others than the backbone's {self.backbone.source_classes} classes")
        self.load_state_dict(state_dict, strict=False)

    def _is_trainable(self, name: str) -> bool:
        return self.config.trains_backbone or not name.startswith("backbone.")


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
