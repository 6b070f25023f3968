"""LoR-VP: low-rank visual prompts for frozen vision models."""

from __future__ import annotations

from typing import Any

__all__ = ["TrialConfig", "__version__", "load", "train"]

# The one place: pyproject.toml reads it from here, and so does a checkout or a job's copy that nobody has installed.
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports on first use: configs are read in places that have no use for torch."""
    if name == "TrialConfig":
        from lorvp.config import TrialConfig

        return TrialConfig
    if name == "load":
        from lorvp.bundle.io import load

        return load
    if name == "train":
        from lorvp.training.loop import train

        return train
    raise AttributeError(f"module 'lorvp' has no attribute {name!r}")
