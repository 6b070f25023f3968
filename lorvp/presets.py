"""Name the methods: each is a preset of a trial's parts, and parts have the name of their preset.

`lorvp` is the prompt low_rank, `vpt` an adapter, and `lorvp+vpt` both.
"""

from __future__ import annotations

import functools
from typing import Any

from lorvp.parts import AdapterConfig, HeadConfig, Kind, PromptConfig, kinds

LINEAR_PROBE = "linear_probe"
"""The preset without a prompt and without an adapter."""
LP_FT = "lp_ft"
"""The preset of fine-tuning that starts from a fitted head (Kumar et al. 2022, AnanyaKumar/transfer_learning)."""
FITTED = {"init": "fitted"}
Parts = dict[str, dict[str, Any]]
"""Values that a preset gives to the keys of the parts."""


def names() -> list[str]:
    """List the presets that are not put together of two others."""
    return sorted([*_prompts(), *_adapters(), LINEAR_PROBE])


def parts_of(method: str) -> Parts:
    """Return what a preset says of a trial's parts. Raises ValueError for an unknown one."""
    prompts, adapters = _prompts(), _adapters()
    for name in method.split("+"):
        if name not in names():
            raise ValueError(f"unknown name {name!r}; one of {', '.join(names())}")
    first, *others = method.split("+")
    if others and (first not in prompts or len(others) > 1 or others[0] not in adapters):
        known = ", ".join(f"{first if first in prompts else 'lorvp'}+{name}" for name in adapters)
        raise ValueError(f"method {method}: what goes together is a prompt and an adapter: {known}")
    parts: Parts = {"prompt": {"kind": "none"}, "adapter": {"kind": "none"}}
    for name in (first, *others):
        parts |= prompts.get(name, {}) | adapters.get(name, {})
    return parts


def name_of(prompt: PromptConfig, adapter: AdapterConfig, head: HeadConfig) -> str:
    """Return the name of the preset that has these parts."""
    fitted_first = adapter.method == "fine_tuning" and head.fitted
    parts = [prompt.method, LP_FT if fitted_first else adapter.method]
    return "+".join(part for part in parts if part is not None) or LINEAR_PROBE


@functools.cache
def _prompts() -> dict[str, Parts]:
    return {name: {"prompt": {"kind": kind.model_fields["kind"].default}} for name, kind in _named("prompt").items()}


@functools.cache
def _adapters() -> dict[str, Parts]:
    own = {name: {"adapter": {"kind": kind.model_fields["kind"].default}} for name, kind in _named("adapter").items()}
    return own | {LP_FT: own["fine_tuning"] | {"head": FITTED}}


def _named(part: str) -> dict[str, type[Kind]]:
    return {kind.method: kind for kind in kinds(part).values() if kind.method is not None}
