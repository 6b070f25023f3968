"""Specs that tests change."""

from __future__ import annotations

GOOD = """\
name: good
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: digits}
  epochs: 4
space:
  label_mapping: {choice: [flm, fm, lp]}
  prompt.rank: {int: [1, 3]}
  optimizer.prompt_lr: {choice: [1e-3, 0.1]}
  optimizer.head_lr: {choice: [0.1, 1], when: {label_mapping: [fm, lp]}}
search: {algorithm: grid}
early_stopping: {rule: asha, grace_epochs: 2}
"""
