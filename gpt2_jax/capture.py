"""Capturing intermediate values of a computation, and their gradients, inside the functions that train.

The model names its intermediate values by `tap`. Normally that returns the value unchanged; inside `tapping` a function
is called with each name and value, and its result replaces the value. `record` and `perturb` are two such functions. A
value has the name of the parameters that computed it, where there are any ("h.0.mlp.c_fc").
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar

import jax

Tap = Callable[[str, jax.Array], jax.Array]

_tap: ContextVar[Tap | None] = ContextVar("tap", default=None)
_scope: ContextVar[str] = ContextVar("scope", default="")


def tap(name: str, value: jax.Array) -> jax.Array:
    """`value`, passed to the function of the surrounding `tapping`, if there is one."""
    function = _tap.get()
    return value if function is None else function(_scope.get() + name, value)


def is_tapping() -> bool:
    return _tap.get() is not None


@contextlib.contextmanager
def tapping(function: Tap) -> Iterator[None]:
    """While tracing or running inside, `function` is called with every tapped value."""
    token = _tap.set(function)
    try:
        yield
    finally:
        _tap.reset(token)


@contextlib.contextmanager
def scope(prefix: str) -> Iterator[None]:
    """Names tapped inside begin with `prefix`."""
    token = _scope.set(_scope.get() + prefix)
    try:
        yield
    finally:
        _scope.reset(token)


def record(into: dict[str, jax.Array]) -> Tap:
    """Keep every value in `into`, in order of computation."""

    def keep(name: str, value: jax.Array) -> jax.Array:
        into[name] = value
        return value

    return keep


def perturb(by: Mapping[str, jax.Array]) -> Tap:
    """Add to every value its entry of `by`: at zero, the gradient with respect to `by` is that of the values."""
    return lambda name, value: value + by[name]
