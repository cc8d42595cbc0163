"""How programs are compiled where many small ones are compared in float64."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any
from unittest import mock

import jax
from jax._src import compiler

# Together they halve the time that a tiny program takes to compile: XLA's older code generator for CPUs, which jaxlib
# 0.11 no longer has, and one piece of code instead of several, each of which costs a few milliseconds.
OPTIONS = MappingProxyType({"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1})


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
    """Most of XLA's optimisations off, and its quickest code generator: a tiny program takes a quarter of the time to
    compile, and runs no slower. What they change is rounding, and float64 leaves room for that."""
    before = jax.config.values["jax_disable_most_optimizations"]
    right, options = compiler.get_compile_options, known(OPTIONS)

    def made(*sizes, env_options_overrides=None, **others):
        return right(*sizes, env_options_overrides=options | (env_options_overrides or {}), **others)

    jax.config.update("jax_disable_most_optimizations", True)
    try:
        # JAX takes options for one function at a time; here it puts together those of all (0.10.2 and 0.11.2).
        with mock.patch.object(compiler, "get_compile_options", made):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def known(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of XLA's options that the installed version has. They come and go; one that is gone costs time here, and
    changes no result."""
    return {name: value for name, value in options.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
