"""The model as pure functions of a flat dict of parameters: its NNX graph, and the names, shapes and axes of these.

Shapes: B batch, H heads, S slots of a KV cache, K head size.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_core.config import ModelConfig
from gpt2_jax.model import GPT2, Execution, LayerCache
from gpt2_jax.sharding import Axes

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Definition:
    """A model without its parameters: the NNX graph, split off once, and what the parameters look like.

    Parameters are a flat dict by canonical name ("h.0.attn.c_attn.weight"); their shapes are this package's own
    (gpt2_jax.weights says where they differ from the canonical ones).
    """

    config: ModelConfig
    execution: Execution
    graph: nnx.GraphDef
    abstract: Mapping[str, jax.ShapeDtypeStruct]
    logical_axes: Mapping[str, Axes]
    narrow: frozenset[str]
    """Names of the parameters that are rounded to the compute dtype wherever they are used."""

    def merge(self, params: Mapping[str, jax.Array]) -> GPT2:
        """The model with these parameters; free inside a traced function."""
        flat = [(_path(name), value) for name, value in params.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def initialize(self, key: jax.Array) -> Params:
        """Random parameters: the same for a key on any mesh and in any precision."""
        _, state = nnx.split(GPT2(self.config, self.execution, nnx.Rngs(params=key)))
        return {_name(path): variable[...] for path, variable in nnx.to_flat_state(state)}

    def empty_caches(self, batch: int, slots: int) -> list[LayerCache]:
        """The KV cache of each layer, with zeros in all slots: keys and values (B, H, S, K)."""
        shape = (batch, self.config.n_head, slots, self.config.head_size)
        dtype = jnp.dtype(self.execution.dtype)
        return [LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(self.config.n_layer)]


def define(config: ModelConfig, execution: Execution) -> Definition:
    """Build the graph of a model without computing anything."""
    model = nnx.eval_shape(lambda: GPT2(config, execution, nnx.Rngs(params=0)))
    graph, state = nnx.split(model)
    variables = {_name(path): variable for path, variable in nnx.to_flat_state(state)}
    return Definition(
        config,
        execution,
        graph,
        {name: variable.get_value() for name, variable in variables.items()},
        {name: variable.get_metadata()["logical_axes"] for name, variable in variables.items()},
        frozenset(name for name, variable in variables.items() if variable.get_metadata().get("narrow")),
    )


def _name(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
