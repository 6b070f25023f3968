"""What a trial is: one frozen, validated `TrialConfig`, the only thing that travels from a sweep to a job.

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
    """A path from where the user is, `~` put in. Raises ValueError for no path, or for a home folder that isn't."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{str(path)!r}: there is no such home folder") from None


def backbone_name(name: str) -> str:
    """As it means the same wherever a process runs, and is spelt in one way: folders are absolute."""
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
"""What the names of plain vision transformers begin with, timm's and ours."""
SWINS = ("swin_", "test_swin")


class Part(BaseModel):
    """A frozen piece of a config that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BackboneConfig(Part):
    """A timm model, frozen. Size and input statistics are the model's own unless given."""

    name: Annotated[str, AfterValidator(backbone_name)] = Field(
        description="timm model name, with its pretraining tag; or hf-hub:OWNER/NAME, or local-dir:FOLDER"
    )
    module: AbsolutePath | None = Field(
        None, description="a Python file of your own that registers the architecture with timm"
    )
    pretrained: bool = Field(True, description="load weights: from `checkpoint`, else the ones timm names")
    checkpoint: AbsolutePath | None = Field(None, description="local weights (safetensors or a state dict)")
    zero_shot: AbsolutePath | None = Field(
        None, description="of a CLIP image tower: the text tower's weights of source classes (`python -m lorvp.clip`)"
    )
    kwargs: dict[str, Any] = Field({}, description="keyword arguments for timm.create_model")
    image_size: PositiveInt | None = Field(None, description="L: side of the input, in pixels")
    mean: tuple[float, float, float] | None = Field(None, description="input mean, of pixels in [0, 1]")
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = Field(None, description="input deviation")


class DatasetConfig(Part):
    """The downstream data. The validation set is its own, or else split off the training set, stratified and seeded."""

    name: Literal["store", "image_folder", "digits"] = Field(
        description="store: what `python -m lorvp.data prepare` made; image_folder: CLASS/IMAGE; digits: scikit-learn's"
    )
    root: AbsolutePath | None = Field(None, description="folder of the store, or of the images")
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1,
        description="of the training images: those to choose by, where the data has no validation set of its own; "
        "0: none, train on every image and choose by the test set, under select: test_best_epoch alone",
    )
    val_images: PositiveInt | None = Field(
        None,
        description="in place of val_fraction: so many images, drawn by split_seed in the classes' proportions; of the "
        "data's own validation set so many. With val_from no draw",
    )
    train_images: PositiveInt | None = Field(
        None,
        description="train on so many of the rest, drawn in the same way; with val_from on the first ones, as VTAB "
        "does; default: on all",
    )
    val_from: NonNegativeInt | None = Field(
        None,
        description="no draws: the first train_images, and val_images from this position on, in the data's own order; "
        "800, 200 and 45000 are VTAB's of CIFAR-100",
    )
    train_on_val: bool = Field(
        False, description="train on both, to the last epoch, as VTAB does at the end; confirm.all_images sets it"
    )
    split_seed: NonNegativeInt = Field(0, description="of these draws")
    max_classes: Annotated[int, Field(ge=2)] | None = Field(None, description="keep the first classes only")
    max_per_class: Annotated[int, Field(ge=2)] | None = Field(
        None, description="so many training images of a class, drawn; the test set stays whole"
    )
    skip_unreadable: bool = Field(False, description="go on without images that can't be read")
    crop_flip: bool = Field(False, description="train on random crops (224 of 252 px) and mirror images, as published")
    crop_root: AbsolutePath | None = Field(None, description="store of the same images at the size before the crop")
    exact: bool = Field(False, description="only images that PIL has resized to L; no resizing on the device")

    @property
    def folder(self) -> Path:
        """`root`, of a dataset that lies in one."""
        assert self.root is not None  # by _has_root
        return self.root

    @property
    def holds_back(self) -> bool:
        """Whether there are images to choose by, other than the test set's."""
        return self.val_images is not None or self.val_fraction > 0

    @property
    def title(self) -> str:
        """What to call it: the folder's name, or its own."""
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
    """What is added to the resized image in [0, 1] space, before normalisation."""

    kind: Annotated[str, _one_of("prompts")] = Field("low_rank", description="a file of lorvp/prompts")
    rank: PositiveInt = Field(4, description="r of low_rank")
    init_b: Init = Field("zero", description="of B, and of prompts that are one tensor")
    init_a: Init = Field("normal", description="of A")
    init_std: PositiveFloat = Field(0.01, description="deviation of normal, half-width of uniform")
    pad: PositiveInt = Field(30, description="width of border, in pixels at L = 224, scaled to other sizes")
    inner: PositiveInt = Field(
        128, description="side of the image inside ilm_vp's and autovp's, in pixels at L = 224, scaled to other sizes"
    )
    scale: Annotated[float, Field(ge=0.1, le=5)] = Field(1.0, description="of autovp: the image's, at the start")
    learn_scale: bool = Field(True, description="of autovp")


class TokensConfig(Part):
    """Tokens that a method adds within the backbone: vpt's prompts, or vqt's queries."""

    count: Annotated[int, Field(ge=1, le=200)] = Field(
        10, description="of a layer; of vpt on a convolutional net, the width of the padding in pixels"
    )
    deep: bool = Field(True, description="of vpt: new tokens at every layer, not at the first alone")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of the tokens")
    project: PositiveInt | None = Field(None, description="of vpt: width of the tokens before a linear layer")
    group_lasso: NonNegativeFloat = Field(
        0.0, description="of vqt with keep: penalty on the norm of each feature's weights; 0.0001 as published"
    )
    keep: Fraction | None = Field(
        None,
        description="of vqt: share of the features that its head has at the end. A third of the epochs trains queries "
        "and head; one a new head under group_lasso, which chooses; one a new head on those of the largest weights",
    )


class GaLoreConfig(Part):
    """Adam on gradients projected to a low rank (Zhao et al. 2024): the backbone's optimizer under method galore."""

    rank: PositiveInt = Field(128, description="of the projected gradients")
    update_gap: PositiveInt = Field(200, description="steps between two projections' making")
    scale: PositiveFloat = Field(0.25, description="of the step, when it is projected back")
    bits: Literal[8, 32] = Field(32, description="of the moments")
    per_layer: bool = Field(False, description="step on each parameter as soon as it has its gradient, and free that")


class OptimizerConfig(Part):
    """An optimizer for each group of parameters: prompt (of the input), tokens, head and backbone.

    As published for LoR-VP prompt and head share SGD and its learning rate.
    """

    name: OptimizerName = Field("sgd", description="of all groups, the prompt's where prompt_name names no other")
    prompt_name: OptimizerName = Field(default_factory=lambda data: data["name"], description="default: name")
    lr: PositiveFloat = Field(0.02, description="of the groups that have none of their own")
    prompt_lr: PositiveFloat = Field(default_factory=lambda data: data["lr"], description="default: lr")
    tokens_lr: PositiveFloat = Field(default_factory=lambda data: data["lr"], description="default: lr")
    head_lr: PositiveFloat = Field(default_factory=lambda data: data["lr"], description="default: lr")
    backbone_lr: PositiveFloat = Field(default_factory=lambda data: data["lr"], description="default: lr")
    scale_lr: bool = Field(False, description="learning rates are those of a batch of 256, scaled to batch_size")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of sgd")
    weight_decay: NonNegativeFloat = Field(1e-4, description="of the groups that have none of their own")
    prompt_weight_decay: NonNegativeFloat = Field(
        default_factory=lambda data: data["weight_decay"], description="default: weight_decay"
    )
    tokens_weight_decay: NonNegativeFloat = Field(
        default_factory=lambda data: data["weight_decay"], description="default: weight_decay"
    )
    head_weight_decay: NonNegativeFloat = Field(
        default_factory=lambda data: data["weight_decay"], description="default: weight_decay"
    )
    backbone_weight_decay: NonNegativeFloat = Field(
        default_factory=lambda data: data["weight_decay"], description="default: weight_decay"
    )
    clip_grad_norm: PositiveFloat | None = Field(None, description="largest gradient norm, of each group")
    galore: GaLoreConfig = GaLoreConfig()


class ScheduleConfig(Part):
    """The learning rate over a trial: a linear warm-up, then cosine or linear to 0, constant, or down in steps."""

    name: Literal["cosine", "linear", "constant", "steps"] = "cosine"
    milestones: tuple[Fraction, ...] = Field((0.5, 0.72), description="of steps: a tenth from each share of the epochs")
    warmup_epochs: NonNegativeFloat = Field(0.0, description="over which it grows to its full value")


class Rung(Part):
    """Epochs at the beginning of a trial that cost less, and tell the search something already."""

    epochs: PositiveInt
    image_size: PositiveInt | None = Field(None, description="side of the backbone's input; the prompt grows with it")
    train_share: Fraction | None = Field(None, description="of the training images, stratified")


class SpeedConfig(Part):
    """Ways to the same result in less time (`lorvp/models/speed.py`), used where they apply."""

    channels_last: bool = Field(True, description="convolutions on pixels whose colours lie together")
    fold_batchnorm: bool = Field(True, description="BatchNorm in the convolution before it")
    split_first_layer: bool = Field(True, description="the prompt through the first layer once a step")
    class_token_only: bool = Field(True, description="a ViT's last block for the class token alone")
    attention_by_products: bool = Field(True, description="on a CPU in bf16: attention by matrix products")
    keep_memory: bool = Field(True, description="on a CPU: what a step frees stays with the process, for the next")


BEST = "best"
"""The value of `head_fit` for the C whose head is the best on val, not on train."""
HOW_FAR = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": r"^(best|[\d.]+%)$"}]}


def _how_far(value: Any) -> float | str:
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", value) if isinstance(value, str) else None
    if value == BEST or (share and 0 < float(share[1]) <= 100):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ValueError(f"must be C above 0, or best, or a share of the best val accuracy, as 90%; not {value!r}")


class TrialConfig(Part):
    """Everything that decides a trial's result. Equal configs are one trial: see `content_hash`."""

    method: Annotated[str, AfterValidator(_methods)] = Field(
        "lorvp", description="or lorvp+ and one that works within the backbone, as lorvp+vpt"
    )
    backbone: BackboneConfig
    dataset: DatasetConfig
    prompt: PromptConfig = PromptConfig()
    tokens: TokensConfig = TokensConfig()
    label_mapping: Annotated[str, _one_of("mappings")] = Field(
        "lp",
        description="a source class for each class: rlm at random, flm by frequency, ilm that again before each epoch; "
        "or a layer that learns: fm on the source logits, lp on the features",
    )
    head_init: Literal["random", "linear_probe"] = Field(
        default_factory=lambda data: "linear_probe" if "lp_ft" in data.get("method", "") else "random",
        description="of lp and fm. linear_probe: fitted to the images without a prompt, as far as head_fit says; "
        "default: random; of lp_ft linear_probe",
    )
    # not a union: pydantic would name each of its members in an error
    head_fit: Annotated[Any, AfterValidator(_how_far), WithJsonSchema(HOW_FAR)] = Field(
        BEST, description="C of that logistic regression; or best: the best on val; or a share of that accuracy: 90%"
    )
    ilm: Literal["pass", "streamed"] = Field(
        "pass", description="counts for ilm: from a pass over the data before each epoch, or from the epoch before"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    epochs: PositiveInt = Field(20, description="those of rungs included")
    rungs: tuple[Rung, ...] = Field((), description="cheaper first epochs, one rung after the other")
    batch_size: PositiveInt = 256
    eval_batch_size: PositiveInt = Field(512, description="where no gradient is needed")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 or fp16 on a GPU, on a CPU what is quicker"
    )
    speed: SpeedConfig = SpeedConfig()
    select: Literal["val", "test_best_epoch"] = Field(
        "val", description="val: test read once, at the best val epoch. test_best_epoch: as published, biased"
    )
    read_test: bool = Field(True, description="false: a trial that only searches, and never sees the test set")
    init_seed: NonNegativeInt = Field(0, description="of prompt, head and random mapping")
    order_seed: NonNegativeInt = Field(0, description="of the order of the data; shared by the trials of a sweep")

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
        """Raises ValueError for a method that has no meaning with the rest."""
        first, *others = self.methods
        if others and (first != "lorvp" or len(others) > 1 or others[0] not in WITHIN):
            known = ", ".join(f"lorvp+{name}" for name in WITHIN)
            raise ValueError(f"method {self.method}: what goes together is {known}")
        # whose architecture is seen only once it is built passes here
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
        """Raises ValueError for a selection of features (tokens.keep) that can't be carried out."""
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
        """How many trainings follow one another in the trial, each of as many epochs and with the whole schedule."""
        return 3 if "vqt" in self.methods and self.tokens.keep else 1

    def stage(self, epoch: int) -> int:
        """The stage, from 0, that an epoch, counted from 1, belongs to."""
        return (epoch - 1) * self.stages // self.epochs

    @property
    def reads_logits(self) -> bool:
        """Whether the label mapping needs the backbone's source classes."""
        return self.label_mapping != "lp"

    @property
    def methods(self) -> list[str]:
        """The files that `method` names."""
        return self.method.split("+")

    @property
    def rank(self) -> int | None:
        """The prompt's, of methods that have one of low rank."""
        return self.prompt.rank if self.methods[0] == "lorvp" and self.prompt.kind == "low_rank" else None

    @property
    def inner(self) -> float | None:
        """What images are shrunk to, in pixels at L = 224, by methods that put a frame around them."""
        if self.method not in FRAMES:
            return None
        learned = self.method == "ilm_vp" or self.prompt.learn_scale
        return self.prompt.inner * (1.0 if learned else self.prompt.scale)

    @property
    def trains_backbone(self) -> bool:
        return bool({"fine_tuning", "lp_ft", "galore"} & set(self.methods))

    @property
    def steps_per_layer(self) -> bool:
        """Whether gradients are gone before the whole of a step could be looked at."""
        return "galore" in self.methods and self.optimizer.galore.per_layer

    @property
    def backbone_speed(self) -> SpeedConfig:
        """`speed`, without the ways that hold for a frozen backbone alone."""
        if not self.trains_backbone:
            return self.speed
        return self.speed.model_copy(
            update={"fold_batchnorm": False, "split_first_layer": False, "class_token_only": False}
        )

    def rung(self, epoch: int) -> Rung | None:
        """The rung that an epoch, counted from 1, belongs to; None for those at full size on all images."""
        for rung in self.rungs:
            epoch -= rung.epochs
            if epoch <= 0:
                return rung
        return None

    def canonical(self) -> dict[str, Any]:
        """The config as plain JSON values, without the keys that have no effect on this trial's result."""
        values = self.model_dump(mode="json")
        # what has them by default has them by now
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
        """One spelling for all equal configs: sorted keys, defaults filled in, no white space."""
        return json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))

    def shares_with(self, other: TrialConfig) -> bool:
        """Whether a process that has trained one of them has loaded all that the other needs."""
        if self.trains_backbone or other.trains_backbone:  # and leaves another one behind
            return False
        return all(getattr(self, key) == getattr(other, key) for key in ("backbone", "dataset", "precision", "speed"))

    def packs_with(self, other: TrialConfig) -> bool:
        """Whether they can be trained together, on the same batches."""
        same = ("batch_size", "eval_batch_size", "order_seed")
        random = any(config.tokens.dropout and config.methods[-1] in ("vpt", "vqt") for config in (self, other))
        return (
            not (self.rungs or other.rungs or random)
            and self.shares_with(other)
            and self.inner == other.inner
            and all(getattr(self, key) == getattr(other, key) for key in same)
        )

    def content_hash(self) -> str:
        """12 hexadecimal digits that equal configs share, whatever order or spelling they were written in."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:12]


WITHIN = ("vpt", "vqt", "fine_tuning", "lp_ft", "galore")
"""Methods that work within the backbone, and leave its input to a prompt."""
FRAMES = ("ilm_vp", "autovp")
"""Methods that put a frame around the image."""
HEAD_MAPPINGS = ("fm", "lp")
"""The label mappings that train a head; the others choose source classes and have nothing to learn."""
