"""How arrays lie on the mesh: logical axis names, and the one table that maps them to mesh axes."""

import math

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt2_core.config import MESH_AXES

# Parameters and activations name their axes by what they mean; this table says which mesh axis splits them.
# `fsdp` splits every parameter and its optimizer state along the embedding, and the batch beside `data`; `tensor`
# splits attention by heads, the MLP by width and the embedding by rows of the vocabulary.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "positions": None,
    "qkv": None,
    # Biases have no embedding axis that fsdp could split, so it splits them along the one they have.
    "heads_bias": ("tensor", "fsdp"),
    "mlp_bias": ("tensor", "fsdp"),
}

# What an axis of a parameter is while a layer computes with it: made whole along what fsdp splits (Rajbhandari et al.
# 2020, "ZeRO", stage 3), still split along what `tensor` splits.
_GATHERED: dict[str | None, str | None] = {"embed": None, "heads_bias": "heads", "mlp_bias": "mlp"}

Axes = tuple[str | None, ...]


def make_mesh(sizes: dict[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of the first devices, with the axes `data`, `fsdp` and `tensor`."""
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    chosen = np.array((devices or jax.devices())[: int(np.prod(shape))]).reshape(shape)
    return Mesh(chosen, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(axes: Axes) -> PartitionSpec:
    """The partition that RULES gives an array with these logical axes; an unknown name is an error."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def sharding(mesh: Mesh, axes: Axes) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Say how an activation lies on the mesh of the surrounding `jax.set_mesh`; without a mesh, nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def ways(axis: str | None) -> int:
    """In how many parts the surrounding mesh splits a logical axis; without a mesh, one."""
    sizes = jax.sharding.get_abstract_mesh().shape
    names = None if axis is None else RULES[axis]
    return math.prod(sizes.get(name, 1) for name in ((names,) if isinstance(names, str) else names or ()))


def gather(parameter: nnx.Param) -> jax.Array:
    """A parameter as a layer computes with it, whole along the axis that fsdp splits.

    Said outright, because the partitioner left to itself also tries to split activations along the embedding.
    """
    axes = parameter.get_metadata()["logical_axes"]
    return constrain(parameter[...], *(_GATHERED.get(axis, axis) for axis in axes))
