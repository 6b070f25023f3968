"""A sweep's YAML file, read into a `Spec`, and what its folder keeps of it; errors name file, line and key."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from cluster import profile as profiles
from lorvp.config import TrialConfig, backbone_name, of_earlier_form
from lorvp.errors import UserError
from lorvp.models import architectures
from lorvp.parts import Part, absolute, flatten
from lorvp.utils.explain import Location, closest, dotted, explain, without_passwords
from lorvp.utils.yaml_file import YamlFile, parse_value
from sweeps.spec import recommended
from sweeps.spec.choices import algorithm, stopping_rule
from sweeps.spec.model import MAX_CELLS, Scalar, Spec, active

MOST_POINTS = 1000
"""Points of the space that are looked at for one that uses an axis."""
Fail = Callable[[Location, str], NoReturn]
PATHS = (
    ("dataset", "root", absolute),
    *(("backbone", key, absolute) for key in ("checkpoint", "module", "zero_shot")),
    ("backbone", "name", backbone_name),
)
"""A trial's keys that hold a path, and what makes it absolute."""


def load(path: Path, overrides: Sequence[str] = ()) -> Spec:
    """Read the spec in `path`, with each override `KEY=VALUE` put in. Raises UserError with file, line and key."""
    file = YamlFile(path)
    for override in overrides:
        _override(file.values, override)
    spec = file.validate(Spec)
    _check_pinned(spec, overrides)
    try:
        spec.ordered_axes()
    except ValueError as error:
        for name, axis in spec.space.items():
            for other in axis.conditions():
                if other not in spec.space:
                    where = ("space", name, *(() if axis.ranges else ("when", other)))
                    file.fail(where, f"no such axis in space: {other}{closest(other, list(spec.space))}")
        file.fail(("space",), str(error))
    known = dotted_keys(TrialConfig)
    for kind in ("space", "control"):
        for key in getattr(spec, kind) or {}:
            if key not in known:
                _, reason = of_earlier_form(key) or (key, f"no such key of a trial{closest(key, known)}")
                file.fail((kind, key), reason)
    for name, axis in spec.space.items():
        if axis.recommended:
            file.fail(("space", name), recommended.NONE)
    try:
        profile = profiles.load(spec.cluster)
    except UserError as error:
        file.fail(("cluster",), str(error))
    if spec.pack != 1 and profile.gpus > 1:
        file.fail(("pack",), f"must be 1 where a job has {profile.gpus} GPUs, as profile {spec.cluster} gives it")
    _check_search(spec, file.fail)
    _check_confirm(spec, file.fail)
    _check_configs(spec, file.fail)
    recommended.check_optimizers(file.values, file.fail)
    if spec.tracking.uri and without_passwords(spec.tracking.uri) != spec.tracking.uri:
        file.fail(
            ("tracking", "uri"),
            "leave the password out: the spec is copied to the sweep's folder and to MLflow; give the URI in "
            "MLFLOW_TRACKING_URI, or a server's password in MLFLOW_TRACKING_PASSWORD",
        )
    _make_absolute(spec, file.fail)
    return spec


def _make_absolute(spec: Spec, fail: Fail) -> None:
    """Have the trial's paths start from where the user is, not from where a process may run.

    Among them may be values that no trial has had a look at, since an axis stands in their place.
    """
    for part, key, made in PATHS:
        values = spec.trial.get(part, {})
        if not isinstance(values, dict):
            fail(("trial", part), "must be a mapping of its keys")
        if values.get(key) is None:
            continue
        if not isinstance(values[key], str):
            fail(("trial", part, key), f"must be a text, not {values[key]!r}")
        try:
            values[key] = str(made(values[key]))
        except ValueError as error:
            fail(("trial", part, key), str(error))


def check_hub(spec: Spec) -> None:
    """Raise UserError for a backbone that the hub does not have, or that can't be had as the trials want it.

    It asks the hub, and takes what it says where it can't be reached for right: a job may reach it.
    """
    axis = spec.space.get("backbone.name")
    points = [spec.example({"backbone.name": name}) for name in (axis and axis.choice) or []] or [spec.example()]
    configs = spec.control_configs()
    for point in points:
        with suppress(ValidationError):  # values that don't go together
            configs.append(spec.trial_config(point))
    for config in configs:
        if not config.backbone.name.startswith(architectures.HUB):
            continue
        described = architectures.description(config.backbone.name, ask_the_hub=True)
        named = ("backbone", "name"), described
        problem = named if isinstance(described, str) else _problem(config, architectures.load_registry)
        if problem is not None:
            raise UserError(f"{'.'.join(map(str, ('trial', *problem[0])))}: {problem[1]}")


def _check_search(spec: Spec, fail: Fail) -> None:
    """Check what pydantic can't see: that the algorithm takes these axes, and that conditions can be met."""
    search, chosen = spec.search, algorithm(spec.search)
    if not spec.space:
        fail(("space",), "needs at least one axis, as in `prompt.lr: {log_uniform: [0.01, 1]}`")
    for name, axis in spec.space.items():
        for other, allowed in axis.conditions().items():
            for value in allowed:
                possible = spec.space[other].values()
                if possible is not None and value not in possible:
                    where = ("space", name, *(() if axis.ranges else ("when", other)))
                    fail(where, f"{value!r} is not a value of {other}: {possible}")
        if chosen.takes_every_cell and axis.values() is None:
            many = f"an axis of a {search.algorithm} may have {MAX_CELLS} values, and this one has more"
            few = f"a {search.algorithm} takes choice and int axes only; list the values in choice"
            fail(("space", name), few if axis.integers is None else many)
        if axis.choice is not None and not chosen.takes_choices:
            use = "use uniform, log_uniform or int, or tpe for the search"
            fail(("space", name), f"{search.algorithm} can't take categories; {use}")
        if axis.conditions() and not chosen.takes_conditions:
            fail(("space", name, "when"), f"{search.algorithm} can't take conditions; use tpe for the search")
    if chosen.takes_every_cell:
        try:
            cells = len(spec.cells())
        except ValueError as error:
            fail(("space",), str(error))
        if search.trials not in (None, cells):
            fail(("search", "trials"), f"this grid has {cells} cells; leave trials out")
    if search.trials is None and not chosen.takes_every_cell:
        fail(("search",), f"{search.algorithm} needs trials: how many")
    for i, point in enumerate(search.try_first):
        for name, value in point.items():
            if name not in spec.space:
                fail(("search", "try_first", i, name), f"no such axis in space{closest(name, list(spec.space))}")
            if not spec.space[name].contains(value):
                axis = spec.space[name]
                has = ", ".join(map(repr, axis.choice)) if axis.choice else "{} to {}".format(*axis.bounds)
                fail(("search", "try_first", i, name), f"{value!r} is not a value of this axis; it has {has}")
    if search.try_first and chosen.takes_every_cell:
        fail(("search", "try_first"), f"a {search.algorithm} takes every cell in a fixed order; leave it out")
    if search.equal is not None:
        _check_equal(spec, search.equal, fail)
    elif search.seconds is not None:
        fail(("search", "seconds"), "a limit for each value of an axis: needs search.equal to name it")


def _check_equal(spec: Spec, name: str, fail: Fail) -> None:
    """Check that each value of the axis `name` can have an equal share of the trials."""
    location, axis = ("search", "equal"), spec.space.get(name)
    if axis is None:
        fail(location, f"no such axis in space: {name}{closest(name, list(spec.space))}")
    if axis.choice is None:
        fail(location, f"{name} must be a choice axis: only listed values can have equal shares")
    if axis.conditions():
        fail(location, f"{name} exists under a condition only; every trial must have it")
    if algorithm(spec.search).takes_every_cell:
        fail(location, "a grid has every cell anyway; leave equal out")
    if spec.number_of_trials() < len(axis.choice):
        fail(("search", "trials"), f"must be at least {len(axis.choice)}, one for each value of {name}")


def _check_confirm(spec: Spec, fail: Fail) -> None:
    """Check that what the confirmation decides is decided by nothing else."""
    for kind in ("trial", "space", "control"):
        if "dataset.train_on_val" in flatten(getattr(spec, kind) or {}):
            location = ("trial", "dataset", "train_on_val") if kind == "trial" else (kind, "dataset.train_on_val")
            fail(location, "the search chooses by the validation images: confirm.all_images trains on them at its end")
    if spec.confirm is None:
        return
    used = [seed for seed in spec.seeds if spec.trains_under(seed)]
    if used:
        fail(
            ("confirm", "seeds"),
            f"the search trains under seed {used[0]} (init_seed, order_seed) and has chosen by it; others confirm, as "
            f"{spec.unused_seeds(len(spec.seeds))}",
        )
    if spec.all_images and spec.trial.get("rungs") and any("train_share" in rung for rung in spec.trial["rungs"]):
        fail(("confirm", "all_images"), "a rung trains on a part of the images: leave its train_share out")
    for kind in ("trial", "space", "control"):
        if "read_test" in (getattr(spec, kind) or {}) and not spec.confirm.added_later:
            fail((kind, "read_test"), "leave it out beside confirm: only the confirmation reads the test set")
    for kind in ("space", "control"):
        if "select" in (getattr(spec, kind) or {}):
            fail((kind, "select"), "leave it out beside confirm: the search selects by val; trial.select may be given")


def _check_configs(spec: Spec, fail: Fail) -> None:
    """Check that `trial`, each axis and the control give valid configs."""
    known = functools.cache(architectures.load_registry)  # of thousands of models, and the same for every config
    unused = set(spec.space)
    fixed = dict.fromkeys(flatten(spec.trial), "")
    for name in spec.space:
        parent = name.partition(".")[0]
        if parent != name and not isinstance(spec.trial.get(parent, {}), dict):
            fail(("trial", parent), f"must be a mapping of its keys, not {spec.trial[parent]!r}")

    def check(params: dict[str, Scalar], location: Location) -> None:
        try:
            config, without_effect = spec.resolve(params)
            problem = _problem(config, known)
        except ValidationError as error:
            problem = explain(error, TrialConfig)
        if problem is None:
            unused.difference_update(params.keys() & spec.params(config).keys())
            _keep_unused(fixed, without_effect)
            return
        inner, message = problem
        if not inner and "choice" in location and not algorithm(spec.search).takes_every_cell:
            return  # two values that don't go together; with others this one may
        key = dotted(inner)
        # an error about a searched key belongs to its axis, any other to the fixed values
        owner = next((name for name in params if key == name or key.startswith(f"{name}.")), None)
        if owner is None and inner:
            fail(("trial", *inner), message)
        fail(location if owner is None or owner in location else ("space", owner), message)

    check(spec.example(), ("trial",))
    for name, axis in spec.space.items():
        for i, value in enumerate(axis.examples()):
            listed = axis.choice is not None and axis.ranges is None
            check(spec.example({name: value}), ("space", name, *(("choice", i) if listed else ())))
    if spec.search.equal is not None:
        _check_arms(spec, spec.search.equal, fail)
    _check_used(spec, unused, fixed, fail)
    for i, name in enumerate(spec.early_stopping.within or []):
        if name not in spec.space:
            fail(("early_stopping", "within", i), f"no such axis in space: {name}{closest(name, list(spec.space))}")
        if spec.space[name].choice is None:
            fail(("early_stopping", "within", i), f"{name} must be a choice axis: only listed values can be compared")
    if stopping_rule(spec.early_stopping).stops and (spec.early_stopping.grace_epochs or 1) > spec.max_epochs():
        fail(("early_stopping", "grace_epochs"), f"must be at most epochs, which is {spec.max_epochs()}")
    if algorithm(spec.search).takes_every_cell:
        for cell in spec.cells():
            check(cell, ("space",))
    for key, value in (spec.control or {}).items():
        if value == []:
            fail(("control", key), "an empty list; give at least one value")
    if spec.control:
        _check_control(spec, fail)
        try:
            problem = next(filter(None, (_problem(config, known) for config in spec.control_configs())), None)
        except ValidationError as error:
            problem = explain(error, TrialConfig)
        if problem is not None:
            inner, message = problem
            key = dotted(inner)
            if key in spec.control:
                fail(("control", key), message)
            fail(("control",), f"{key}: {message}" if key else message)


def _check_control(spec: Spec, fail: Fail) -> None:
    """Check that each key of `control` has an effect in one of its trials."""
    unused = dict.fromkeys(spec.control or {}, "")
    for cell in spec.control_cells():
        with suppress(ValidationError):  # said by the caller
            _keep_unused(unused, spec.resolve(cell)[1])
    for key, reason in unused.items():
        if reason:
            fail(("control", key), f"no control has a use for it: {reason}")


def _check_used(spec: Spec, unused: set[str], fixed: dict[str, str], fail: Fail) -> None:
    """Check that some point of the space uses each axis, and each fixed value.

    The axes in `unused` and the keys of `trial` in `fixed` have not been seen in use yet; these have the reasons.
    """
    for point in _points(spec):
        if not (unused or fixed):
            return
        with suppress(ValidationError):  # values that don't go together
            config, without_effect = spec.resolve(point)
            unused.difference_update(point.keys() & spec.params(config).keys())
            _keep_unused(fixed, without_effect)
    for name in spec.space:
        if name in unused:
            fail(("space", name), "no trial of this sweep has a use for it; leave it out")
    for key, reason in fixed.items():
        if key not in spec.space:
            fail(("trial", *key.split(".")), f"no trial of this sweep has a use for it: {reason}")


def _points(spec: Spec, fixed: Mapping[str, Scalar] = {}) -> Iterator[dict[str, Scalar]]:
    """Yield the points that have the parameters `fixed`, by the combinations of the other choice axes' values."""
    seen = set()
    choices = {name: axis.choice for name, axis in spec.space.items() if axis.choice is not None and name not in fixed}
    for values in itertools.islice(itertools.product(*choices.values()), MOST_POINTS):
        chosen = spec.example(dict(zip(choices, values, strict=True)) | dict(fixed))
        point = {name: value for name, value in chosen.items() if active(spec.space[name], chosen)}
        key = frozenset((name, type(value), value) for name, value in point.items())
        if key not in seen:  # combinations differ in axes that do not exist there, too
            seen.add(key)
            yield point


def _keep_unused(fixed: dict[str, str], without_effect: dict[str, str]) -> None:
    """Keep the keys in `fixed` that have no effect at another point of the space, too, with the reasons."""
    unused = {key: without_effect[key] for key in fixed if key in without_effect}
    fixed.clear()
    fixed.update(unused)


def _problem(
    config: TrialConfig, known: Callable[[Path | None], architectures.Registry | None]
) -> tuple[Location, str] | None:
    """Return what is wrong with a valid config's backbone, as far as that is known without torch, and its key."""
    module = config.backbone.module
    if module is not None and not module.is_file():
        return None  # said where files are looked for; a sweep that has its copy may still be shown
    try:
        registered = known(module)
    except UserError as error:
        return ("backbone", "module"), str(error).removeprefix("backbone.module: ")
    problem = architectures.find_problem(config, registered) if registered else None
    return (tuple(filter(None, problem[0].split("."))), problem[1]) if problem else None


def _check_arms(spec: Spec, name: str, fail: Fail) -> None:
    """Check that trials have the values of `search.equal` as they are spelt, since these tell a trial's arm."""
    for place, value in enumerate(spec.space[name].examples()):
        for point in _points(spec, {name: value}):
            with suppress(ValidationError):  # values that don't go together
                actual = spec.params(spec.trial_config(point)).get(name)
                if actual != value:
                    listed = [key for key in spec.space if key in point and spec.space[key].choice and key != name]
                    others = ", ".join(f"{key} {point[key]}" for key in listed)
                    beside = f" beside {others}" if others else ""
                    message = f"search.equal needs it as a trial has it: {actual!r}, not {value!r}{beside}"
                    fail(("space", name, "choice", place), message)


def dotted_keys(model: type[Part], prefix: str = "") -> list[str]:
    """Return every key of a config that holds a value, by dotted path."""
    keys = []
    for name, field in model.model_fields.items():
        for kind in parts_within(field):
            keys += dotted_keys(kind, f"{prefix}{field.alias or name}.")
        if not parts_within(field):
            keys.append(prefix + (field.alias or name))
    return list(dict.fromkeys(keys))


def parts_within(field: FieldInfo) -> list[type[Part]]:
    """Return the models that a key's mapping may be of: one, several kinds of a part, or none for another value.

    A list or a mapping of models is such a value: none of their keys has a dotted path.
    """
    union = get_origin(field.annotation) in (Union, UnionType)
    options = get_args(field.annotation) if union else (field.annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, Part)]


def settable_keys(begun: str) -> list[str]:
    """Return the keys for `--set` that begin so, for a shell to complete."""
    trial = dotted_keys(TrialConfig)
    own = [key for key in dotted_keys(Spec) if key not in ("trial", "space", "control")]
    keys = own + [f"{part}.{key}" for part in ("trial", "space", "control") for key in trial]
    return [f"{key}=" for key in keys if key.startswith(begun)]


def _check_pinned(spec: Spec, overrides: Sequence[str]) -> None:
    """Raise UserError for a value of the trial that an axis would replace in every point of the space."""
    for override in overrides:
        key, _, text = override.partition("=")
        name = key.strip().removeprefix("trial.")
        if name != key.strip() and name in spec.space and not spec.space[name].conditions():
            raise UserError(
                f"--set {override}: {name} is an axis, and the search would choose it; "
                f"--set 'space.{name}={{choice: [{text}]}}' pins it"
            )


def _override(values: dict[str, Any], override: str) -> None:
    """Put one `KEY=VALUE` in. Keys of `space` and `control` are dotted paths themselves."""
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
        known_length = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in node), None)
        dotted_names = node is values.get("space") or node is values.get("control")
        length = known_length or (len(parts) if dotted_names else 1)
        name, parts = ".".join(parts[:length]), parts[length:]
        if not parts:
            node[name] = value
            return
        if not isinstance(node.get(name), dict):
            node[name] = {}
        node = node[name]
