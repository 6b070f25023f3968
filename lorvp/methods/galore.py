from __future__ import annotations

from lorvp.methods.fine_tuning import FineTuning


class GaLore(FineTuning):
    """Fine-tuning in which the backbone's optimizer is GaLore (`lorvp/galore.py`), and the head's `optimizer.name`."""
