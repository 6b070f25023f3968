"""Build frozen backbones: architectures, weights, and optimizations of their speed."""
