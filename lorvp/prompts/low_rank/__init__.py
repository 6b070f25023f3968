"""The low-rank prompt B·A of LoR-VP."""
