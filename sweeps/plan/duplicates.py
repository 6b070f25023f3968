"""Whether validation images are nearly training images, as it is said before a sweep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lorvp
from lorvp.errors import UserError
from sweeps.spec.model import Spec

PATIENCE = 300.0
"""Seconds after which the search for near-duplicates is given up: a slow disk."""


def duplicates_line(spec: Spec) -> str | None:
    """Say that more than a few validation images have near-duplicates in train, or why that can't be told.

    Dataset digits is known to have none, and a plan is shown before the data are there, too. The images are read in
    another process, as a driver does without torch. Raises UserError for `dataset.groups` that no trial could split by.
    """
    dataset = spec.trial_config(spec.example()).dataset
    if dataset.root is None or not dataset.root.exists():
        return None
    command = [sys.executable, "-m", "lorvp.data", "duplicates", dataset.model_dump_json()]
    paths = [str(Path(lorvp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    except subprocess.TimeoutExpired:
        return f"near-duplicates in val: not looked for any longer after {PATIENCE:.0f} s"
    if done.returncode:
        (reason,) = done.stderr.strip().splitlines()[-1:] or ["no word"]
        reason = reason.removeprefix("error: ")
        if reason.startswith("dataset."):  # a key of which each trial would die
            raise UserError(f"trial.{reason}")
        return f"near-duplicates in val: can't be looked for: {reason}"
    return done.stdout.strip() or None
