"""How programs are compiled where many small ones are compared in float64."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
    """Most of XLA's optimisations off: a tiny program takes half the time to compile, and runs no slower. What the
    optimisations change is rounding, and float64 leaves room for that."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
