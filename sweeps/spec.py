"""What a sweep is: one YAML file, read into a validated `Spec` whose errors name file, line and key."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from cluster import profile as profiles
from lorvp.config import AbsolutePath, Part, TrialConfig
from lorvp.errors import UserError
from lorvp.yaml_file import Location, YamlFile, closest, explain, parse_value

Fail = Callable[[Location, str], NoReturn]


def _scalar(value: Any) -> Any:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"must be a single number, text, true, false or null, not {value!r}")
    return value


# Not a union: pydantic would name each of its members in an error.
Scalar = Annotated[Any, AfterValidator(_scalar)]
OneOrMore = Annotated[Any, AfterValidator(lambda v: [_scalar(one) for one in (v if isinstance(v, list) else [v])])]
OBJECTIVES = {"val_top1": "max", "val_top5": "max", "val_loss": "min"}


class Axis(Part):
    """One key of TrialConfig that the search chooses: exactly one of choice, uniform, log_uniform and int."""

    choice: Annotated[list[Scalar], Field(min_length=1)] | None = Field(None, description="one of these values")
    uniform: tuple[float, float] | None = Field(None, description="[low, high]")
    log_uniform: tuple[float, float] | None = Field(None, description="[low, high], both above 0")
    integers: Annotated[list[int], Field(min_length=2, max_length=3)] | None = Field(
        None, alias="int", description="[low, high] or [low, high, step], both ends included"
    )
    when: dict[str, OneOrMore] = Field({}, description="axes, and the values of each under which this one exists")

    @model_validator(mode="after")
    def _is_one_kind(self) -> Axis:
        kinds = {"choice": self.choice, "uniform": self.uniform, "log_uniform": self.log_uniform, "int": self.integers}
        given = [kind for kind, value in kinds.items() if value is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"needs exactly one of choice, uniform, log_uniform, int; it has {found}")
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

    def values(self) -> list[Scalar] | None:
        """Every value it can take, in order; None if they can't be listed."""
        if self.choice is not None:
            return self.choice
        return (
            list(range(self.integers[0], self.integers[1] + 1, *self.integers[2:]))
            if self.integers is not None
            else None
        )

    def examples(self) -> list[Scalar]:
        """The values that must be valid for all of the axis to be."""
        return self.choice or list((self.uniform or self.log_uniform or self.integers)[:2])


class SearchConfig(Part):
    """How configs are chosen: Optuna's samplers, each with an explicit seed, or every cell of a grid."""

    algorithm: Literal["grid", "random", "tpe", "cmaes", "gp"] = "tpe"
    trials: PositiveInt | None = Field(None, description="how many; a grid has as many as it has cells")
    seed: NonNegativeInt = 0
    concurrent: PositiveInt = Field(2, description="trials that run at the same time")


class EarlyStopping(Part):
    """Gives up on trials that fall behind: asha (Li et al. 2020) or the median rule (Golovin et al. 2017)."""

    rule: Literal["none", "asha", "median"] = "none"
    grace_epochs: PositiveInt = Field(1, description="epochs that every trial gets")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(3, description="of asha: one in so many goes on at a rung")


class FailureLimit(Part):
    """Ends a sweep that fails from its start: once more than `share` of the first `trials` have failed."""

    share: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="1 lets every trial fail")
    trials: PositiveInt = 8


class Tracking(Part):
    """Where MLflow records: by default SQLite in the output folder, or what MLFLOW_TRACKING_URI names."""

    uri: str | None = None
    experiment: str = "lorvp"


def _usable_as_folder(name: str) -> str:
    if not name or name.startswith(".") or any(not (c.isalnum() or c in "-_.") for c in name):
        raise ValueError(f"{name!r} names the sweep's folder: letters, digits, '-', '_' and '.' only")
    return name


class Spec(Part):
    """A sweep. `trial` holds the fixed values of a TrialConfig, `space` the axes by dotted path."""

    name: Annotated[str, AfterValidator(_usable_as_folder)]
    trial: dict[str, Any] = Field(description="values of TrialConfig that all trials share")
    space: dict[str, Axis] = Field(description="keys of TrialConfig that the search chooses, by dotted path")
    search: SearchConfig = SearchConfig()
    early_stopping: EarlyStopping = EarlyStopping()
    failure_limit: FailureLimit = FailureLimit()
    objective: Literal["val_top1", "val_top5", "val_loss"] = "val_top1"
    control: dict[str, Any] = Field(
        {}, description="values, by dotted path, that make the control; lists are tried one by one"
    )
    cluster: str = Field("local", description="a profile in cluster/profiles, or the path of one")
    tracking: Tracking = Tracking()
    output: AbsolutePath = Field(Path("runs"), validate_default=True, description="folder of all sweeps")

    @property
    def mode(self) -> str:
        return OBJECTIVES[self.objective]

    @property
    def folder(self) -> Path:
        return self.output / self.name

    @property
    def trials(self) -> Path:
        return self.folder / "trials"

    def trial_config(self, params: dict[str, Scalar]) -> TrialConfig:
        """The config of one point of the space: `trial` with `params`, by dotted path, put in."""
        values: dict[str, Any] = _copy(self.trial)
        for key, value in params.items():
            set_dotted(values, key, value)
        return TrialConfig.model_validate(values)

    def control_configs(self) -> list[TrialConfig]:
        """The control's configs: every combination of its lists; none where the spec asks for no control."""
        if not self.control:
            return []
        lists = [value if isinstance(value, list) else [value] for value in self.control.values()]
        return [self.trial_config(dict(zip(self.control, cell, strict=True))) for cell in itertools.product(*lists)]

    def ordered_axes(self) -> dict[str, Axis]:
        """The axes, each after those that its condition names. Raises ValueError naming a cycle."""
        ordered: dict[str, Axis] = {}
        while len(ordered) < len(self.space):
            ready = [
                name for name, axis in self.space.items() if name not in ordered and set(axis.when) <= set(ordered)
            ]
            if not ready:
                raise ValueError(f"conditions in a circle: {', '.join(n for n in self.space if n not in ordered)}")
            ordered |= {name: self.space[name] for name in ready}
        return ordered

    def cells(self) -> list[dict[str, Scalar]]:
        """Every point of a space whose axes can all be listed, each valid one once, in a fixed order."""
        cells: list[dict[str, Scalar]] = [{}]
        for name, axis in self.ordered_axes().items():
            grown = []
            for cell in cells:
                grown += [cell | {name: value} for value in axis.values()] if active(axis, cell) else [cell]
            cells = grown
        return cells

    def example(self, fixed: dict[str, Scalar] | None = None) -> dict[str, Scalar]:
        """A point of the space that has the parameters `fixed` and what they need to exist; else first values."""
        point = dict(fixed or {})
        for name in reversed(self.ordered_axes()):
            if name in point:
                point = {other: allowed[0] for other, allowed in self.space[name].when.items()} | point
        for name, axis in self.ordered_axes().items():
            if name not in point and active(axis, point):
                point[name] = axis.examples()[0]
        return point

    def max_epochs(self) -> int:
        """The epochs of the longest trial."""
        lengths = (
            self.space["epochs"].examples() if "epochs" in self.space else [self.trial_config(self.example()).epochs]
        )
        return max(lengths)

    def short_names(self) -> dict[str, str]:
        """What to call each axis where there is little room: its last part, if no other axis ends in it."""
        last = [name.split(".")[-1] for name in self.space]
        return {name: end if last.count(end) == 1 else name for name, end in zip(self.space, last, strict=True)}

    def number_of_trials(self) -> int:
        return len(self.cells()) if self.search.algorithm == "grid" else self.search.trials


def active(axis: Axis, params: dict[str, Scalar]) -> bool:
    """Whether `axis` exists at a point whose other parameters are `params`."""
    return all(name in params and params[name] in allowed for name, allowed in axis.when.items())


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Puts `value` in at the dotted path `key`."""
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    values[last] = value


def load(path: Path, overrides: Sequence[str] = ()) -> Spec:
    """The spec in `path`, with each override `KEY=VALUE` put in. Raises UserError: one line, with file, line, key."""
    file = YamlFile(path)
    for override in overrides:
        _override(file.values, override)
    spec = file.validate(Spec)
    try:
        spec.ordered_axes()
    except ValueError as error:
        for name, axis in spec.space.items():
            for other in axis.when:
                if other not in spec.space:
                    file.fail(
                        ("space", name, "when", other), f"no such axis in space{closest(other, list(spec.space))}"
                    )
        file.fail(("space",), str(error))
    known = dotted_keys(TrialConfig)
    for kind in ("space", "control"):
        for key in getattr(spec, kind):
            if key not in known:
                file.fail((kind, key), f"no such key of a trial{closest(key, known)}")
    try:
        profiles.load(spec.cluster)
    except UserError as error:
        file.fail(("cluster",), str(error))
    _check_search(spec, file.fail)
    _check_configs(spec, file.fail)
    for part, key in (("dataset", "root"), ("backbone", "checkpoint")):
        if spec.trial[part].get(key) is not None:  # relative to where the user is, not to where a process may run
            spec.trial[part][key] = str(Path(spec.trial[part][key]).expanduser().absolute())
    return spec


def _check_search(spec: Spec, fail: Fail) -> None:
    """What pydantic can't see: whether the algorithm can take these axes, and the conditions be met."""
    search = spec.search
    if not spec.space:
        fail(("space",), "needs at least one axis, as in `optimizer.prompt_lr: {log_uniform: [0.01, 1]}`")
    for name, axis in spec.space.items():
        for other, allowed in axis.when.items():
            for value in allowed:
                possible = spec.space[other].values()
                if possible is not None and value not in possible:
                    fail(("space", name, "when", other), f"{value!r} is not a value of {other}: {possible}")
        if search.algorithm == "grid" and axis.values() is None:
            fail(("space", name), "a grid takes choice and int axes only; list the values in choice")
        if search.algorithm == "cmaes" and axis.choice is not None:
            fail(("space", name), "cmaes can't take categories; use uniform, log_uniform or int, or tpe for the search")
        if search.algorithm == "cmaes" and axis.when:
            fail(("space", name, "when"), "cmaes can't take conditions; use tpe for the search")
    if search.algorithm == "grid" and search.trials not in (None, len(spec.cells())):
        fail(("search", "trials"), f"this grid has {len(spec.cells())} cells; leave trials out")
    if search.algorithm != "grid" and search.trials is None:
        fail(("search",), f"{search.algorithm} needs trials: how many")


def _check_configs(spec: Spec, fail: Fail) -> None:
    """That `trial`, each axis and the control give valid configs."""

    def check(params: dict[str, Scalar], location: Location) -> None:
        try:
            spec.trial_config(params)
        except ValidationError as error:
            inner, message = explain(error, TrialConfig)
            if not inner and "choice" in location and spec.search.algorithm != "grid":
                return  # two values that don't go together; with others this one may
            dotted = ".".join(str(part) for part in inner)
            # an error about a searched key belongs to its axis, any other to the fixed values
            owner = next((key for key in params if dotted == key or dotted.startswith(f"{key}.")), None)
            if owner is None and inner:
                fail(("trial", *inner), message)
            fail(location if owner is None else ("space", owner, *location[2:]), message)

    check(spec.example(), ("trial",))
    for name, axis in spec.space.items():
        for i, value in enumerate(axis.examples()):
            check(spec.example({name: value}), ("space", name, *(("choice", i) if axis.choice else ())))
    if spec.early_stopping.rule != "none" and spec.early_stopping.grace_epochs > spec.max_epochs():
        fail(("early_stopping", "grace_epochs"), f"must be at most epochs, which is {spec.max_epochs()}")
    if spec.search.algorithm == "grid":
        for cell in spec.cells():
            check(cell, ("space",))
    for key, value in spec.control.items():
        if value == []:
            fail(("control", key), "an empty list; give at least one value")
    if spec.control:
        try:
            spec.control_configs()
        except ValidationError as error:
            inner, message = explain(error, TrialConfig)
            dotted = ".".join(str(part) for part in inner)
            if dotted in spec.control:
                fail(("control", dotted), message)
            fail(("control",), f"{dotted}: {message}" if dotted else message)


def dotted_keys(model: type[Part], prefix: str = "") -> list[str]:
    """Every key of a config that holds a value, by dotted path."""
    keys = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Part):
            keys += dotted_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _override(values: dict[str, Any], override: str) -> None:
    """Puts one `KEY=VALUE` in. Keys of `space` and `control` are dotted paths themselves."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip("."):
        raise UserError(f"--set {override}: must be KEY=VALUE, as in search.trials=8")
    try:
        value = parse_value(text)
    except UserError as error:
        raise UserError(f"--set {override}: {error}") from None
    parts = key.strip().split(".")
    node = values
    while True:
        # the longest key that is there already; else one part, or all of an axis's name
        there = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in node), None)
        whole = node is values.get("space") or node is values.get("control")
        taken = there or (len(parts) if whole else 1)
        name, parts = ".".join(parts[:taken]), parts[taken:]
        if not parts:
            node[name] = value
            return
        if not isinstance(node.get(name), dict):
            node[name] = {}
        node = node[name]


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value
