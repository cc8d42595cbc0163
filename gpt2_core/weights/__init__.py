"""Weights in their canonical form, and the file formats that need no framework."""

from gpt2_core.weights.canonical import Weights
from gpt2_core.weights.safetensors import read_safetensors, write_safetensors

__all__ = ["Weights", "read_safetensors", "write_safetensors"]
