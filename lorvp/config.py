"""Define a trial's config: one frozen, validated `TrialConfig`, which is all that a sweep passes to a job.

This module imports no torch, so that the driver of a sweep can read and write configs without it.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lorvp import presets
from lorvp.parts import (
    ROOMS,
    AbsolutePath,
    AdapterConfig,
    Fraction,
    HeadConfig,
    Kind,
    OnlyIf,
    OptimizerName,
    Part,
    PromptConfig,
    TrainedByOptimizer,
    absolute,
    flatten,
    kinds,
    no_effect,
    tagged_union,
)

if TYPE_CHECKING:
    Prompt = PromptConfig
    Adapter = AdapterConfig
    Head = HeadConfig
else:
    Prompt, Adapter, Head = map(tagged_union, ROOMS)

DEFAULT_KINDS = {"prompt": "low_rank", "adapter": "none", "head": "lp"}
"""The kinds of a trial that names none: LoR-VP with a linear probe."""


def backbone_name(name: str) -> str:
    """Normalise a backbone's name: one spelling of its source, and absolute folders. Raises ValueError."""
    source, colon, rest = name.partition(":")
    source = source.lower().replace("_", "-")
    if not colon:
        if "/" in name:
            raise ValueError(f"{name!r} is no timm name: hf-hub:{name} is one of the hub, local-dir:{name} a folder")
        return name
    if source not in ("hf-hub", "local-dir") or not rest:
        raise ValueError(f"{name!r} must be a timm name, hf-hub:OWNER/NAME or local-dir:FOLDER")
    return f"{source}:{absolute(rest) if source == 'local-dir' else rest}"


def regular_expression(pattern: str) -> str:
    """Return the pattern. Raises ValueError if it is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


class BackboneConfig(Part):
    """Select a frozen timm model. Input size and statistics are the model's own by default."""

    name: Annotated[str, AfterValidator(backbone_name)] = Field(
        description="timm model name with its pretraining tag, hf-hub:OWNER/NAME or local-dir:FOLDER"
    )
    module: AbsolutePath | None = Field(None, description="your Python file that registers the architecture with timm")
    pretrained: bool = Field(
        True, description="load weights, from `checkpoint` or else those that timm names; false: random weights"
    )
    checkpoint: AbsolutePath | None = Field(None, description="file of local weights (safetensors or a state dict)")
    zero_shot: AbsolutePath | None = Field(
        None, description="for a CLIP image tower: file of its classes' text embeddings, from `python -m lorvp.clip`"
    )
    kwargs: dict[str, Any] = Field({}, description="keyword arguments for timm.create_model")
    image_size: PositiveInt | None = Field(None, description="L, the side of the input in pixels; default: the model's")
    mean: tuple[float, float, float] | None = Field(
        None, description="mean of each colour, for pixels in [0, 1]; default: the model's"
    )
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = Field(
        None, description="deviation of each colour, for pixels in [0, 1]; default: the model's"
    )


class GroupsConfig(Part):
    """Say which images belong together; exactly one of the keys."""

    pattern: Annotated[str, AfterValidator(regular_expression)] | None = Field(
        None,
        description="regular expression, searched in each image's path within its split; the group is what the "
        "parentheses match, or without any the whole match: (.+)_ takes all that is before the last underscore",
    )
    folder: PositiveInt | None = Field(
        None, description="the group is the folder at this level of the path: 2 in CLASS/PATIENT/IMAGE"
    )
    column: str | None = Field(
        None, description="column of the store that names the group, from `prepare huggingface --column NAME`"
    )

    @model_validator(mode="after")
    def _has_one_key(self) -> GroupsConfig:
        if [self.pattern, self.folder, self.column].count(None) != 2:
            raise ValueError("give one of pattern, a regular expression, folder, a level, and column, a name")
        return self


class DatasetConfig(Part):
    """Select the downstream data. If it has no validation set, a stratified, seeded part of train is held out."""

    name: Literal["store", "image_folder", "digits"] = Field(
        description="store: made by `python -m lorvp.data prepare`; image_folder: CLASS/IMAGE; digits: scikit-learn's"
    )
    root: AbsolutePath | None = Field(None, description="folder of the store or of the images")
    val_images: PositiveInt | None = Field(
        None,
        description="number of validation images, in place of val_fraction, drawn by split_seed in the classes' "
        "proportions, also from the data's own validation set; with val_from they are not drawn",
    )
    val_fraction: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | None,
        OnlyIf(lambda data: data.val_images is None, "val_images says how many images to validate on", 0.1),
    ] = Field(
        None,
        description="fraction of the training images to validate on, if the data has no validation set of its own; "
        "0: train on every image and choose by the test set, which needs select: test_best_epoch; default: 0.1",
    )
    train_images: PositiveInt | None = Field(
        None,
        description="number of training images, drawn from the rest in the same way; with val_from the first ones, as "
        "in VTAB; default: all",
    )
    val_from: NonNegativeInt | None = Field(
        None,
        description="draw nothing: train on the first train_images, validate on val_images from this position on, in "
        "the data's own order; VTAB's CIFAR-100 has train_images 800, val_images 200, val_from 45000",
    )
    train_on_val: bool = Field(
        False,
        description="train on the validation images too and keep the last epoch, as VTAB does at the end; set by "
        "confirm.all_images",
    )
    split_seed: NonNegativeInt = Field(0, description="seed of these draws")
    groups: Annotated[
        GroupsConfig | None,
        OnlyIf(lambda data: data.groups is not None, "left out where there are none, as in configs of before"),
    ] = Field(
        None,
        description="which images belong together: those of a group, such as the frames of a track, are never on both "
        "sides of a split; val_images is then about the number",
    )
    max_classes: Annotated[int, Field(ge=2)] | None = Field(
        None, description="keep only so many classes, the first ones"
    )
    max_per_class: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="largest number of training images of a class, drawn by split_seed; the test set stays complete",
    )
    skip_unreadable: bool = Field(False, description="leave out images that can't be read")
    crop_flip: bool = Field(
        False, description="train on random crops (224 of 252 px) and mirrored images, as published"
    )
    crop_root: AbsolutePath | None = Field(
        None, description="store of the same images at the size that crops are taken from"
    )
    trivial_augment: bool = Field(
        False,
        description="train on images that TrivialAugment has changed, each by one of its 14 wide operations at one of "
        "31 strengths (Müller & Hutter 2021)",
    )
    color_jitter: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="train on images of other colours: brightness, contrast and saturation by factors from [1 - x, "
        "1 + x], hue by up to x/4 of a circle, in any order; SimCLR's strength 0.5 is x = 0.4; default: off",
    )
    exact: bool = Field(False, description="accept only images that PIL has resized to L; never resize on the device")

    @property
    def folder(self) -> Path:
        """`root`, for a dataset that has one."""
        assert self.root is not None  # by _has_root
        return self.root

    @property
    def holds_back(self) -> bool:
        """Whether there are validation images apart from the test set."""
        return self.val_fraction != 0

    @property
    def augments(self) -> bool:
        """Whether an image differs from epoch to epoch in training, so that its features can't be cached."""
        return self.crop_flip or self.trivial_augment or self.color_jitter is not None

    @property
    def read_from_disk(self) -> DatasetConfig:
        """The same images as they are read, without what is done to each batch of them."""
        return self.model_copy(update={"trivial_augment": False, "color_jitter": None})

    @property
    def unaugmented(self) -> DatasetConfig:
        """The same images as they are evaluated, without what is done to them in training alone."""
        return self.read_from_disk.model_copy(update={"crop_flip": False, "crop_root": None})

    @property
    def title(self) -> str:
        """Name to show: the folder's, or the dataset's."""
        return self.name if self.root is None else self.root.name

    @model_validator(mode="after")
    def _has_root(self) -> DatasetConfig:
        if self.root is None and self.name != "digits":
            raise ValueError(f"dataset {self.name} needs root: the folder where it lies")
        if self.root is not None and self.name == "digits":
            raise no_effect("root", "dataset digits comes with scikit-learn: leave it out")
        if self.skip_unreadable and self.name != "image_folder":
            raise no_effect("skip_unreadable", f"dataset {self.name} has only images that can be read: leave it out")
        if self.exact and self.name == "digits":
            raise ValueError("dataset digits is resized on the device: exact can't be had")
        if self.val_from is not None and not (self.val_images and self.train_images):
            raise ValueError("val_from is a position: train_images and val_images must say how many images there are")
        if self.val_from is not None and (self.max_classes or self.max_per_class):
            raise ValueError("val_from counts all images: leave max_classes and max_per_class out")
        if self.groups is not None and self.name == "digits":
            raise no_effect("groups", "the images of dataset digits have no names: leave it out")
        if self.groups is not None and self.val_from is not None:
            raise no_effect("groups", "with val_from nothing is drawn: leave one of them out")
        if self.groups is not None and self.groups.column is not None and self.name != "store":
            raise ValueError("groups.column is one of a store; give groups.pattern or groups.folder for image files")
        if self.crop_root and not (self.crop_flip and self.name == "store"):
            raise ValueError("crop_root goes with name: store and crop_flip: true")
        return self


class OptimizerConfig(Part):
    """Set what the trained parts share: a part without a key of its own takes it from here.

    The keys do their part when a config is read. A key that no part takes is refused.
    """

    name: OptimizerName | None = Field(None, description="optimizer of the parts; default: sgd, as published")
    lr: PositiveFloat | None = Field(None, description="learning rate of the parts; default: 0.02, as published")
    weight_decay: NonNegativeFloat | None = Field(None, description="weight decay of the parts; default: 0.0001")
    clip_grad_norm: PositiveFloat | None = Field(
        None, description="largest norm of each part's gradient; default: no clipping"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="momentum of the parts that sgd trains; default: 0.9"
    )

    _taken: set[str] = PrivateAttr(default_factory=set)

    def give(self, kind: type[Kind], values: dict[str, Any]) -> dict[str, Any]:
        """Return the keys that a part of that kind takes from here, beside its own `values`."""
        taken: dict[str, Any] = {}
        for key, value in self:
            name = "optimizer" if key == "name" else key
            if value is None or name not in kind.model_fields or name in values:
                continue
            if name == "momentum" and ({"optimizer": "sgd"} | taken | values)["optimizer"] != "sgd":
                continue
            taken[name] = value
            self._taken.add(key)
        return taken

    def untaken(self) -> str | None:
        """Return a key that is given, and that no part has taken."""
        return next((key for key, value in self if value is not None and key not in self._taken), None)


class ScheduleConfig(Part):
    """Configure the learning-rate schedule: a linear warm-up, then cosine or linear to 0, constant, or in steps."""

    name: Literal["cosine", "linear", "constant", "steps"] = "cosine"
    milestones: Annotated[
        tuple[Fraction, ...] | None,
        OnlyIf(lambda schedule: schedule.name == "steps", "only the schedule steps has them", (0.5, 0.72)),
    ] = Field(
        None,
        description="for steps: the fractions of the epochs at which the learning rate is divided by 10; "
        "default: 0.5 and 0.72",
    )
    warmup_epochs: NonNegativeFloat = Field(
        0.0, description="epochs over which the learning rate grows to its full value"
    )


class Rung(Part):
    """Configure cheaper epochs at the start of a trial, whose results the search can already use."""

    epochs: PositiveInt
    image_size: PositiveInt | None = Field(
        None, description="side of the backbone's input in pixels; the prompt is interpolated to it; default: L"
    )
    train_share: Fraction | None = Field(None, description="fraction of the training images, stratified; default: all")


class SpeedConfig(Part):
    """Switch optimizations that keep the result (`lorvp/models/speed.py`); each is used where it applies."""

    channels_last: bool = Field(True, description="run convolutions with channels last in memory")
    fold_batchnorm: bool = Field(True, description="fold BatchNorm into the convolution before it")
    split_first_layer: bool = Field(
        True, description="run the prompt through the first layer once per step, not once per image"
    )
    class_token_only: bool = Field(True, description="run a ViT's last block for the class token only")
    attention_by_products: bool = Field(True, description="on a CPU in bf16: compute attention by matrix products")
    keep_memory: bool = Field(
        True, description="on a CPU: keep the memory that a step frees in the process, for the next step"
    )


class TrialConfig(Part):
    """Hold everything that determines a trial's result. Equal configs are one trial: see `content_hash`.

    `prompt`, `adapter` and `head` hold the options of one kind each. `method` and `optimizer` only help to write them:
    a config that is read has them in its parts.
    """

    preset: str | None = Field(
        None,
        alias="method",
        exclude=True,
        description="a preset of the kinds of prompt and adapter, or PROMPT+ADAPTER, such as lorvp+vpt; default: lorvp",
    )
    shared_by_parts: OptimizerConfig | None = Field(
        None, alias="optimizer", exclude=True, description="what the trained parts share; a part's own key comes first"
    )
    backbone: BackboneConfig
    dataset: DatasetConfig
    prompt: Prompt = Field({}, validate_default=True, description="what is done to the image before the backbone")
    adapter: Adapter = Field({}, validate_default=True, description="what is trained within the backbone")
    head: Head = Field(
        {},
        validate_default=True,
        description="how the backbone's output becomes the classes. rlm, flm and ilm pick a source class for each "
        "class, or several: at random, by frequency, or by frequency again before each epoch; fm and lp learn a linear "
        "layer, on the source logits or on the features",
    )
    schedule: ScheduleConfig = ScheduleConfig()
    epochs: PositiveInt = Field(20, description="epochs of the trial, those of rungs included")
    rungs: tuple[Rung, ...] = Field((), description="cheaper first epochs, one rung after another")
    batch_size: PositiveInt = 256
    scale_lr: bool = Field(False, description="scale the learning rates by batch_size / 256")
    eval_batch_size: PositiveInt = Field(512, description="batch size where no gradient is needed")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: on a GPU bf16 if it has it, else fp16; on a CPU the faster of bf16 and fp32"
    )
    speed: SpeedConfig = SpeedConfig()
    select: Literal["val", "test_best_epoch"] = Field(
        "val",
        description="val: choose the epoch on val and read the test set once. test_best_epoch: choose on "
        "test, as published; biased",
    )
    read_test: bool = Field(True, description="read the test set; false: for trials that only search")
    init_seed: NonNegativeInt = Field(0, description="seed of the initial prompt, head and random label mapping")
    order_seed: NonNegativeInt = Field(0, description="seed of the order of the data, shared by the trials of a sweep")

    @model_validator(mode="before")
    @classmethod
    def _is_of_this_form(cls, values: Any) -> Any:
        """Refuse the keys of the earlier form, and say how they are written now."""
        for given in flatten(values) if isinstance(values, dict) else ():
            earlier = of_earlier_form(given)
            if earlier is not None:
                key, reason = earlier
                raise PydanticCustomError("earlier_form", "{reason}", {"key": key, "reason": reason})
        return values

    @field_validator("preset")
    @classmethod
    def _is_a_preset(cls, method: str | None) -> str | None:
        if method is not None:
            presets.parts_of(method)
        return method

    @field_validator("prompt", "adapter", "head", mode="before")
    @classmethod
    def _complete_part(cls, values: Any, info: ValidationInfo) -> Any:
        """Give a part the kind that its preset says, and the keys that it shares with the others."""
        assert info.field_name is not None
        if not isinstance(values, dict):
            return values
        part, method = info.field_name, info.data.get("preset")
        said = {} if method is None else presets.parts_of(method).get(part, {})
        for key, value in said.items():
            if values.get(key, value) != value:
                reason = f"method {method} has {part}.{key} {value}, not {values[key]}: leave one of them out"
                raise PydanticCustomError("contradiction", "{reason}", {"key": key, "reason": reason})
        values = {"kind": DEFAULT_KINDS[part]} | said | values
        known = kinds(part)
        kind = known.get(values["kind"]) if isinstance(values["kind"], str) else None
        if kind is None:
            return values
        for key in values:
            having = [name for name, options in known.items() if key in options.model_fields]
            if key in said and key not in kind.model_fields:
                raise ValueError(f"method {method} has {key} {said[key]}: kind must be {' or '.join(having)}")
            if having and key not in kind.model_fields:
                raise no_effect(key, f"it belongs to kind {' or '.join(having)}, not {values['kind']}: leave it out")
        others: list[Kind] = [info.data[other] for other in ("prompt", "adapter") if other in info.data]
        by_steps = part != "head" or values.get("init") != "fitted" or any(other.kind != "none" for other in others)
        shared = info.data.get("shared_by_parts")
        return values | (shared.give(kind, values) if shared is not None and by_steps else {})

    @model_validator(mode="after")
    def _fits_together(self) -> TrialConfig:
        if self.shared_by_parts is not None and self.shared_by_parts.untaken():
            key = self.shared_by_parts.untaken()
            raise no_effect(f"optimizer.{key}", "every part that is trained has its own: leave it out")
        self.__dict__.update(preset=None, shared_by_parts=None)  # the parts hold it by now
        self._check_effects()
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(f"schedule.warmup_epochs ({self.schedule.warmup_epochs:g}) must be below epochs")
        if sum(rung.epochs for rung in self.rungs) >= self.epochs:
            raise ValueError(f"rungs: their epochs must be fewer than epochs ({self.epochs}): the last ones are whole")
        if self.dataset.train_on_val and any(rung.train_share for rung in self.rungs):
            raise ValueError("rungs: dataset.train_on_val trains on all images, train_share on a part: leave one out")
        if not self.dataset.holds_back and self.select != "test_best_epoch":
            raise ValueError(
                "dataset.val_fraction 0 leaves only the test set to choose by: select must be test_best_epoch, "
                "and a sweep must have no confirm"
            )
        if not self.dataset.holds_back and self.dataset.train_on_val:
            raise ValueError("dataset.val_fraction 0 trains on every image already: train_on_val must be false")
        if self.select == "test_best_epoch" and not self.read_test:
            raise ValueError("select: test_best_epoch chooses by the test set: read_test must be true")
        if self.rungs and self.trains_backbone:
            raise ValueError(f"rungs: adapter {self.adapter.kind} trains the backbone, which has one size")
        if any(rung.image_size for rung in self.rungs) and self.adapter.has_one_size:
            raise ValueError(f"rungs: adapter {self.adapter.kind} does not go from one image_size to another")
        for part in self.parts.values():
            part.check(self)
        return self

    def _check_effects(self) -> None:
        """Raise an error for a key that has no effect in this trial, and differs from its default."""
        if self.trains_head_only and self.head.learns:
            self._check_default(BESIDE_A_PROMPT, "there is neither a prompt nor an adapter")
        if self.trains_head_only and not self.head.learns:
            raise ValueError(
                f"nothing is trained: head.kind must be lp or fm where there is no prompt and no adapter, "
                f"not {self.head.kind}"
            )
        if self.backbone.zero_shot is not None and self.head.input != "logits":
            raise no_effect(
                "backbone.zero_shot", f"head {self.head.kind} reads features, not source classes: leave it out"
            )
        if self.dataset.val_from is not None and not any(rung.train_share for rung in self.rungs):
            self._check_default(("dataset.split_seed",), "dataset.val_from draws nothing")
        if self.trains_backbone:
            keys = tuple(f"speed.{key}" for key in FROZEN_ONLY)
            self._check_default(keys, f"adapter {self.adapter.kind} trains the backbone")
        if not self.trains_by_steps:
            if self.epochs != 1:
                raise ValueError("a fitted head without a prompt or an adapter is not trained: epochs must be 1")
            self._check_default(OF_STEPS, "a fitted head without a prompt or an adapter is not trained by steps")

    def _check_default(self, keys: tuple[str, ...], reason: str) -> None:
        for key in keys:
            *parents, name = key.split(".")
            part: Part = self
            for parent in parents:
                part = getattr(part, parent)
            condition = part.conditional_options().get(name)
            default = type(part).model_fields[name].default if condition is None else condition.default
            if getattr(part, name) not in (default, None):
                raise no_effect(key, f"{reason}: leave it out")

    @property
    def parts(self) -> dict[str, Kind]:
        """The prompt, the adapter and the head, by key."""
        return {"prompt": self.prompt, "adapter": self.adapter, "head": self.head}

    @property
    def method(self) -> str:
        """Name of the preset that has the trial's parts."""
        return presets.name_of(self.prompt, self.adapter, self.head)

    @property
    def warmup_epochs(self) -> float:
        """Epochs over which the learning rate grows to its full value."""
        return self.schedule.warmup_epochs

    @property
    def stages(self) -> int:
        """Number of the trial's stages, each with an equal number of epochs and the complete schedule."""
        return self.adapter.stages

    def stage(self, epoch: int) -> int:
        """Return the stage (from 0) of an epoch (from 1)."""
        return (epoch - 1) * self.stages // self.epochs

    @property
    def rank(self) -> int | None:
        """Rank of the prompt's B·A; None for a prompt without it."""
        return getattr(self.prompt, "rank", None)

    @property
    def trains_backbone(self) -> bool:
        """Whether the backbone's weights are trained."""
        return self.adapter.trains_backbone

    @property
    def trains_head_only(self) -> bool:
        """Whether there is neither prompt nor adapter, so that the backbone's output on an image never changes."""
        return not (self.prompt.trained or self.adapter.trained)

    @property
    def trains_by_steps(self) -> bool:
        """Whether anything is trained by steps: all but a fitted head without a prompt and an adapter."""
        return not (self.trains_head_only and self.head.fitted)

    @property
    def backbone_speed(self) -> SpeedConfig:
        """`speed` without the optimizations that need a frozen backbone, if the backbone is trained."""
        return self.speed.model_copy(update=dict.fromkeys(FROZEN_ONLY, False)) if self.trains_backbone else self.speed

    def rung(self, epoch: int) -> Rung | None:
        """Return the rung of an epoch (from 1); None for epochs at full size on all images."""
        for rung in self.rungs:
            epoch -= rung.epochs
            if epoch <= 0:
                return rung
        return None

    def values(self) -> dict[str, Any]:
        """Return all values that have an effect by dotted path, with the name of the method, as plain JSON values."""
        values = {"method": self.method} | flatten(self.model_dump(mode="json"))
        return {key: value for key, value in values.items() if self.trains_by_steps or key not in OF_STEPS}

    def canonical_json(self) -> str:
        """Return the JSON that all equal configs share: sorted keys, defaults filled in, no white space."""
        values = self.model_dump(mode="json")
        for key, value in LATER_KEYS.items():
            part, name = key.split(".")
            if values[part].get(name) == value:
                del values[part][name]
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    def shares_with(self, other: TrialConfig) -> bool:
        """Tell whether both trials can use the same loaded backbone and data."""
        if self.trains_backbone or other.trains_backbone:  # training changes the backbone
            return False
        same = all(getattr(self, key) == getattr(other, key) for key in ("backbone", "precision", "speed"))
        return same and self.dataset.read_from_disk == other.dataset.read_from_disk

    def packs_with(self, other: TrialConfig) -> bool:
        """Tell whether both trials can be trained together on the same batches."""
        same = ("dataset", "batch_size", "eval_batch_size", "order_seed")
        random = self.adapter.draws_at_random or other.adapter.draws_at_random
        return (
            not (self.rungs or other.rungs or random)
            and self.shares_with(other)
            and self.prompt.inner_side == other.prompt.inner_side
            and all(getattr(self, key) == getattr(other, key) for key in same)
        )

    def content_hash(self) -> str:
        """Return 12 hexadecimal digits that all equal configs share, whatever their spelling and order of keys."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:12]


OF_STEPS = (
    *(f"head.{key}" for key in TrainedByOptimizer.model_fields if key != "kind"),
    *(f"schedule.{key}" for key in ScheduleConfig.model_fields),
    *("dataset.trivial_augment", "dataset.color_jitter"),
    *("scale_lr", "batch_size", "init_seed", "order_seed"),
)
"""Keys that have no effect where nothing is trained by steps."""
BESIDE_A_PROMPT = ("head.freeze_epochs", "head.refit")
"""Keys of a head that have an effect beside a prompt or an adapter alone."""
LATER_KEYS = {"head.sources_per_class": 1, "dataset.trivial_augment": False, "dataset.color_jitter": None}
"""Keys that some configs from before do not have, and the values that these stand for: they keep their hash."""
FROZEN_ONLY = ("fold_batchnorm", "split_first_layer", "class_token_only")
"""Keys of `speed` that need a frozen backbone."""
EARLIER = {
    "label_mapping": "head.kind",
    "head_init": "head.init, where linear_probe is now fitted",
    "head_fit": "head.fit",
    "ilm": "head.counting",
    "tokens": "adapter, with the same keys",
    "optimizer.prompt_name": "prompt.optimizer",
    "optimizer.prompt_lr": "prompt.lr",
    "optimizer.tokens_lr": "adapter.lr",
    "optimizer.backbone_lr": "adapter.lr",
    "optimizer.head_lr": "head.lr",
    "optimizer.prompt_weight_decay": "prompt.weight_decay",
    "optimizer.tokens_weight_decay": "adapter.weight_decay",
    "optimizer.backbone_weight_decay": "adapter.weight_decay",
    "optimizer.head_weight_decay": "head.weight_decay",
    "optimizer.scale_lr": "scale_lr",
    "optimizer.galore": "adapter, with the same keys",
}
"""Keys of configs before prompt, adapter and head were parts, and what is written in their place."""


def of_earlier_form(key: str) -> tuple[str, str] | None:
    """Return the key of the earlier form that a dotted path is or lies in, and the error about it; None if it isn't."""
    for earlier, now in EARLIER.items():
        if key == earlier or key.startswith(f"{earlier}."):
            return earlier, f"{earlier} is of an earlier form: write {now}"
    return None
