"""The values that the JAX model names as it computes (`gpt2_jax.capture`), and the gradients with respect to them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from gpt2_jax.capture import perturb, record, tapping
from gpt2_jax.definition import Definition
from parity.gpt2.adapters.protocol import Arrays

# LLVM contracts and vectorises a fused loop by what is in it, and a value that is asked for is not fused away: its
# optimisations are off where a forward pass is compared to the bit with and without capture. The program that training
# compiles is compared by its logits, gradients and curves. What only draws random numbers needs none either.
PLAIN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def captured(compute: Callable, *arguments: Any) -> Arrays:
    """Every tapped value of `compute(*arguments)`, in order of computation."""
    names, values_of = _recording(compute)
    values = jax.jit(values_of, compiler_options=PLAIN)(*arguments)
    return {name: np.asarray(values[name]) for name in names}


def abstract_values(compute: Callable, *arguments: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Their shapes and dtypes, without computing them."""
    names, values_of = _recording(compute)
    values = jax.eval_shape(values_of, *arguments)
    return {name: values[name] for name in names}


def _recording(compute: Callable) -> tuple[list[str], Callable]:
    """A function that gives the tapped values of `compute`, and the list that it fills with their names when it is
    traced: JAX sorts the keys of what it returns."""
    names: list[str] = []

    def values_of(*arguments):
        values: dict[str, jax.Array] = {}
        with tapping(record(values)):
            compute(*arguments)
        names[:] = values
        return values

    return names, values_of


class Perturbed:
    """A model's definition whose parameters hold, beside the model's own, a zero for every tapped value, which is added
    to it: what differentiates the loss by the parameters differentiates it by the values."""

    def __init__(self, definition: Definition) -> None:
        self._definition, self.logical_axes = definition, definition.logical_axes

    def merge(self, params) -> SimpleNamespace:
        model = self._definition.merge(params["params"])

        def loss(*batch, **options) -> jax.Array:
            with tapping(perturb(params["zeros"])):
                return model.loss(*batch, **options)

        return SimpleNamespace(loss=loss)
