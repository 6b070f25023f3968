"""A prompt along the border of the image."""
