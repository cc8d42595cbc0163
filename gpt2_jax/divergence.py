"""Where a step's forward pass stops being finite."""

import dataclasses

import jax
import jax.numpy as jnp

from gpt2_core.data.batches import Batch
from gpt2_jax.capture import record, tapping
from gpt2_jax.definition import Params, define
from gpt2_jax.train_step import Program


def first_not_finite(program: Program, params: Params, batch: Batch) -> str | None:
    """The name of the first value of the forward pass on `batch`, without dropout, that isn't finite; None if all are.

    Computed in the run's precision, by unrolled layers of plain XLA, where every value can be seen.
    """
    plain = {"attention": "xla", "scan_layers": False, "remat": False, "norm": "xla"}
    definition = define(program.config.model, dataclasses.replace(program.definition.execution, **plain))
    names: list[str] = []

    @jax.jit
    def are_finite(params: Params, inputs_BT: jax.Array, targets_BT: jax.Array) -> list[jax.Array]:
        values: dict[str, jax.Array] = {}
        with tapping(record(values)):
            values["loss"] = definition.merge(params).loss(inputs_BT, targets_BT)
        names[:] = values
        return [jnp.isfinite(value).all() for value in values.values()]

    for inputs_BT, targets_BT in zip(*program.put_batch(batch), strict=True):
        found = are_finite(params, inputs_BT, targets_BT)
        if wrong := [name for name, finite in zip(names, found, strict=True) if not finite]:
            return wrong[0]
    return None
