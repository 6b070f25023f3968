"""Save a trained prompt as a folder and load it: its format, its tensors, its model card."""
