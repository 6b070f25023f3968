"""Specs that tests change."""

from __future__ import annotations

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
