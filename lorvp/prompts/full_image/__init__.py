"""A prompt with a free value for every pixel."""
