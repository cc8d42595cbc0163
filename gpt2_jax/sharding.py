"""How arrays lie on the mesh: logical axis names, the one table that maps them to mesh axes, and what devices exchange.

A step computes inside `per_shard`: there `data` and `fsdp` are manual axes, each device sees its own share of the batch,
and what is exchanged over them stands in this file, no more and no less. `tensor` stays with the partitioner.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

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
    # Biases have no embedding axis that fsdp could split, so it splits them along the one they have.
    "heads_bias": ("tensor", "fsdp"),
    "mlp_bias": ("tensor", "fsdp"),
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


def num_shards(mesh: Mesh, axis: str) -> int:
    """In how many shards a mesh splits a logical axis."""
    return math.prod(mesh.shape[name] for name in _mesh_axes(axis))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Say how an activation lies on the surrounding mesh, as far as the partitioner decides it; without a mesh, nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    names = [tuple(n for n in _mesh_axes(axis) if n in mesh.auto_axes) for axis in axes]
    if mesh.empty or not any(names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(found or None for found in names)))


def per_shard(function: Callable[..., Any], mesh: Mesh, in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """`function` on each shard of the batch by itself: `shard_map` over `data` and `fsdp`.

    `in_axes` and `out_axes` are trees of logical axes, one tuple an array. On a mesh that doesn't use `tensor`, that
    axis is manual too, and nothing is left to the partitioner.
    """

    def is_axes(tree: Any) -> bool:
        return isinstance(tree, tuple) and all(axis is None or isinstance(axis, str) for axis in tree)

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda axes: _manual_spec(axes, mesh), tree, is_leaf=is_axes)

    manual = set(MESH_AXES) if mesh.shape["tensor"] == 1 else {"data", "fsdp"}
    return jax.shard_map(
        function, mesh=mesh, in_specs=specs(in_axes), out_specs=specs(out_axes), axis_names=manual, check_vma=False
    )


def sum_over_shards(x: jax.Array) -> jax.Array:
    """The sum of each batch shard's own value; outside of `per_shard` there is one shard."""
    names = _exchanging("batch")
    return jax.lax.psum(x, names) if names else x


def is_exchanging() -> bool:
    """Whether there is more than one batch shard around."""
    return bool(_exchanging("batch"))


def gather(
    params: Mapping[str, jax.Array], axes: Mapping[str, Axes], narrow: Collection[str], dtype: Any
) -> dict[str, jax.Array]:
    """Parameters made whole along what `fsdp` splits (Rajbhandari et al. 2020, "ZeRO", stage 3).

    Those in `narrow` are rounded to `dtype` wherever they are used, so they travel in it. They come back in their own
    dtype, so that their gradients have it; XLA removes the conversion there and back.
    """

    def whole(name: str, x: jax.Array) -> jax.Array:
        split = _split_axis(axes[name])
        if split is None:
            return x
        sent = x.astype(dtype if name in narrow else x.dtype)
        return jax.lax.all_gather(sent, "fsdp", axis=split, tiled=True).astype(x.dtype)

    return {name: whole(name, x) for name, x in params.items()}


def exchange(grads: Mapping[str, jax.Array], axes: Mapping[str, Axes], dtype: Any) -> dict[str, jax.Array]:
    """Gradients summed over all batch shards, each device keeping its share of what `fsdp` splits.

    They travel as `dtype` (None: as they are): reduce-scattered over `fsdp`, all-reduced over `data`.
    """

    def summed(name: str, grad: jax.Array) -> jax.Array:
        names = _exchanging("batch")
        if not names:
            return grad
        sent, split = grad if dtype is None else grad.astype(dtype), _split_axis(axes[name])
        if split is not None:
            sent = jax.lax.psum_scatter(sent, "fsdp", scatter_dimension=split, tiled=True)
            names = tuple(n for n in names if n != "fsdp")
        return (jax.lax.psum(sent, names) if names else sent).astype(grad.dtype)

    return {name: summed(name, grad) for name, grad in grads.items()}


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    names = None if axis is None else RULES[axis]
    return (names,) if isinstance(names, str) else names or ()


def _exchanging(axis: str) -> tuple[str, ...]:
    """The manual mesh axes of the surrounding `per_shard` that split a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in _mesh_axes(axis) if name in mesh.manual_axes and mesh.shape[name] > 1)


def _split_axis(axes: Axes) -> int | None:
    """Which axis of a parameter `fsdp` splits inside the surrounding `per_shard`, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if "fsdp" not in mesh.manual_axes or mesh.shape["fsdp"] == 1:
        return None
    found = [number for number, name in enumerate(_manual_spec(axes, mesh)) if name == "fsdp"]
    return found[0] if found else None


def _manual_spec(axes: Axes, mesh: Any) -> PartitionSpec:
    """The part of a partition that `per_shard` sees.

    An axis that `tensor` splits as well is left to the partitioner, which makes it whole along `fsdp`: only biases
    have one.
    """

    def manual(axis: str | None) -> str | tuple[str, ...] | None:
        names = tuple(name for name in _mesh_axes(axis) if mesh.shape[name] > 1)
        if "tensor" in names:
            return None
        return names[0] if len(names) == 1 else names or None

    return PartitionSpec(*map(manual, axes))
