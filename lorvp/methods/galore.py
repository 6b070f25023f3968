"""GaLore: fine-tuning by gradients of low rank."""

from __future__ import annotations

from lorvp.methods.fine_tuning import FineTuning


class GaLore(FineTuning):
    """Fine-tuning with GaLore (`lorvp/optim/galore.py`) for the backbone, and `optimizer.name` for the head."""
