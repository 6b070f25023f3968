"""LoR-VP: low-rank visual prompts for frozen vision models."""

from __future__ import annotations

from typing import Any

__all__ = ["TrialConfig", "__version__", "load", "train"]

# The one place: pyproject.toml reads it from here, and so does a checkout or a job's copy that nobody has installed.
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the public names on first use, because configs are also read where torch is not needed."""
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
