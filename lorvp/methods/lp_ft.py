"""LP-FT: a fitted head first, then fine-tuning."""

from __future__ import annotations

from lorvp.methods.fine_tuning import FineTuning


class LPFT(FineTuning):
    """Fine-tuning from a fitted linear probe (Kumar et al. 2022, AnanyaKumar/transfer_learning)."""
