"""Layers of PyTorch against their counterparts in Flax, Equinox and Optax, measured in float64: docs/porting.md."""
