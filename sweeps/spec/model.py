"""What a sweep is: a validated `Spec`; `file.py` reads it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from lorvp.config import TrialConfig
from lorvp.parts import BEST, NO_EFFECT, ROOMS, AbsolutePath, LearnedHeadConfig, Part, absolute, flatten, kinds
from lorvp.presets import LINEAR_PROBE
from lorvp.utils import plugins
from lorvp.utils.explain import closest, dotted, located
from sweeps.spec import recommended


def _scalar(value: Any) -> Any:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"must be a single number, text, true, false or null, not {value!r}")
    return value


def _one_or_more(value: Any) -> list[Any]:
    values = [_scalar(one) for one in (value if isinstance(value, list) else [value])]
    if not values:
        raise ValueError("needs at least one value")
    return values


# Not a union: pydantic would name each of its members in an error.
Scalar = Annotated[Any, AfterValidator(_scalar)]
OneOrMore = Annotated[Any, AfterValidator(_one_or_more)]
FITTED_HEAD = {
    "method": LINEAR_PROBE,
    "prompt.kind": "none",
    "adapter.kind": "none",
    "head.init": "fitted",
    "head.fit": BEST,
    "epochs": 1,
    "rungs": [],
}
"""What makes the control of any sweep, beside its label mapping."""
COMPARABLE = ("method", "prompt.kind", "adapter.kind", "head.init")
"""Axes whose values start at another pace, so that a trial of one says little of another's end."""
SHARED = "optimizer."
"""Beginning of the keys that only say what parts have by default."""
ALGORITHMS, RULES = "sweeps.search.algorithms", "sweeps.search.stopping_rules"
"""Packages with a module for each."""


def _known(package: str) -> AfterValidator:
    def check(name: str) -> str:
        if name not in plugins.names(package):
            raise ValueError(f"unknown name {name!r}{closest(name, list(plugins.names(package)))}")
        return name

    return AfterValidator(check)


def _enum(package: str) -> WithJsonSchema:
    return WithJsonSchema({"enum": list(plugins.names(package)), "type": "string"})


AlgorithmName = Annotated[str, _known(ALGORITHMS), _enum(ALGORITHMS)]
RuleName = Annotated[str, _known(RULES), _enum(RULES)]
MAX_CELLS = 100_000
"""Of a grid: nobody has trained as many, and a slip of the pen fills the memory."""
DEFAULT_SEEDS = 5
"""How many a confirmation has where its spec names none."""
ABSENT = object()
"""In place of the value of an axis that a point does not have."""
GRACE = 0.5
"""Fraction of a trial's epochs before the first decision on it, where a spec names none (docs/results.md)."""
OBJECTIVES = {"val_top1": "max", "val_top5": "max", "val_loss": "min"}


class Axis(Part):
    """One key of TrialConfig that the search chooses: one of choice, uniform, log_uniform, int, recommended."""

    choice: Annotated[list[Scalar], Field(min_length=1)] | None = Field(None, description="one of these values")
    uniform: tuple[float, float] | None = Field(None, description="[low, high]")
    log_uniform: tuple[float, float] | None = Field(None, description="[low, high], both above 0")
    integers: Annotated[list[int], Field(min_length=2, max_length=3)] | None = Field(
        None, alias="int", description="[low, high] or [low, high, step], both ends included"
    )
    recommended: Literal[True] | None = Field(
        None, exclude=True, description="in place of these: the range of `sweeps/spec/recommended.py`, where it has one"
    )
    when: dict[str, OneOrMore] = Field({}, description="axes, and the values of each under which this one exists")
    ranges: Annotated[list[Axis], Field(min_length=2)] | None = Field(
        None,
        description="in place of all else: several axes for the one key, each under a condition of its own; "
        "a list in place of a mapping means the same",
    )

    @model_validator(mode="before")
    @classmethod
    def _list_of_ranges(cls, values: Any) -> Any:
        return {"ranges": values} if isinstance(values, list) else values

    @model_validator(mode="after")
    def _is_one_kind(self) -> Axis:
        if self.ranges is not None:
            self._span(self.ranges)
            return self
        kinds = {"choice": self.choice, "uniform": self.uniform, "log_uniform": self.log_uniform, "int": self.integers}
        kinds_given = [kind for kind, value in kinds.items() if value is not None]
        if self.recommended and kinds_given:
            raise ValueError(f"recommended stands in place of {kinds_given[0]}: leave one of them out")
        if self.recommended:  # of a key that has no such range, as whoever reads the file says
            return self
        if len(kinds_given) != 1:
            named = " and ".join(kinds_given) or "none"
            raise ValueError(f"needs exactly one of choice, uniform, log_uniform, int, recommended; it has {named}")
        if self.choice is not None and len({(type(v), v) for v in self.choice}) < len(self.choice):
            raise ValueError("choice names a value twice")
        bounds = self.uniform or self.log_uniform or self.integers
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"the low end {bounds[0]} must be below the high end {bounds[1]}")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform needs a low end above 0, not {self.log_uniform[0]}")
        if self.integers is not None and len(self.integers) == 3 and self.integers[2] < 1:
            raise ValueError(f"the step of int must be at least 1, not {self.integers[2]}")
        return self

    def _span(self, ranges: list[Axis]) -> None:
        """Take the values of all ranges for its own, for those to whom it does not matter which is in use."""
        if self.model_fields_set != {"ranges"}:
            raise ValueError("ranges stands alone: each range has its own choice, uniform, log_uniform or int")
        if not all(axis.when and axis.ranges is None for axis in ranges):
            raise ValueError("each range needs when: the condition under which it is the one in use")
        if any(axis.recommended for axis in ranges):
            raise ValueError(recommended.NONE)
        lists, ends = [axis.values() for axis in ranges], [axis.bounds for axis in ranges if axis.choice is None]
        listed = [values for values in lists if values is not None]
        if listed and len(listed) < len(ranges):
            raise ValueError("ranges are all lists (choice, int), or all uniform and log_uniform")
        hull = (min(low for low, _ in ends), max(high for _, high in ends)) if ends else None
        own: dict[str, Any] = {"log_uniform" if all(axis.log_uniform for axis in ranges) else "uniform": hull}
        if listed:
            own = {"choice": list(dict.fromkeys(value for values in listed for value in values))}
        self.__dict__.update(own)  # the model is frozen, and not given out yet

    @model_serializer(mode="wrap")
    def _leave_out_the_span(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write ranges alone, as they are read: a sweep's record is."""
        values: dict[str, Any] = handler(self)
        return values if self.ranges is None else {"ranges": values["ranges"]}

    def at(self, params: dict[str, Scalar]) -> tuple[int, Axis] | None:
        """Return the range in use at a point whose other parameters are `params`, and its number; None for none.

        An axis of one range is number 0.
        """
        for number, axis in enumerate(self.ranges or [self]):
            if all(params.get(name, ABSENT) in allowed for name, allowed in axis.when.items()):
                return number, axis
        return None

    def conditions(self) -> dict[str, list[Scalar]]:
        """Return the axes that its conditions name, and all values that they ask for."""
        named: dict[str, list[Scalar]] = {}
        for axis in self.ranges or [self]:
            for name, allowed in axis.when.items():
                named[name] = [*named.get(name, []), *allowed]
        return named

    def having(self, value: Scalar) -> Axis:
        """Return the first range that may have the value; else the first of all."""
        ranges = self.ranges or [self]
        return next((axis for axis in ranges if axis.contains(value)), ranges[0])

    def values(self) -> list[Scalar] | None:
        """Return every value it can take, in order; None if they can't be listed, or are more than a grid may have."""
        if self.choice is not None:
            return self.choice
        if self.integers is None or (self.integers[1] - self.integers[0]) // (*self.integers, 1)[2] >= MAX_CELLS:
            return None
        return list(range(self.integers[0], self.integers[1] + 1, *self.integers[2:]))

    def examples(self) -> list[Scalar]:
        """Return the values that must be valid for all of the axis to be."""
        return self.choice or list(self.bounds)

    def contains(self, value: Scalar) -> bool:
        """Return whether the search may give it this value."""
        if self.choice is not None:
            return value in self.choice
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        low, high = self.bounds
        step = self.integers[2] if self.integers is not None and len(self.integers) == 3 else 1
        return low <= value <= high and (self.integers is None or (value - low) % step == 0)

    def place(self, value: float) -> float:
        """Return where a value lies in its range, on its scale: 0 at the low end, 1 at the high one."""
        scale = math.log if self.log_uniform else float
        low, high = map(scale, self.bounds)
        return (scale(value) - low) / (high - low)

    def value_at(self, place: float) -> float:
        """Return the value at a place, which may lie outside of the range."""
        low, high = self.bounds
        return low * (high / low) ** place if self.log_uniform else low + (high - low) * place

    @property
    def bounds(self) -> tuple[float, float]:
        """Its low and high end. Raises ValueError for a choice."""
        ends = self.uniform or self.log_uniform or self.integers
        if ends is None:
            raise ValueError("a choice has no ends")
        return ends[0], ends[1]


class SearchConfig(Part):
    """How configs are chosen: Optuna's samplers, each with an explicit seed, or every cell of a grid."""

    algorithm: AlgorithmName = Field("tpe", description="tpe, cmaes and gp learn from the trials that have ended")
    trials: PositiveInt | None = Field(None, description="how many; a grid has as many as it has cells")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="of the algorithm")
    concurrent: PositiveInt = Field(2, description="trials that run at the same time")
    try_first: list[dict[str, Scalar]] = Field(
        [],
        description="points that are tried before all others, as the best of an earlier sweep: values by dotted path; "
        "axes that a point leaves out are drawn",
    )
    equal: str | None = Field(
        None, description="a choice axis whose values get equal shares of the trials, each searched for its own"
    )
    seconds: PositiveFloat | None = Field(
        None, description="with equal: no further trials of a value once the epochs of its trials have taken so long"
    )


class Confirm(Part):
    """The best of the search again, under several seeds; only these trials read the test set."""

    top: PositiveInt = Field(1, description="how many configs; with search.equal, of each value")
    seeds: Annotated[list[NonNegativeInt], Field(min_length=2)] | None = Field(
        None,
        description="of the trial and of its data's order, none of them the search's; default: the five after those",
    )

    all_images: bool = Field(
        False, description="train on the validation images, too, to the last epoch; VTAB's last training"
    )
    added_later: bool = Field(
        False,
        description="confirm a search that was begun without confirm, by --resume: its trials stay as they are, and "
        "have read the test set, which chooses nothing",
    )

    @model_validator(mode="after")
    def _has_different_seeds(self) -> Confirm:
        if self.seeds and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds names a seed twice: that would be one trial")
        return self


class Stage(StrEnum):
    """What a trial is for."""

    SEARCH = "search"
    CONFIRM = "confirm"


class EarlyStopping(Part):
    """Gives up on trials: asha (Li et al. 2020), the median rule (Golovin et al. 2017), or by a forecast of the end."""

    rule: RuleName = "none"
    grace_epochs: PositiveInt | None = Field(
        None,
        description="epochs that every trial gets; asha's first rung; default: half of the longest trial's",
    )
    reduction_factor: Annotated[int, Field(ge=2)] = Field(2, description="of asha: one in so many goes on at a rung")
    within: list[str] | None = Field(
        None,
        description="choice axes: only trials with the same values of all of them end each other; default: of method, "
        "the kinds of prompt and adapter, and head.init, those that are axes, as one kind starts slower than another",
    )

    def first_decision(self, epochs: int) -> int:
        """Return the epoch after which a trial of so many may be ended for the first time."""
        return self.grace_epochs or math.ceil(epochs * GRACE)


class FailureLimit(Part):
    """Ends a sweep that fails from its start: once more than `share` of the first `trials` have failed."""

    share: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="1 lets every trial fail")
    trials: PositiveInt = 8


class Tracking(Part):
    """Where MLflow records: by default SQLite in the output folder, or what MLFLOW_TRACKING_URI names."""

    uri: str | None = Field(None, description="MLflow's tracking URI: a database or a server")
    experiment: str = Field("lorvp", description="MLflow's name for where the sweep's runs are")


def _usable_as_folder(name: str) -> str:
    if not name or name.startswith(".") or any(not (c.isalnum() or c in "-_.") for c in name):
        raise ValueError(f"{name!r} names the sweep's folder: letters, digits, '-', '_' and '.' only")
    return name


class Spec(Part):
    """A sweep. `trial` holds the fixed values of a TrialConfig, `space` the axes by dotted path."""

    name: Annotated[str, AfterValidator(_usable_as_folder)] = Field(description="of the sweep, and of its folder")
    trial: dict[str, Any] = Field(description="values of TrialConfig that all trials share")
    space: dict[str, Axis] = Field(description="keys of TrialConfig that the search chooses, by dotted path")
    search: SearchConfig = SearchConfig()
    confirm: Confirm | None = None
    early_stopping: EarlyStopping = EarlyStopping()
    failure_limit: FailureLimit = FailureLimit()
    objective: Literal["val_top1", "val_top5", "val_loss"] = Field("val_top1", description="what the search goes by")
    control: dict[str, Any] | None = Field(
        {},
        description="values, by dotted path, that make controls beside the fitted head; lists are tried one by one; "
        "null: no control at all",
    )
    pack: PositiveInt | Literal["auto"] = Field(
        1,
        description="trials that a job trains together, on the same batches; auto: as many as 20 steps find to pay",
    )
    cluster: str = Field("local", description="a profile in cluster/profiles, or the path of one")
    tracking: Tracking = Tracking()
    output: AbsolutePath = Field(Path("runs"), validate_default=True, description="folder of all sweeps")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_recommended(cls, values: Any) -> Any:
        return recommended.fill_in(values)

    @property
    def mode(self) -> str:
        """Whether a larger objective is better: "max" or "min"."""
        return OBJECTIVES[self.objective]

    @property
    def top(self) -> int:
        """How many configs are confirmed, of each arm of the search."""
        return self.confirm.top if self.confirm else 0

    @property
    def seeds(self) -> list[int]:
        """Under which they are; none without a confirmation."""
        if self.confirm is None:
            return []
        return self.confirm.seeds or self.unused_seeds(DEFAULT_SEEDS)

    @property
    def all_images(self) -> bool:
        """Whether what confirms is trained on the validation images, too."""
        return self.confirm is not None and self.confirm.all_images

    def unused_seeds(self, count: int) -> list[int]:
        """Return the next after the largest that the search trains under."""
        first = 1 + math.floor(max(self._searched_seeds()[1]))
        return list(range(first, first + count))

    def trains_under(self, seed: int) -> bool:
        """Return whether a trial of the search, or of its control, may have `seed`: what it does well has chosen it."""
        axes, values = self._searched_seeds()
        return seed in values or any(axis.contains(seed) for axis in axes)

    def _searched_seeds(self) -> tuple[list[Axis], list[float]]:
        """Return the axes that search a seed; the seeds that are named, and the ends of those axes."""
        axes: list[Axis] = []
        values: list[float] = []
        for key in ("init_seed", "order_seed"):
            axis, control_values = self.space.get(key), (self.control or {}).get(key, [])
            values += control_values if isinstance(control_values, list) else [control_values]
            if axis is not None:
                axes.append(axis)
                values += axis.examples()
            if axis is None or axis.conditions():
                values.append(self.trial.get(key, TrialConfig.model_fields[key].default))
        return axes, [value for value in values if isinstance(value, int | float)]

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return self.output / self.name

    @property
    def trials(self) -> Path:
        """The folder of the sweep's trials."""
        return self.folder / "trials"

    def trial_config(self, params: dict[str, Scalar]) -> TrialConfig:
        """Return the config of one point of the space: `trial` with `params`, by dotted path, put in.

        A key that has no effect at this point is left out: `_check_used` in `file.py` sees that it has one at another.
        Raises ValidationError for values that are wrong, or don't go together.
        """
        return self.resolve(params)[0]

    def resolve(self, params: dict[str, Scalar]) -> tuple[TrialConfig, dict[str, str]]:
        """Return the config of a point of the space, and the keys that `trial_config` left out of it, with reasons."""
        values: dict[str, Any] = _copy(self.trial)
        for key, value in params.items():
            set_dotted(values, key, value)
        if self.confirm and not self.confirm.added_later:  # the test set is left to the confirmation
            values["read_test"] = False
            if values.get("select") == "test_best_epoch":
                values["select"] = "val"
        return leave_out_idle(values)

    def confirmed(self, config: TrialConfig, seed: int) -> TrialConfig:
        """Return a config of the search as it is trained to confirm it."""
        select = self.trial.get("select", config.select)
        changes = {"read_test": True, "select": select}
        if config.trains_by_steps:
            changes |= {"init_seed": seed, "order_seed": seed}
        values = config.model_dump(mode="json") | changes
        if self.all_images:
            values["dataset"]["train_on_val"] = True
        return TrialConfig.model_validate(values)

    def stage(self, config: TrialConfig) -> Stage:
        """Return whether a trial belongs to the search or to the confirmation."""
        if self.confirm is None:
            return Stage.SEARCH
        under_its_seeds = config.dataset.train_on_val or config.order_seed in self.seeds
        confirms = under_its_seeds if self.confirm.added_later else config.read_test
        return Stage.CONFIRM if confirms else Stage.SEARCH

    def params(self, config: TrialConfig) -> dict[str, Scalar]:
        """Return where a trial lies in the space: its values on the axes that matter to it."""
        values = config.values()
        params = {
            name: values[name]
            for name, axis in self.space.items()
            if name in values
            and (active(axis, values) or axis.contains(values[name]))  # else a fixed value, outside it
        }
        for name in self.space:
            key = self._inherited(name, values)
            if key is not None:
                params[name] = values[key]
                params.pop(key, None)  # an axis that this trial does not have
        return {name: params[name] for name in self.space if name in params}

    def _inherited(self, name: str, values: dict[str, Any]) -> str | None:
        """Return the key of a part whose value, in a trial with `values`, comes from the axis `name`; else None."""
        if not name.startswith(SHARED) or not active(self.space[name], values):
            return None
        option = name.removeprefix(SHARED).replace("name", "optimizer")
        own = flatten(self.trial).keys() | {other for other, axis in self.space.items() if active(axis, values)}
        return next((key for part in ROOMS if (key := f"{part}.{option}") in values and key not in own), None)

    def control_configs(self) -> list[TrialConfig]:
        """Return the controls' configs: none where `control` is null.

        They are each head of the space (lp where there is none) fitted to the end without a prompt, which takes
        seconds, and every combination of the lists of `control`.
        """
        if self.control is None:
            return []
        axis = self.space.get("head.kind")
        mappings = (axis and axis.choice) or [self.trial_config(self.example()).head.kind]
        learned = [name for name, kind in kinds("head").items() if issubclass(kind, LearnedHeadConfig)]
        heads = [name for name in mappings if name in learned] or ["lp"]
        cells = [FITTED_HEAD | {"head.kind": head} for head in heads]
        return [self.trial_config(cell) for cell in [*cells, *self.control_cells()]]

    def control_cells(self) -> list[dict[str, Scalar]]:
        """Return every combination of the lists of `control`: none where it has no keys."""
        lists = [value if isinstance(value, list) else [value] for value in (self.control or {}).values()]
        return [dict(zip(self.control or {}, cell, strict=True)) for cell in itertools.product(*lists)] if lists else []

    def modules(self) -> set[Path]:
        """Return the files of the user's own that its trials' backbones are registered by."""
        key = "backbone.module"
        axis, control = self.space.get(key), (self.control or {}).get(key)
        paths = [self.trial.get("backbone", {}).get("module"), *(axis.examples() if axis else [])]
        paths += control if isinstance(control, list) else [control]
        return {absolute(path) for path in paths if path is not None}

    def control_names(self) -> set[str]:
        """Return the names of the control's trials, with those that confirm it."""
        configs = self.control_configs()
        again = [self.confirmed(config, seed) for config in configs for seed in self.seeds]
        return {config.content_hash() for config in [*configs, *again]}

    def arms(self) -> dict[Scalar, Spec]:
        """Return the arms, which are searched by themselves: the space at each value of `search.equal`.

        Each has its part of the trials. Without `search.equal` the spec itself is the only arm, that of None.
        """
        name = self.search.equal
        if name is None:
            return {None: self}
        values = self.space[name].choice or []
        arms = {}
        for i, value in enumerate(values):
            trials = len(range(i, self.number_of_trials(), len(values)))
            first = [point for point in self.search.try_first if point.get(name, value) == value]
            changes = {"equal": None, "seconds": None, "trials": trials, "try_first": first}
            search = self.search.model_copy(update=changes)
            arms[value] = self.model_copy(update={"space": self.space | {name: Axis(choice=[value])}, "search": search})
        return arms

    def arm(self, config: TrialConfig) -> Scalar:
        """Return the arm that a config belongs to."""
        return self.params(config)[self.search.equal] if self.search.equal else None

    def ordered_axes(self) -> dict[str, Axis]:
        """Return the axes, each after those that its condition names. Raises ValueError naming a cycle."""
        ordered: dict[str, Axis] = {}
        while len(ordered) < len(self.space):
            ready = [
                name
                for name, axis in self.space.items()
                if name not in ordered and axis.conditions().keys() <= ordered.keys()
            ]
            if not ready:
                raise ValueError(f"conditions in a circle: {', '.join(n for n in self.space if n not in ordered)}")
            ordered |= {name: self.space[name] for name in ready}
        return ordered

    def cells(self) -> list[dict[str, Scalar]]:
        """Return every point of a space whose axes can all be listed, each valid one once, in a fixed order.

        Raises ValueError for more of them than a grid may have.
        """
        cells: list[dict[str, Scalar]] = [{}]
        for name, axis in self.ordered_axes().items():
            grown = []
            for cell in cells:
                in_use = axis.at(cell)
                grown += [cell | {name: value} for value in in_use[1].values() or []] if in_use else [cell]
                if len(grown) > MAX_CELLS:
                    raise ValueError(f"a grid may have {MAX_CELLS} cells, and this one has more")
            cells = grown
        return cells

    def example(self, fixed: dict[str, Scalar] | None = None) -> dict[str, Scalar]:
        """Return a point of the space that has the parameters `fixed` and the axes these need; else first values."""
        point = dict(fixed or {})
        for name in reversed(self.ordered_axes()):
            if name in point:
                point = {o: allowed[0] for o, allowed in self.space[name].having(point[name]).when.items()} | point
        for name, axis in self.ordered_axes().items():
            in_use = axis.at(point)
            if name not in point and in_use:
                point[name] = in_use[1].examples()[0]
        return point

    def compared_within(self) -> list[str]:
        """Return the axes on which trials have the same values that early stopping compares."""
        within = self.early_stopping.within
        if within is None:
            within = [name for name in COMPARABLE if name in self.space]
        return list(dict.fromkeys([*([self.search.equal] if self.search.equal else []), *within]))

    def max_epochs(self) -> int:
        """Return the epochs of the longest trial."""
        lengths = (
            self.space["epochs"].examples() if "epochs" in self.space else [self.trial_config(self.example()).epochs]
        )
        return max(lengths)

    def short_names(self) -> dict[str, str]:
        """Return a short name for each axis."""
        return shortened(self.space)

    def named_keys(self) -> list[str]:
        """Return the keys of a trial that this sweep says something about, and those that anybody asks for first."""
        mentioned = [*self.space, *flatten(self.trial), *(self.control or {})]
        shared = [key.removeprefix(SHARED) for key in mentioned if key.startswith(SHARED)]
        mentioned += [f"{part}.{key.replace('name', 'optimizer')}" for key in shared for part in ROOMS]
        seeds = ["init_seed", "order_seed"] if self.seeds else []
        return list(dict.fromkeys(["method", "head.kind", "epochs", "batch_size", *mentioned, *seeds]))

    def number_of_trials(self) -> int:
        """Count the trials of the search."""
        return self.search.trials or len(self.cells())

    def number_of_confirmations(self) -> int:
        """At most: trials that failed, or that have no seed, make it less."""
        configs = sum(min(self.top, arm.number_of_trials()) for arm in self.arms().values())
        controls = [
            len({self.confirmed(config, seed).content_hash() for seed in self.seeds})
            for config in self.control_configs()
        ]
        return configs * len(self.seeds) + max(controls, default=0)


def leave_out_idle(values: dict[str, Any]) -> tuple[TrialConfig, dict[str, str]]:
    """Remove the keys without effect from the values of a trial; return its config, and those keys with the reasons.

    Raises ValidationError for values that are wrong, or don't go together.
    """
    without_effect: dict[str, str] = {}
    while True:
        try:
            return TrialConfig.model_validate(values), without_effect
        except ValidationError as error:
            errors = error.errors()
            reasons = {dotted(located(one, TrialConfig)): one["msg"] for one in errors}
            if any(one["type"] != NO_EFFECT for one in errors):
                raise
            if not any([remove_dotted(values, key) for key in reasons]):
                raise
            without_effect |= reasons


def active(axis: Axis, params: dict[str, Scalar]) -> bool:
    """Return whether `axis` exists at a point whose other parameters are `params`."""
    return axis.at(params) is not None


def shortened(keys: Collection[str]) -> dict[str, str]:
    """Return each dotted path by its last part, if no other of them ends in it; a kind by the part it is of."""
    ends = {key: key.removesuffix(".kind").split(".")[-1] for key in keys}
    many = Counter(ends.values())
    return {key: end if many[end] == 1 else key for key, end in ends.items()}


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Put `value` in at the dotted path `key`."""
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    values[last] = value


def remove_dotted(values: dict[str, Any], key: str) -> bool:
    """Remove the dotted path `key`; return whether it was there."""
    *parents, last = key.split(".")
    node: Any = values
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        return False
    del node[last]
    return True


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value
