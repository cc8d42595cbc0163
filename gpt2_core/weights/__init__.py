"""Weights in their canonical form, the layouts of both trainers, and safetensors files."""

from gpt2_core.weights.canonical import DTYPES, Stored, StoredArrays, Weights

__all__ = ["DTYPES", "Stored", "StoredArrays", "Weights"]
