"""ILM-VP's prompt, a frame around the shrunken image."""
