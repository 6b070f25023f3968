"""Specs that tests change."""

from __future__ import annotations

from pathlib import Path

from sweeps.spec import file as spec_file
from sweeps.spec.model import Spec

GOOD = """\
name: good
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: digits}
  epochs: 4
space:
  head.kind: {choice: [flm, fm, lp]}
  prompt.rank: {int: [1, 3]}
  prompt.lr: {choice: [1e-3, 0.1]}
  head.lr: {choice: [0.1, 1], when: {head.kind: [fm, lp]}}
search: {algorithm: grid}
early_stopping: {rule: asha, grace_epochs: 2}
"""


def load(folder: Path, text: str, *overrides: str) -> Spec:
    """Read a spec of that text, from a file in `folder`."""
    (folder / "sweep.yaml").write_text(text)
    return spec_file.load(folder / "sweep.yaml", overrides)
