"""What of a trial's results must not differ from run to run."""

from __future__ import annotations

from dataclasses import asdict

from lorvp.result import EpochResult

MEASURED = {"images_per_second", "peak_memory_mib", "seconds", "time"}


def figures(results: list[EpochResult]) -> list[dict]:
    """Everything but what a clock or the memory says."""
    return [{key: value for key, value in asdict(r).items() if key not in MEASURED} for r in results]
