"""torch without its compiler, which a job does not use: importing it would take 2 of the 6 s of a job's start."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

NAMES = ("torch._dynamo", "torch._dynamo.utils")


class _StandIn(types.ModuleType):
    """Answers what optimizers and timm ask of `torch._dynamo` when nothing is compiled; for all else, loads it."""

    def disable(self, fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return (lambda function: function) if fn is None else fn

    def graph_break(self, *args: Any, **kwargs: Any) -> None:
        pass

    def is_compile_supported(self, device_type: str) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        asks_for_submodules = name == "__path__" and self.__name__ == NAMES[0]  # by which its submodules are found
        if name.startswith("__") and not asks_for_submodules:  # what Python asks of any module
            raise AttributeError(name)
        for module_name in NAMES:
            if isinstance(sys.modules.get(module_name), _StandIn):
                del sys.modules[module_name]
        return getattr(importlib.import_module(self.__name__), name)


def stub_out_compiler() -> None:
    """To be called before torch is imported, by a process that compiles nothing."""
    for name in NAMES:
        sys.modules.setdefault(name, _StandIn(name))
