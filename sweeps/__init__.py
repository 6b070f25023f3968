"""Sweeps: what reads the YAML files, searches, records in MLflow and reports."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["load"]

# A sweep talks to nobody that its spec doesn't name, and to the user in its own words.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def __getattr__(name: str) -> Any:
    """Import on first use: MLflow takes seconds."""
    if name == "load":
        from sweeps.tracking.registry import load

        return load
    raise AttributeError(f"module 'sweeps' has no attribute {name!r}")
