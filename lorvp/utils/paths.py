"""Locate the folder that this code lies in."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The folder that holds `lorvp`, `cluster` and `sweeps`: a checkout, site-packages, or a copy made for jobs."""
