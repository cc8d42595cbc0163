"""Check `weights`: every way from the canonical form through a framework or a file and back is bitwise."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gpt2_core.weights import Weights, read_safetensors, write_safetensors
from parity.suite import Result, Subject

LIMIT = 0.0  # bytes: a conversion moves numbers, it never computes


def check(subject: Subject) -> Iterator[Result]:
    for name, round_trip in ROUND_TRIPS.items():
        with tempfile.TemporaryDirectory() as folder:
            back = round_trip(subject.weights, Path(folder))
        differing = {n: _differing_bytes(subject.weights.arrays[n], back.arrays[n]) for n in back.arrays}
        first = next((n for n, count in differing.items() if count), "")
        yield Result("weights", name, float(sum(differing.values())), LIMIT, first)


def _differing_bytes(a: np.ndarray, b: np.ndarray) -> int:
    if a.dtype != b.dtype or a.shape != b.shape:
        return max(a.nbytes, b.nbytes)
    return int((np.frombuffer(a.tobytes(), np.uint8) != np.frombuffer(b.tobytes(), np.uint8)).sum())


def _jax(weights: Weights, folder: Path) -> Weights:
    from gpt2_jax.weights import from_canonical, to_canonical

    dtype = weights.arrays["wte.weight"].dtype
    return to_canonical(from_canonical(weights, dtype), weights.config, "jax", weights.tokenizer)


def _torch(weights: Weights, folder: Path) -> Weights:
    from gpt2_torch.weights import build, to_canonical

    return to_canonical(build(weights).state_dict(), weights.config, "torch", weights.tokenizer)


def _jax_checkpoint(weights: Weights, folder: Path) -> Weights:
    from gpt2_jax.checkpoints import read_weights, write_weights

    return read_weights(write_weights(weights, folder / "0"))


def _torch_checkpoint(weights: Weights, folder: Path) -> Weights:
    from gpt2_torch.checkpoints import read_weights, write_weights

    return read_weights(write_weights(weights, folder / "0"))


def _safetensors(weights: Weights, folder: Path) -> Weights:
    write_safetensors(weights, folder / "model.safetensors")
    return read_safetensors(folder / "model.safetensors")


ROUND_TRIPS: dict[str, Callable[[Weights, Path], Weights]] = {
    "JAX parameters": _jax,
    "PyTorch state dict": _torch,
    "JAX checkpoint": _jax_checkpoint,
    "PyTorch checkpoint": _torch_checkpoint,
    "safetensors file": _safetensors,
}
