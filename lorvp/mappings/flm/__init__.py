"""FLM, a label mapping by frequency."""
