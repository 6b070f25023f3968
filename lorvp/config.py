"""Define a trial's config: one frozen, validated `TrialConfig`, which is all that a sweep passes to a job.

This module imports no torch, so that the driver of a sweep can read and write configs without it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    WithJsonSchema,
    model_validator,
)

from lorvp.utils import plugins


def _one_of(folder: str) -> AfterValidator:
    def check(name: str) -> str:
        if name not in plugins.names(folder):
            raise ValueError(f"unknown name {name!r}; one of {', '.join(plugins.names(folder))}")
        return name

    return AfterValidator(check)


def _methods(method: str) -> str:
    for name in method.split("+"):
        if name not in plugins.names("methods"):
            raise ValueError(f"unknown name {name!r}; one of {', '.join(plugins.names('methods'))}")
    return method


def absolute(path: Path | str) -> Path:
    """Make a path absolute and expand `~`. Raises ValueError if there is no such home folder."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{str(path)!r}: there is no such home folder") from None


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


AbsolutePath = Annotated[Path, AfterValidator(absolute)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Init = Literal["zero", "normal", "uniform", "xavier", "kaiming"]
OptimizerName = Literal["sgd", "adam", "adamw"]
VITS = ("vit_", "deit_", "deit3_", "flexivit_", "test_vit", "lorvp_tiny_vit")
"""Prefixes of the names of plain vision transformers, timm's and ours."""
SWINS = ("swin_", "test_swin")


class Part(BaseModel):
    """Base class of a frozen part of a config that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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


class DatasetConfig(Part):
    """Select the downstream data. If it has no validation set, a stratified, seeded part of train is held out."""

    name: Literal["store", "image_folder", "digits"] = Field(
        description="store: made by `python -m lorvp.data prepare`; image_folder: CLASS/IMAGE; digits: scikit-learn's"
    )
    root: AbsolutePath | None = Field(None, description="folder of the store or of the images")
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1,
        description="fraction of the training images to validate on, if the data has no validation set of its own; "
        "0: train on every image and choose by the test set, which needs select: test_best_epoch",
    )
    val_images: PositiveInt | None = Field(
        None,
        description="number of validation images, in place of val_fraction, drawn by split_seed in the classes' "
        "proportions, also from the data's own validation set; with val_from they are not drawn",
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
    exact: bool = Field(False, description="accept only images that PIL has resized to L; never resize on the device")

    @property
    def folder(self) -> Path:
        """`root`, for a dataset that has one."""
        assert self.root is not None  # by _has_root
        return self.root

    @property
    def holds_back(self) -> bool:
        """Whether there are validation images apart from the test set."""
        return self.val_images is not None or self.val_fraction > 0

    @property
    def title(self) -> str:
        """Name to show: the folder's, or the dataset's."""
        return self.name if self.root is None else self.root.name

    @model_validator(mode="after")
    def _has_root(self) -> DatasetConfig:
        if self.root is None and self.name != "digits":
            raise ValueError(f"dataset {self.name} needs root: the folder where it lies")
        if self.exact and self.name == "digits":
            raise ValueError("dataset digits is resized on the device: exact can't be had")
        if self.val_from is not None and not (self.val_images and self.train_images):
            raise ValueError("val_from is a position: train_images and val_images must say how many images there are")
        if self.val_from is not None and (self.max_classes or self.max_per_class):
            raise ValueError("val_from counts all images: leave max_classes and max_per_class out")
        if self.crop_root and not (self.crop_flip and self.name == "store"):
            raise ValueError("crop_root goes with name: store and crop_flip: true")
        return self


class PromptConfig(Part):
    """Configure the prompt that is added to the resized image in [0, 1], before normalisation."""

    kind: Annotated[str, _one_of("prompts")] = Field(
        "low_rank", description="kind of prompt: the name of a file of lorvp/prompts"
    )
    rank: PositiveInt = Field(4, description="rank r of low_rank")
    init_b: Init = Field("zero", description="initial values of B, and of prompts that are one tensor")
    init_a: Init = Field("normal", description="initial values of A")
    init_std: PositiveFloat = Field(
        0.01, description="deviation of normal initial values, or half the width of uniform ones"
    )
    pad: PositiveInt = Field(30, description="width of border in pixels at L = 224; scaled to other sizes")
    inner: PositiveInt = Field(
        128,
        description="side of the image in the frame of ilm_vp and autovp, in pixels at L = 224; scaled to other sizes",
    )
    scale: Annotated[float, Field(ge=0.1, le=5)] = Field(1.0, description="initial scale of the image in autovp")
    learn_scale: bool = Field(True, description="learn that scale, in autovp")


class TokensConfig(Part):
    """Configure the tokens that a method adds within the backbone: vpt's prompts, or vqt's queries."""

    count: Annotated[int, Field(ge=1, le=200)] = Field(
        10, description="tokens per layer; for vpt on a convolutional net, the width of the padding in pixels"
    )
    deep: bool = Field(True, description="for vpt: new tokens at every layer; false: at the first layer only")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout rate of the tokens")
    project: PositiveInt | None = Field(
        None, description="for vpt: width of the tokens before a linear layer projects them; default: no projection"
    )
    group_lasso: NonNegativeFloat = Field(
        0.0, description="for vqt with keep: penalty on the norm of each feature's weights; published: 0.0001"
    )
    keep: Fraction | None = Field(
        None,
        description="for vqt: fraction of features (largest weights) that the final head reads. One third of the "
        "epochs trains queries and head, one a new head under group_lasso, and one a new head on the features it chose",
    )


class GaLoreConfig(Part):
    """Configure GaLore, Adam on low-rank projected gradients (Zhao et al. 2024), the optimizer of method galore."""

    rank: PositiveInt = Field(128, description="rank of the projected gradients")
    update_gap: PositiveInt = Field(200, description="steps between two computations of the projection")
    scale: PositiveFloat = Field(0.25, description="factor of the update when it is projected back")
    bits: Literal[8, 32] = Field(32, description="bits of each value of the moments")
    per_layer: bool = Field(
        False, description="update each parameter as soon as its gradient is computed, and free the gradient"
    )


class OptimizerConfig(Part):
    """Configure the optimizer of each parameter group: prompt (of the input), tokens, head and backbone.

    By default prompt and head share SGD and its learning rate, as published for LoR-VP.
    """

    name: OptimizerName = Field("sgd", description="optimizer of all groups, except the prompt's if prompt_name is set")
    prompt_name: OptimizerName = Field(
        default_factory=lambda data: data["name"], description="optimizer of the prompt; default: name"
    )
    lr: PositiveFloat = Field(0.02, description="learning rate of the groups without one of their own")
    prompt_lr: PositiveFloat = Field(
        default_factory=lambda data: data["lr"], description="learning rate of the prompt; default: lr"
    )
    tokens_lr: PositiveFloat = Field(
        default_factory=lambda data: data["lr"], description="learning rate of the tokens; default: lr"
    )
    head_lr: PositiveFloat = Field(
        default_factory=lambda data: data["lr"], description="learning rate of the head; default: lr"
    )
    backbone_lr: PositiveFloat = Field(
        default_factory=lambda data: data["lr"], description="learning rate of the backbone; default: lr"
    )
    scale_lr: bool = Field(False, description="scale the learning rates by batch_size / 256")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="momentum of sgd")
    weight_decay: NonNegativeFloat = Field(1e-4, description="weight decay of the groups without one of their own")
    prompt_weight_decay: NonNegativeFloat = Field(
        default_factory=lambda data: data["weight_decay"],
        description="weight decay of the prompt; default: weight_decay",
    )
    tokens_weight_decay: NonNegativeFloat = Field(
        default_factory=lambda data: data["weight_decay"],
        description="weight decay of the tokens; default: weight_decay",
    )
    head_weight_decay: NonNegativeFloat = Field(
        default_factory=lambda data: data["weight_decay"], description="weight decay of the head; default: weight_decay"
    )
    backbone_weight_decay: NonNegativeFloat = Field(
        default_factory=lambda data: data["weight_decay"],
        description="weight decay of the backbone; default: weight_decay",
    )
    clip_grad_norm: PositiveFloat | None = Field(
        None, description="largest gradient norm of each group; default: no clipping"
    )
    galore: GaLoreConfig = GaLoreConfig()


class ScheduleConfig(Part):
    """Configure the learning-rate schedule: a linear warm-up, then cosine or linear to 0, constant, or in steps."""

    name: Literal["cosine", "linear", "constant", "steps"] = "cosine"
    milestones: tuple[Fraction, ...] = Field(
        (0.5, 0.72), description="for steps: the fractions of the epochs at which the learning rate is divided by 10"
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


BEST = "best"
"""Value of `head_fit` for the C whose head has the best validation accuracy."""
HOW_FAR = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": r"^(best|[\d.]+%)$"}]}


def _how_far(value: Any) -> float | str:
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", value) if isinstance(value, str) else None
    if isinstance(value, str) and (value == BEST or (share and 0 < float(share[1]) <= 100)):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ValueError(f"must be C above 0, or best, or a share of the best val accuracy, as 90%; not {value!r}")


class TrialConfig(Part):
    """Hold everything that determines a trial's result. Equal configs are one trial: see `content_hash`."""

    method: Annotated[str, AfterValidator(_methods)] = Field(
        "lorvp", description="a method, or lorvp+METHOD for one that works within the backbone, such as lorvp+vpt"
    )
    backbone: BackboneConfig
    dataset: DatasetConfig
    prompt: PromptConfig = PromptConfig()
    tokens: TokensConfig = TokensConfig()
    label_mapping: Annotated[str, _one_of("mappings")] = Field(
        "lp",
        description="rlm, flm and ilm pick a source class for each class: at random, by frequency, or by frequency "
        "again before each epoch; fm and lp learn a linear layer, on the source logits or on the features",
    )
    head_init: Literal["random", "linear_probe"] = Field(
        default_factory=lambda data: "linear_probe" if "lp_ft" in data.get("method", "") else "random",
        description="initial head of lp and fm. linear_probe: fitted to unprompted images, with the C of head_fit; "
        "default: random, but linear_probe for method lp_ft",
    )
    # not a union: pydantic would name each of its members in an error
    head_fit: Annotated[Any, AfterValidator(_how_far), WithJsonSchema(HOW_FAR)] = Field(
        BEST,
        description="C of that logistic regression; best: the C with the best val accuracy; 90%: the smallest C that "
        "reaches that percentage of the best val accuracy",
    )
    ilm: Literal["pass", "streamed"] = Field(
        "pass",
        description="for ilm: count in a pass over the data before each epoch, or streamed, during the epoch before",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    epochs: PositiveInt = Field(20, description="epochs of the trial, those of rungs included")
    rungs: tuple[Rung, ...] = Field((), description="cheaper first epochs, one rung after another")
    batch_size: PositiveInt = 256
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

    @model_validator(mode="after")
    def _fits_together(self) -> TrialConfig:
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(f"schedule.warmup_epochs ({self.schedule.warmup_epochs:g}) must be below epochs")
        if self.method == "linear_probe" and self.label_mapping not in HEAD_MAPPINGS:
            raise ValueError("method linear_probe trains only a head: label_mapping must be lp or fm")
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
        if self.method == "linear_probe" and self.head_init == "linear_probe" and self.epochs != 1:
            raise ValueError("method linear_probe with head_init linear_probe is fitted at once: epochs must be 1")
        self._method_fits()
        return self

    def _method_fits(self) -> None:
        """Raise ValueError for a method that does not go with the other keys."""
        first, *others = self.methods
        if others and (first != "lorvp" or len(others) > 1 or others[0] not in WITHIN):
            known = ", ".join(f"lorvp+{name}" for name in WITHIN)
            raise ValueError(f"method {self.method}: what goes together is {known}")
        # an architecture that is known only once it is built passes here
        hidden = self.backbone.module or ":" in self.backbone.name
        name = VITS[0] if hidden else self.backbone.name
        if "vqt" in self.methods and not name.startswith(VITS):
            raise ValueError(f"method vqt asks the layers of a vision transformer (vit_*, deit_*), not of {name}")
        if "vqt" in self.methods and self.label_mapping != "lp":
            raise ValueError("method vqt has features of its own: label_mapping must be lp")
        if "vpt" in self.methods and self.tokens.deep and not name.startswith(VITS):
            raise ValueError(
                f"method vpt is deep on vision transformers (vit_*, deit_*) alone: tokens.deep must be false for {name}"
            )
        if "vpt" in self.methods and self.tokens.project and not name.startswith((*VITS, *SWINS)):
            raise ValueError(f"tokens.project: {name} has no tokens, vpt pads its images")
        if self.method == "lorvp+vpt" and not name.startswith((*VITS, *SWINS)):
            raise ValueError(f"method lorvp+vpt needs a backbone with tokens; of {name} vpt pads the images")
        self._stages_fit()
        if "lp_ft" in self.methods and (self.head_init == "random" or self.label_mapping not in HEAD_MAPPINGS):
            raise ValueError("method lp_ft starts from a fitted head: head_init linear_probe, label_mapping lp or fm")
        if self.steps_per_layer:
            if self.optimizer.clip_grad_norm is not None:
                raise ValueError("optimizer.galore.per_layer frees each gradient at once: clip_grad_norm must be null")
            if self.precision in ("auto", "fp16"):
                raise ValueError("optimizer.galore.per_layer can't skip a step of fp16: precision must be bf16 or fp32")
        if self.rungs and self.trains_backbone:
            raise ValueError(f"rungs: method {self.method} trains the backbone, which has one size and starts once")
        if any(rung.image_size for rung in self.rungs) and {"vpt", "vqt"} & set(self.methods):
            raise ValueError(f"rungs: method {self.method} does not go from one image_size to another")

    def _stages_fit(self) -> None:
        """Raise ValueError for a selection of features (tokens.keep) that can't be carried out."""
        if "vqt" in self.methods and self.tokens.group_lasso and not self.tokens.keep:
            raise ValueError("tokens.group_lasso chooses the features for tokens.keep, which must be given")
        if self.stages == 1:
            return
        if not self.tokens.group_lasso:
            raise ValueError("tokens.keep chooses by tokens.group_lasso, which must be above 0")
        if self.epochs % self.stages:
            raise ValueError(f"tokens.keep trains in three stages: epochs must be a multiple of 3, not {self.epochs}")
        if self.schedule.warmup_epochs >= self.epochs // self.stages:
            raise ValueError(
                "tokens.keep trains in three stages: schedule.warmup_epochs must be below a third of epochs"
            )
        if self.head_init != "random":
            raise ValueError("tokens.keep trains two heads anew: head_init must be random")
        if self.rungs:
            raise ValueError("tokens.keep trains in three stages of its own: leave rungs out")

    @property
    def stages(self) -> int:
        """Number of the trial's stages, each with an equal number of epochs and the complete schedule."""
        return 3 if "vqt" in self.methods and self.tokens.keep else 1

    def stage(self, epoch: int) -> int:
        """Return the stage (from 0) of an epoch (from 1)."""
        return (epoch - 1) * self.stages // self.epochs

    @property
    def reads_logits(self) -> bool:
        """Whether the label mapping reads the backbone's source logits."""
        return self.label_mapping != "lp"

    @property
    def methods(self) -> list[str]:
        """Names of the methods that `method` combines."""
        return self.method.split("+")

    @property
    def rank(self) -> int | None:
        """Rank of the prompt; None for methods without a low-rank prompt."""
        return self.prompt.rank if self.methods[0] == "lorvp" and self.prompt.kind == "low_rank" else None

    @property
    def inner(self) -> float | None:
        """Side of the shrunk image, in pixels at L = 224, for methods that put a frame around it; else None."""
        if self.method not in FRAMES:
            return None
        learned = self.method == "ilm_vp" or self.prompt.learn_scale
        return self.prompt.inner * (1.0 if learned else self.prompt.scale)

    @property
    def trains_backbone(self) -> bool:
        """Whether the method trains the backbone's weights."""
        return bool({"fine_tuning", "lp_ft", "galore"} & set(self.methods))

    @property
    def steps_per_layer(self) -> bool:
        """Whether each gradient is freed before the step has all gradients."""
        return "galore" in self.methods and self.optimizer.galore.per_layer

    @property
    def backbone_speed(self) -> SpeedConfig:
        """`speed` without the optimizations that need a frozen backbone, if the backbone is trained."""
        if not self.trains_backbone:
            return self.speed
        return self.speed.model_copy(
            update={"fold_batchnorm": False, "split_first_layer": False, "class_token_only": False}
        )

    def rung(self, epoch: int) -> Rung | None:
        """Return the rung of an epoch (from 1); None for epochs at full size on all images."""
        for rung in self.rungs:
            epoch -= rung.epochs
            if epoch <= 0:
                return rung
        return None

    def canonical(self) -> dict[str, Any]:
        """Return the config as plain JSON values, without the keys that have no effect on the result."""
        values = self.model_dump(mode="json")
        # keys that default to these hold the values by now
        unused = ["optimizer.name", "optimizer.lr", "optimizer.weight_decay"]
        groups = {
            "prompt": bool(set(self.methods) - {*WITHIN, "linear_probe"}),
            "tokens": bool({"vpt", "vqt"} & set(self.methods)),
            "head": self.label_mapping in HEAD_MAPPINGS,
            "backbone": self.trains_backbone,
        }
        for group in (group for group, there in groups.items() if not there):
            unused += [f"optimizer.{group}_{key}" for key in ("lr", "weight_decay")]
        used = {self.optimizer.prompt_name} if groups["prompt"] else set()
        if groups["tokens"] or groups["head"] or groups["backbone"]:
            unused.remove("optimizer.name")
            used.add(self.optimizer.name)
        unused += ["optimizer.momentum"] if "sgd" not in used else []
        unused += ["optimizer.galore"] if "galore" not in self.methods else []
        if not groups["head"]:
            unused += ["head_init"]
        if not groups["head"] or self.head_init == "random":
            unused += ["head_fit"]
        if self.label_mapping != "ilm":
            unused += ["ilm"]
        if self.method == "linear_probe" and self.head_init == "linear_probe":
            unused += ["optimizer", "schedule", "batch_size", "init_seed", "order_seed"]
        unused += self._unused_of_prompt(groups["prompt"])
        if not groups["tokens"]:
            unused += ["tokens"]
        if "vpt" not in self.methods:
            unused += ["tokens.deep", "tokens.project"]
        if "vqt" not in self.methods:
            unused += ["tokens.group_lasso", "tokens.keep"]
        if self.schedule.name != "steps":
            unused += ["schedule.milestones"]
        unused += ["dataset.val_fraction"] if self.dataset.val_images else ["dataset.val_images"]
        unused += ["dataset.val_from"] if self.dataset.val_from is None else []
        unused += [] if self.dataset.train_on_val else ["dataset.train_on_val"]
        unused += [] if self.backbone.module else ["backbone.module"]
        for key in unused:
            *parents, last = key.split(".")
            part = values
            for parent in parents:
                part = part.get(parent, {})
            part.pop(last, None)
        return values

    def _unused_of_prompt(self, prompted: bool) -> list[str]:
        if not prompted:
            return ["prompt", "optimizer.prompt_name"]
        if self.methods[0] != "lorvp":
            unused = ["kind", "rank", "init_a", "init_b", "init_std", "pad"]
            unused += ["scale", "learn_scale"] if self.method == "ilm_vp" else []
        else:
            unused = ["inner", "scale", "learn_scale"]
            unused += ["rank", "init_a"] if self.prompt.kind != "low_rank" else []
            unused += ["pad"] if self.prompt.kind != "border" else []
        return [f"prompt.{key}" for key in unused]

    def canonical_json(self) -> str:
        """Return the JSON that all equal configs share: sorted keys, defaults filled in, no white space."""
        return json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))

    def shares_with(self, other: TrialConfig) -> bool:
        """Tell whether both trials can use the same loaded backbone and data."""
        if self.trains_backbone or other.trains_backbone:  # training changes the backbone
            return False
        return all(getattr(self, key) == getattr(other, key) for key in ("backbone", "dataset", "precision", "speed"))

    def packs_with(self, other: TrialConfig) -> bool:
        """Tell whether both trials can be trained together on the same batches."""
        same = ("batch_size", "eval_batch_size", "order_seed")
        random = any(config.tokens.dropout and config.methods[-1] in ("vpt", "vqt") for config in (self, other))
        return (
            not (self.rungs or other.rungs or random)
            and self.shares_with(other)
            and self.inner == other.inner
            and all(getattr(self, key) == getattr(other, key) for key in same)
        )

    def content_hash(self) -> str:
        """Return 12 hexadecimal digits that all equal configs share, whatever their spelling and order of keys."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:12]


WITHIN = ("vpt", "vqt", "fine_tuning", "lp_ft", "galore")
"""Methods that work within the backbone and leave its input to a prompt."""
FRAMES = ("ilm_vp", "autovp")
"""Methods that put a frame around the image."""
HEAD_MAPPINGS = ("fm", "lp")
"""The label mappings that train a head; the others choose source classes and have nothing to learn."""
