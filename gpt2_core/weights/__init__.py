"""Weights in their canonical form, the table of every format's layout, and the files that need no framework."""

from gpt2_core.weights.canonical import DTYPES, Stored, StoredArrays, Weights
from gpt2_core.weights.safetensors import read_safetensors, write_safetensors

__all__ = ["DTYPES", "Stored", "StoredArrays", "Weights", "read_safetensors", "write_safetensors"]
