"""The ranges that a spec gets for `recommended: true`: the one place to change them (grounds: docs/results.md)."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticCustomError

from lorvp.parts import flatten

RANGES: dict[str, dict[str, Any]] = {
    "prompt.lr": {"log_uniform": [0.005, 0.06]},
    "prompt.rank": {"choice": [4, 16]},
    "head.lr": {"log_uniform": [0.003, 0.3]},
    "head.init": {"choice": ["random", "fitted"]},
    "head.fit": {"choice": [0.001, "best"], "when": {"head.init": "fitted"}},
}
"""By key of TrialConfig."""
OPTIMIZERS = {"prompt.lr": ("adam", "adamw"), "head.lr": ("sgd",)}
"""The optimizers of the part that a range was measured with."""


def fill_in(spec: Any) -> Any:
    """Return a spec's values, as they are read, with the recommended ranges put in.

    Raises PydanticCustomError about an axis that has none.
    """
    space = spec.get("space") if isinstance(spec, dict) else None
    if not isinstance(space, dict):
        return spec
    return spec | {"space": {key: _filled(key, axis, spec) for key, axis in space.items()}}


def _filled(key: str, axis: Any, spec: dict[str, Any]) -> Any:
    if isinstance(axis, list):
        return [_filled(key, each, spec) for each in axis]
    if not isinstance(axis, dict) or axis.get("recommended") is not True:
        return axis
    if beside := axis.keys() - {"recommended", "when"}:
        raise _error(key, f"recommended stands in place of {min(beside)}: leave one of them out")
    if key not in RANGES:
        raise _error(key, f"has no recommended range; {', '.join(RANGES)} have one")
    part = key.partition(".")[0]
    for optimizer in _optimizers(part, axis, spec) if key in OPTIMIZERS else []:
        if optimizer not in OPTIMIZERS[key]:
            raise _error(
                key,
                f"its recommended range is for {part}.optimizer {' or '.join(OPTIMIZERS[key])}, not {optimizer}: "
                "write a range of your own",
            )
    recommended = RANGES[key]
    own = {name: value for name, value in axis.items() if name != "recommended"}
    if not isinstance(own.get("when", {}), dict):  # the axis itself says what is wrong
        return recommended | own
    when = {name: value for name, value in recommended.get("when", {}).items() if name in spec["space"]}
    when |= own.get("when", {})
    return {**recommended, **own, "when": when}


def _optimizers(part: str, axis: dict[str, Any], spec: dict[str, Any]) -> list[Any]:
    """Return the optimizers that a part may have under an axis's condition."""
    own, shared = f"{part}.optimizer", "optimizer.name"
    trial, space = spec.get("trial"), spec["space"]
    fixed = flatten(trial) if isinstance(trial, dict) else {}
    when = axis["when"] if isinstance(axis.get("when"), dict) else {}
    for key in (own, shared):
        for given in (when.get(key), _choice(space.get(key)), fixed.get(key)):
            if given is not None:
                return given if isinstance(given, list) else [given]
    return ["sgd"]


def _choice(axis: Any) -> Any:
    return axis.get("choice") if isinstance(axis, dict) else None


def _error(key: str, reason: str) -> PydanticCustomError:
    return PydanticCustomError("recommended", "{reason}", {"key": ("space", key), "reason": reason})
