"""The layers GPT-2 is made of, as NNX modules whose parameters bear GPT-2's own names and their logical axes.

Shapes: D features. Parameters are kept in `param_dtype`; a layer computes in the dtype of its input, a layer norm in
float32 at least, leaving it in `dtype`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_jax.sharding import constrain, gather, ways

# Which axis of a bias goes with which output axis of a weight.
_BIAS_AXIS = {"embed": "embed", "heads": "heads_bias", "mlp": "mlp_bias", None: None}


class Linear(nnx.Module):
    """x W + b. `shape` is (in, out) or, for several projections side by side, (in, n, out)."""

    def __init__(self, shape, axes, *, std: float, bias: bool, param_dtype, rngs: nnx.Rngs) -> None:
        weight = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.weight = nnx.Param(weight.astype(param_dtype), logical_axes=axes)
        bias_axes = (*axes[1:-1], _BIAS_AXIS[axes[-1]])
        self.bias = nnx.Param(jnp.zeros(shape[1:], param_dtype), logical_axes=bias_axes) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        # Leading axes are flattened: XLA's CPU matrix products are three times slower on three axes than on two.
        flat = x.reshape(-1, x.shape[-1])
        weight = gather(self.weight).astype(x.dtype)
        # So are those of the weight, or its gradient comes out transposed, at twice the price; but not where the mesh
        # splits the last of them, which flattening would have to undo.
        shape = weight.shape[1:]
        if ways(self.weight.get_metadata()["logical_axes"][-1]) == 1:
            weight = weight.reshape(weight.shape[0], -1)
        out = jax.lax.dot_general(flat, weight, (((1,), (0,)), ((), ()))).reshape(-1, *shape)
        if self.bias is not None:
            out = out + gather(self.bias).astype(x.dtype)
        return out.reshape(*x.shape[:-1], *shape)


class LayerNorm(nnx.Module):
    """Layer norm (Ba et al. 2016) with the variance taken from the centred values.

    Flax's own computes it as E[x^2] - E[x]^2, which at a mean of 30 loses 29 times PyTorch's accuracy.
    """

    def __init__(self, size: int, *, epsilon: float, bias: bool, dtype, param_dtype) -> None:
        self.weight = nnx.Param(jnp.ones(size, param_dtype), logical_axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(size, param_dtype), logical_axes=("embed",)) if bias else None
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        out = centred * jax.lax.rsqrt(variance + self.epsilon) * gather(self.weight)
        if self.bias is not None:
            out = out + gather(self.bias)
        return out.astype(self.dtype)


class RMSNorm(nnx.Module):
    """RMS norm (Zhang & Sennrich 2019): no centring, no bias. `axis` is the logical axis of its weight."""

    def __init__(self, size: int, *, epsilon: float, axis: str | None, dtype, param_dtype) -> None:
        self.weight = nnx.Param(jnp.ones(size, param_dtype), logical_axes=(axis,))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.square(x).mean(axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + self.epsilon) * gather(self.weight)).astype(self.dtype)


class Embedding(nnx.Module):
    """A table of vectors, for `look_up`; rows from `used` on are zero and never looked up (see model.py)."""

    def __init__(self, rows: int, size: int, axes, *, used: int, std: float, param_dtype, rngs: nnx.Rngs) -> None:
        table = std * jax.random.normal(rngs.params(), (used, size), jnp.float32)
        table = jnp.pad(table, ((0, rows - used), (0, 0)))
        self.weight = nnx.Param(table.astype(param_dtype), logical_axes=axes)

    def table(self) -> jax.Array:
        """The table, (rows, D)."""
        return gather(self.weight)

    def spread(self) -> jax.Array:
        """The table once for each way in which the mesh splits the batch, (S, rows, D): no device holds another's.

        A gradient by it is each way's own, which all that uses the table adds to, before the ways are summed: devices
        exchange one gradient for the token embeddings and the head that are tied to them, and not two.
        """
        table = self.table()
        rows, _ = self.weight.get_metadata()["logical_axes"]
        return constrain(jnp.broadcast_to(table, (ways("batch"), *table.shape)), "batch", rows, None)


def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows (..., D) of a table (rows, D) at the ids.

    Of a table that is spread, (S, rows, D), at ids (B, T): for each way, those of its own sequences.
    """
    if table.ndim == 2:
        return jnp.take(table, ids, axis=0)
    ids_SbT = constrain(ids.reshape(len(table), -1, ids.shape[-1]), "batch", None, None)
    rows_SbTD = jax.vmap(look_up)(table, ids_SbT)
    return constrain(rows_SbTD, "batch", None, None, None).reshape(*ids.shape, -1)
