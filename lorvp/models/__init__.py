"""Frozen backbones: architectures, weights, and what makes them faster."""
