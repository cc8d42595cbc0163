"""Check `weights`: every way from the canonical form through a framework or a file and back is bitwise."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gpt2_core.errors import UserError
from gpt2_core.weights import Weights
from gpt2_jax.weights import from_canonical
from gpt2_jax.weights import to_canonical as from_jax
from gpt2_torch.weights import build
from gpt2_torch.weights import to_canonical as from_torch
from parity.formats import FORMATS, open_weights, write_weights
from parity.suite import Result, Skipped, Subject

LIMIT = 0.0  # bytes: a conversion moves numbers, it never computes


def check(subject: Subject) -> Iterator[Result | Skipped]:
    weights = subject.weights
    for name, round_trip in IN_MEMORY.items():
        yield _compare(name, weights, round_trip(weights))
    with tempfile.TemporaryDirectory() as folder:
        able = []
        for form in FORMATS:
            try:
                write_weights(weights, _path(folder, form), form)
                able.append(form)
            except UserError as error:
                yield Skipped("weights", f"{form}: {error}")
        for form in able:
            yield _compare(f"{form} file", weights, _open(folder, form))
        # Through any two: each format writes what every other has read.
        for first in able if subject.level != "quick" else ():
            yield _through(folder, first, able, weights)


def _through(folder: str, first: str, formats: list[str], weights: Weights) -> Result:
    """Weights that have been a file of the format `first`, through each of the others."""
    differing, where = 0.0, ""
    for second in formats:
        with tempfile.TemporaryDirectory() as again:
            write_weights(_open(folder, first), _path(again, second), second)
            found = _compare(second, weights, _open(again, second))
        differing += found.measured
        where = where or (f"{second}: {found.where}" if found.measured else "")
    return Result("weights", f"{first} file, then each of {', '.join(formats)}", differing, LIMIT, where)


def _path(folder: str, form: str) -> Path:
    return Path(folder) / f"{form}.safetensors"


def _open(folder: str, form: str) -> Weights:
    return open_weights(_path(folder, form))


def _compare(name: str, weights: Weights, back: Weights) -> Result:
    differing = {n: _differing_bytes(weights.arrays[n], back.arrays[n]) for n in back.arrays}
    first = next((n for n, count in differing.items() if count), "")
    return Result("weights", name, float(sum(differing.values())), LIMIT, first)


def _differing_bytes(a: np.ndarray, b: np.ndarray) -> int:
    if a.dtype != b.dtype or a.shape != b.shape:
        return max(a.nbytes, b.nbytes)
    return int((np.frombuffer(a.tobytes(), np.uint8) != np.frombuffer(b.tobytes(), np.uint8)).sum())


def _jax(weights: Weights) -> Weights:
    dtype = weights.arrays["wte.weight"].dtype
    return from_jax(from_canonical(weights, dtype), weights.config, "jax", weights.tokenizer)


def _torch(weights: Weights) -> Weights:
    return from_torch(build(weights).state_dict(), weights.config, "torch", weights.tokenizer)


IN_MEMORY: dict[str, Callable[[Weights], Weights]] = {"JAX parameters": _jax, "PyTorch state dict": _torch}
