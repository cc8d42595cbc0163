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

    Computed one part of the batch at a time, in the run's precision, by unrolled layers of plain XLA, where every value
    can be seen.
    """
    plain = {"attention": "xla", "scan_layers": False, "remat": False, "norm": "xla"}
    definition = define(program.config.model, dataclasses.replace(program.definition.execution, **plain))
    names: list[str] = []

    @jax.jit
    def are_finite(params: Params, inputs_ABT: jax.Array, targets_ABT: jax.Array, part: int) -> list[jax.Array]:
        values: dict[str, jax.Array] = {}
        with tapping(record(values)):
            values["loss"] = definition.merge(params).loss(inputs_ABT[part], targets_ABT[part])
        names[:] = values
        return [jnp.isfinite(value).all() for value in values.values()]

    parts = program.put_batch(batch)
    for part in range(program.config.accumulation):
        found = are_finite(params, *parts, part)
        if wrong := [name for name, finite in zip(names, found, strict=True) if not finite]:
            return wrong[0]
    return None
