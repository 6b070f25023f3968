"""Define what the options of a trial's parts share: conditions, learning rates, and the kinds of each part.

A trial has a prompt (`lorvp/prompts`), an adapter (`lorvp/adapters`) and a head (`lorvp/mappings`). Each kind of them
is a folder. Its `config.py` holds the options, a subclass of `PromptConfig`, `AdapterConfig` or `HeadConfig`, and
imports no torch. The module beside it holds the code.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lorvp.utils import plugins

ROOMS = {"prompt": "lorvp.prompts", "adapter": "lorvp.adapters", "head": "lorvp.mappings"}
"""The keys of a trial's parts, and the packages of their kinds."""
NO_EFFECT = "no_effect"
"""Type of the error about a key that has no effect beside the others; `ctx["key"]` names it."""
BEST = "best"
"""Value of a head's `fit` for the C whose head has the best validation accuracy."""
HOW_FAR = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": r"^(best|[\d.]+%)$"}]}
Init = Literal["zero", "normal", "uniform", "xavier", "kaiming"]
OptimizerName = Literal["sgd", "adam", "adamw"]
Fraction = Annotated[float, Field(gt=0, lt=1)]


def absolute(path: Path | str) -> Path:
    """Make a path absolute and expand `~`. Raises ValueError if there is no such home folder."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{str(path)!r}: there is no such home folder") from None


AbsolutePath = Annotated[Path, AfterValidator(absolute)]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def no_effect(key: str, reason: str) -> PydanticCustomError:
    """Return the error about a key, a dotted path within the model that is validated, that has no effect."""
    return PydanticCustomError(NO_EFFECT, "{reason}", {"key": key, "reason": reason})


@dataclass(frozen=True)
class OnlyIf:
    """Mark an option that has an effect only beside certain values of the others.

    Where it has none, it can't be given, its value is None, and it is left out of what the config is dumped to.
    """

    applies: Callable[[Any], bool]
    """Whether the option has an effect in a part that is validated but for such options."""
    reason: str
    """Why it has none, for the error."""
    default: Any = None
    """Its value where it has an effect and is not given."""


class Part(BaseModel):
    """Base class of a frozen part of a config. It refuses unknown keys and keys without an effect."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    @functools.cache
    def conditional_options(cls) -> dict[str, OnlyIf]:
        """Return the options that have an effect only beside certain values of others."""
        return {
            name: condition
            for name, field in cls.model_fields.items()
            for condition in field.metadata
            if isinstance(condition, OnlyIf)
        }

    @model_validator(mode="after")
    def _resolve_conditions(self) -> Part:
        for name, condition in self.conditional_options().items():
            if not condition.applies(self):
                if getattr(self, name) is not None:
                    raise no_effect(name, f"{condition.reason}: leave it out")
            elif getattr(self, name) is None:
                self.__dict__[name] = condition.default  # the model is frozen, and not given out yet
        return self

    @model_serializer(mode="wrap")
    def _leave_out_without_effect(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        idle = {name for name, condition in self.conditional_options().items() if not condition.applies(self)}
        return {name: value for name, value in values.items() if name not in idle}


class Trial(Protocol):
    """What a part may check of the trial that it belongs to, a `TrialConfig`."""

    @property
    def head(self) -> HeadConfig:
        """Options of the head."""

    @property
    def epochs(self) -> int:
        """Epochs of the trial."""

    @property
    def rungs(self) -> tuple[Any, ...]:
        """Cheaper first epochs."""

    @property
    def warmup_epochs(self) -> float:
        """Epochs over which the learning rate grows to its full value."""

    @property
    def precision(self) -> str:
        """The precision that is asked for, auto included."""


class Kind(Part):
    """Options of one kind of prompt, adapter or head. A subclass fixes `kind` to the name of its folder."""

    kind: str
    """Name of the kind. A subclass makes it a Literal."""

    method: ClassVar[str | None] = None
    """Name of the kind in a trial's `method`; None for a kind that is not named there."""

    def check(self, trial: Trial) -> None:
        """Raise ValueError, naming the keys, for a trial that this part does not go with."""


class Trained(Kind):
    """Options of a part that is trained by steps, whatever its optimizer is."""

    lr: PositiveFloat = Field(0.02, description="learning rate; default: optimizer.lr")
    weight_decay: NonNegativeFloat = Field(1e-4, description="weight decay; default: optimizer.weight_decay")
    clip_grad_norm: PositiveFloat | None = Field(
        None, description="largest norm of the part's gradient; default: optimizer.clip_grad_norm"
    )


class TrainedByOptimizer(Trained):
    """Options of a part that one of torch's optimizers trains."""

    optimizer: OptimizerName = Field("sgd", description="optimizer; default: optimizer.name")
    momentum: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | None,
        OnlyIf(lambda part: part.optimizer == "sgd", "only sgd has a momentum", 0.9),
    ] = Field(None, description="momentum of sgd; default: optimizer.momentum")


class PromptConfig(Kind):
    """Base class of a prompt's options: what is done to the image in [0, 1] before the backbone's normalisation."""

    trained: ClassVar[bool] = True
    """Whether there is anything to train."""

    @property
    def inner_side(self) -> int | None:
        """Side of the image within a frame, in pixels at L = 224, for prompts that shrink it; else None."""
        return None


class TrainedPromptConfig(PromptConfig, TrainedByOptimizer):
    """Base class of the options of a prompt that is trained."""

    normalize_grad: bool = Field(
        False, description="divide the gradient by its L2 norm in each step (EVP, Wu et al. 2022)"
    )

    def check(self, trial: Trial) -> None:
        """Raise ValueError for a gradient whose norm is set twice."""
        if self.normalize_grad and self.clip_grad_norm is not None:
            raise ValueError("prompt.normalize_grad makes the norm 1: prompt.clip_grad_norm must be null")


class FramedPromptConfig(TrainedPromptConfig):
    """Base class of the options of a prompt around the shrunken image."""

    inner: PositiveInt = Field(
        128, description="side of the image within the frame, in pixels at L = 224; scaled to other sizes"
    )

    @property
    def inner_side(self) -> int:
        """Side of the image within the frame, in pixels at L = 224."""
        return self.inner


class OneTensorPromptConfig(TrainedPromptConfig):
    """Base class of the options of a prompt whose values are all initialised alike."""

    init: Init = Field("zero", description="initial values")
    init_std: Annotated[
        PositiveFloat | None,
        OnlyIf(
            lambda part: part.init in ("normal", "uniform"),
            "only normal and uniform initial values have a deviation",
            0.01,
        ),
    ] = Field(None, description="deviation of normal initial values, or half the width of uniform ones; default: 0.01")


class AdapterConfig(Kind):
    """Base class of an adapter's options: what is trained within the backbone."""

    trained: ClassVar[bool] = True
    """Whether there is anything to train."""
    trains_backbone: ClassVar[bool] = False
    """Whether the backbone's own weights are trained."""
    has_one_size: ClassVar[bool] = False
    """Whether what is trained belongs to one image size, so that `rungs` can't change it."""

    @property
    def stages(self) -> int:
        """Number of trainings of a trial, each with an equal number of epochs and the complete schedule."""
        return 1

    @property
    def steps_per_layer(self) -> bool:
        """Whether each gradient is freed before the step has all gradients."""
        return False

    @property
    def draws_at_random(self) -> bool:
        """Whether a step draws random numbers, so that trials can't share it."""
        return False

    def backbone_problem(self, name: str, family: str, prompted: bool) -> tuple[str, str] | None:
        """Return the option that does not go with a backbone, and the reason; None if all of them do.

        `family` is `vit` for a plain vision transformer, `swin`, or `other`. `prompted` says whether the trial has a
        prompt. The key is relative to the part, and empty for the adapter itself.
        """
        return None


class HeadConfig(Kind):
    """Base class of a head's options: how the backbone's output becomes the logits of the new classes."""

    learns: ClassVar[bool] = False
    """Whether it has weights, or else picks source classes."""
    input: ClassVar[Literal["logits", "features"]] = "logits"
    """The output of the backbone that it takes."""

    @property
    def fitted(self) -> bool:
        """Whether the head is fitted to the images without a prompt before the first epoch."""
        return False

    @property
    def picks(self) -> int:
        """Number of source classes that it reads for each class, if it picks any."""
        return 1


class PickingHeadConfig(HeadConfig):
    """Base class of the options of a head that picks source classes by chance or by counting."""

    sources_per_class: PositiveInt = Field(
        1, description="source classes that are read for each class; the mean of their logits is its logit (AutoVP)"
    )

    @property
    def picks(self) -> int:
        """Number of source classes that it reads for each class."""
        return self.sources_per_class


def _how_far(value: Any) -> float | str:
    percentage = re.fullmatch(r"(\d+(?:\.\d+)?)%", value) if isinstance(value, str) else None
    if isinstance(value, str) and (value == BEST or (percentage and 0 < float(percentage[1]) <= 100)):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ValueError(f"must be C above 0, or best, or a share of the best val accuracy, as 90%; not {value!r}")


class LearnedHeadConfig(HeadConfig, TrainedByOptimizer):
    """Options of a head with weights: a linear layer, fitted first, trained by steps, or both."""

    learns = True

    init: Literal["random", "fitted"] = Field(
        "random",
        description="initial weights. fitted: logistic regression on the images without a prompt, with the C of `fit`; "
        "default: random, but fitted for method lp_ft",
    )
    # not a union: pydantic would name each of its members in an error
    fit: Annotated[
        Any,
        AfterValidator(lambda value: None if value is None else _how_far(value)),
        WithJsonSchema(HOW_FAR),
        OnlyIf(lambda part: part.fitted, "it belongs to init: fitted", BEST),
    ] = Field(
        None,
        description="C of that logistic regression; best: the C with the best val accuracy; 90%: the smallest C that "
        "reaches that percentage of the best val accuracy; default: best",
    )

    freeze_epochs: NonNegativeInt = Field(
        0, description="epochs at the start in which the head stays as it is, while prompt and adapter learn"
    )
    refit: bool = Field(
        False,
        description="after the last epoch's training, fit the head once more, to the prompted images: logistic "
        "regression, taken if its val accuracy is above the trained head's",
    )

    @property
    def fitted(self) -> bool:
        """Whether the head is fitted to the images without a prompt before the first epoch."""
        return self.init == "fitted"

    def check(self, trial: Trial) -> None:
        """Raise ValueError for a head that would never learn."""
        if self.freeze_epochs >= trial.epochs:
            raise ValueError(f"head.freeze_epochs ({self.freeze_epochs}) must be below epochs ({trial.epochs})")


def kinds(part: str) -> dict[str, type[Kind]]:
    """Return the options' classes of the kinds of a part (prompt, adapter or head), by name."""
    return {name: plugins.load(f"{ROOMS[part]}.{name}.config") for name in plugins.names(ROOMS[part])}


def tagged_union(part: str) -> Any:
    """Return the type of a part: the options of any of its kinds, told apart by `kind`."""
    return Annotated[Union[tuple(kinds(part).values())], Field(discriminator="kind")]  # noqa: UP007  made at run time
