"""Weights in their canonical form, the layouts of both trainers, and safetensors files."""

from gpt2_core.weights.canonical import DTYPES, LazyArrays, LazyTensor, Weights

__all__ = ["DTYPES", "LazyArrays", "LazyTensor", "Weights"]
