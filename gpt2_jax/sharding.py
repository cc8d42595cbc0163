"""How arrays lie on the mesh: logical axis names, and the one table that maps them to mesh axes."""

import jax
import numpy as np
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
}

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
