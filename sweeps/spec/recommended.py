"""The ranges that a spec gets for `recommended: true`: the one place to change them (grounds: docs/results.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

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


NONE = f"has no recommended range; {', '.join(RANGES)} have one"
"""The error about an axis of another key."""


def fill_in(spec: Any) -> Any:
    """Return a spec's values, as they are read, with the recommended ranges put in.

    An axis without one, and one that has a range of its own beside it, is left as it is.
    """
    space = spec.get("space") if isinstance(spec, dict) else None
    if not isinstance(space, dict):
        return spec
    return spec | {"space": {key: _filled(key, axis, space) for key, axis in space.items()}}


def _filled(key: str, axis: Any, space: dict[str, Any]) -> Any:
    if isinstance(axis, list):
        return [_filled(key, each, space) for each in axis]
    if not _asks(axis) or key not in RANGES or axis.keys() - {"recommended", "when"}:
        return axis
    own = {name: value for name, value in axis.items() if name != "recommended"}
    if not isinstance(own.get("when", {}), dict):  # the axis itself says what is wrong
        return RANGES[key] | own
    when = {name: value for name, value in RANGES[key].get("when", {}).items() if name in space}
    return {**RANGES[key], **own, "when": when | own.get("when", {})}


def check_optimizers(spec: dict[str, Any], fail: Callable[[tuple[str, str], str], NoReturn]) -> None:
    """Call `fail` for an axis of a spec, as it is read, whose recommended range is another optimizer's."""
    for key in filter(spec["space"].__contains__, OPTIMIZERS):
        part, axis = key.partition(".")[0], spec["space"][key]
        asking = [each for each in (axis if isinstance(axis, list) else [axis]) if _asks(each)]
        others = [name for each in asking for name in _optimizers(part, each, spec) if name not in OPTIMIZERS[key]]
        if others:
            fail(
                ("space", key),
                f"its recommended range is for {part}.optimizer {' or '.join(OPTIMIZERS[key])}, not {others[0]!r}: "
                "write a range of your own",
            )


def _asks(axis: Any) -> bool:
    return isinstance(axis, dict) and axis.get("recommended") is True


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
