"""ILM, a label mapping by frequency that is made anew before each epoch."""
