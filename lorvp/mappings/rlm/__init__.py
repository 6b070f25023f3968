"""RLM, a random label mapping."""
