"""Sharding: logical axis names, one table that maps them to mesh axes, and the collectives between devices.

A step computes inside `per_shard`: there `data` and `fsdp` are manual axes, a device has its own shard of the batch,
and all collectives over these axes are in this file. `tensor` is left to XLA's partitioner.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt2_jax.mesh import MESH_AXES

# Parameters and activations have logical axis names; this table maps each to the mesh axes that shard it.
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

# Divides every table: its rows are padded to a multiple of 128 (VOCABULARY_MULTIPLE).
TABLE_PIECES = 8


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
    """Constrain the sharding of an activation on the surrounding mesh; without a mesh, and for the manual axes inside
    `per_shard`, this does nothing.

    An axis that isn't divisible by its number of shards is left whole: generation has a batch of one, and XLA's
    partitioner, which would pad it, ends a float64 process (jax 0.10.2: "Check failed:
    ShapeUtil::IsScalarWithElementType").
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = [tuple(n for n in _mesh_axes(axis) if n in mesh.auto_axes) for axis in axes]
    divides = [size % math.prod(mesh.shape[n] for n in found) == 0 for size, found in zip(x.shape, names, strict=True)]
    names = [found if even else () for found, even in zip(names, divides, strict=True)]
    if mesh.empty or not any(names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(found or None for found in names)))


def is_tensor_parallel() -> bool:
    """Whether the surrounding mesh splits layers over `tensor`."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1


def per_shard(function: Callable[..., Any], mesh: Mesh, in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """`function` on each shard of the batch separately: `shard_map` over `data` and `fsdp`.

    `in_axes` and `out_axes` are trees of logical axes, one tuple an array, of what is split inside. On a mesh that
    doesn't use `tensor`, that axis is manual too, and nothing is left to the partitioner.
    """

    def is_axes(tree: Any) -> bool:
        return isinstance(tree, tuple) and all(axis is None or isinstance(axis, str) for axis in tree)

    def specs(tree: Any) -> Any:
        return jax.tree.map(spec, tree, is_leaf=is_axes)

    manual = set(MESH_AXES) if mesh.shape["tensor"] == 1 else {"data", "fsdp"}
    return jax.shard_map(
        function, mesh=mesh, in_specs=specs(in_axes), out_specs=specs(out_axes), axis_names=manual, check_vma=False
    )


def per_head_shard(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays (B, H, ...) on each device's own heads: for kernels that the partitioner can't split."""
    if not is_tensor_parallel():
        return function
    heads = PartitionSpec(None, RULES["heads"])
    return jax.shard_map(function, in_specs=heads, out_specs=heads, axis_names={RULES["heads"]}, check_vma=False)


def gather(
    params: Mapping[str, jax.Array], axes: Mapping[str, Axes], mesh: Mesh, narrow: Collection[str], dtype: Any
) -> dict[str, jax.Array]:
    """All-gather parameters over `fsdp`, outside `per_shard`.

    They stay gathered from the forward to the backward pass, and a device's gradients are whole until they are reduced:
    what is saved is the memory of parameters and optimizer state (PyTorch's FSDP calls it SHARD_GRAD_OP).
    Those in `narrow` are rounded to `dtype` wherever they are used, so they are gathered in it. They are returned in
    their own dtype, so that their gradients have it; XLA removes the pair of conversions.
    """
    if mesh.shape["fsdp"] == 1:
        return dict(params)

    def whole(name: str, x: jax.Array) -> jax.Array:
        sent = x.astype(dtype if name in narrow else x.dtype)
        # The sharding after the conversion is constrained too, or the partitioner would gather before it converts.
        for where in (axes[name], _without_fsdp(axes[name])):
            sent = jax.lax.with_sharding_constraint(sent, NamedSharding(mesh, spec(where)))
        return sent.astype(x.dtype)

    return {name: whole(name, x) for name, x in params.items()}


def batch_is_sharded() -> bool:
    """Whether the surrounding `per_shard` has more than one batch shard."""
    return bool(_batch_axes())


def sum_over_shards(x: jax.Array) -> jax.Array:
    """The sum of a value over batch shards; outside of `per_shard` there is one shard."""
    names = _batch_axes()
    return jax.lax.psum(x, names) if names else x


def exchange(
    grads: Mapping[str, jax.Array], axes: Mapping[str, Axes], dtype: Any, *, last: Collection[str] = ()
) -> dict[str, jax.Array]:
    """Gradients summed over all batch shards, sharded as `exchanged_axes` says.

    They are sent as `dtype` (None: their own): reduce-scattered over `fsdp`, all-reduced over `data`. Those named in
    `last` are exchanged after the tables of the vocabulary, which are the largest and are sent in pieces.
    """
    if not batch_is_sharded():
        return dict(grads)
    tables = {name: _in_pieces(grads[name]) for name in grads if "vocab" in axes[name]}
    summed_tables = {name: [_summed(piece, axes[name], dtype) for piece in pieces] for name, pieces in tables.items()}
    summed_tables, held = jax.lax.optimization_barrier((summed_tables, {name: grads[name] for name in last}))
    summed = {name: jnp.concatenate(pieces) for name, pieces in summed_tables.items()}
    return {
        name: summed[name] if name in summed else _summed(held.get(name, grad), axes[name], dtype)
        for name, grad in grads.items()
    }


def _in_pieces(table_VD: jax.Array) -> list[jax.Array]:
    """A gradient in the pieces that it is exchanged in.

    The table of tied embeddings has its gradient when the backward pass ends, and everything waits for its exchange.
    XLA's scheduler puts one matrix product beside an exchange, however long that takes (jax 0.10.2): in so many pieces
    each takes about as long as a product at GPT-2's four sizes, and products of weights' gradients are left for all
    of them. On a tensor mesh the rows are split already, and a piece would lie on one device.
    """
    return [table_VD] if is_tensor_parallel() else jnp.split(table_VD, TABLE_PIECES)


def _summed(grad: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    names = _batch_axes()
    sent = grad if dtype is None else grad.astype(dtype)
    kept = exchanged_axes(axes, jax.sharding.get_abstract_mesh())
    if "fsdp" in names and any(kept):
        split = next(number for number, axis in enumerate(kept) if axis)
        sent = jax.lax.psum_scatter(sent, "fsdp", scatter_dimension=split, tiled=True)
        names = tuple(n for n in names if n != "fsdp")
    return (jax.lax.psum(sent, names) if names else sent).astype(grad.dtype)


def exchanged_axes(axes: Axes, mesh: Any) -> Axes:
    """The axes of a gradient after `exchange`: sharded over `fsdp` as its parameter is.

    Beside `tensor` it is whole along `fsdp`, because XLA's partitioner makes an array whole along `tensor` before a
    manual reduce-scatter; the gradient is then split outside of `per_shard`.
    """
    if mesh.shape["tensor"] > 1:
        return (None,) * len(axes)
    return tuple(axis if "fsdp" in _mesh_axes(axis) else None for axis in axes)


def _without_fsdp(axes: Axes) -> Axes:
    """The axes of a gathered parameter: still sharded over `tensor`."""
    whole = {"embed": None, "heads_bias": "heads", "mlp_bias": "mlp"}
    return tuple(whole.get(axis, axis) for axis in axes)


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    names = None if axis is None else RULES[axis]
    return (names,) if isinstance(names, str) else names or ()


def _batch_axes() -> tuple[str, ...]:
    """The manual mesh axes of the surrounding `per_shard` that split the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in _mesh_axes("batch") if name in mesh.manual_axes and mesh.shape[name] > 1)
