"""The layers of GPT-2 as NNX modules, whose parameters have GPT-2's own names and logical axes.

Shapes: M rows (batch x time), D features, N projections, I and O features in and out. Parameters are kept in
`param_dtype`; a layer computes in the dtype of its input, a layer norm in float32 at least, leaving it in `dtype`.
Gradients of parameters are made in the parameters' dtype: none is summed in bfloat16.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_jax.norm_kernels import NormKernel, add_layer_norm
from gpt2_jax.sharding import is_tensor_parallel

# Which axis of a bias goes with which output axis of a weight.
_BIAS_AXIS = {"embed": "embed", "heads": "heads_bias", "mlp": "mlp_bias", None: None}


def rounded_once(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function` of arrays of one dtype; for narrow ones it is computed in float32 and its result rounded, as PyTorch
    does. By default XLA rounds after each operation on CPU; on a GPU it fuses them, some into a product's epilogue,
    which it knows only in the narrow dtype."""

    def widened(*arrays: jax.Array) -> jax.Array:
        return function(*(x.astype(jnp.float32) for x in arrays)).astype(arrays[0].dtype)

    def apply(*arrays: jax.Array) -> jax.Array:
        if arrays[0].dtype != jnp.bfloat16:
            return function(*arrays)
        return jax.lax.platform_dependent(*arrays, cpu=widened, default=function)

    return apply


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> jax.Array:
    """Values of a standard normal distribution, in float32 whatever the parameters' dtype."""
    return jax.random.normal(rngs.params(), shape, jnp.float32)


@rounded_once
def _affine(x_MI: jax.Array, w_IO: jax.Array, b_O: jax.Array) -> jax.Array:
    return x_MI @ w_IO + b_O


class Linear(nnx.Module):
    """x W + b. `shape` is (in, out) or, for n projections of one input, (in, n, out)."""

    def __init__(self, shape, axes, *, std: float, bias: bool, param_dtype, rngs: nnx.Rngs) -> None:
        weight = std * _normal(rngs, shape)
        self.weight = nnx.Param(weight.astype(param_dtype), logical_axes=axes, narrow=True)
        bias_axes = (*axes[1:-1], _BIAS_AXIS[axes[-1]])
        self.bias = nnx.Param(jnp.zeros(shape[1:], param_dtype), logical_axes=bias_axes) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., in) -> (..., out)."""
        bias = None if self.bias is None else self.bias[None]
        return self._project(x, self.weight[:, None], bias)[0]

    def split(self, x: jax.Array) -> list[jax.Array]:
        """x (..., in) -> n arrays (..., out), each from its own matrix product: the result of one product would have
        to be split and the gradients concatenated, a copy each."""
        return self._project(x, self.weight[...], None if self.bias is None else self.bias[...])

    def _project(self, x, weight, bias) -> list[jax.Array]:
        # Leading axes are flattened: XLA's CPU matrix products are three times slower on three axes than on two.
        outs = _project(x.reshape(-1, x.shape[-1]), weight, bias)
        return [out.reshape(*x.shape[:-1], -1) for out in outs]


@jax.custom_vjp
def _project(x_MI: jax.Array, w_INO: jax.Array, b_NO: jax.Array | None) -> list[jax.Array]:
    """The N projections x W + b, in x's dtype."""
    M, (I, N, O) = len(x_MI), w_INO.shape
    # One product whose output is split, or N products, for which a CPU copies parts of the weights: the one that copies
    # less. A tensor mesh shards the axis that flattening would merge.
    if N > 1 and M < I and not is_tensor_parallel():
        out_MP = _product(x_MI, w_INO.reshape(I, N * O), None if b_NO is None else b_NO.reshape(-1))
        return jnp.split(out_MP, N, axis=1)
    return [_product(x_MI, w_INO[:, n], None if b_NO is None else b_NO[n]) for n in range(N)]


def _product(x_MI: jax.Array, w_IO: jax.Array, b_O: jax.Array | None) -> jax.Array:
    if b_O is None:
        return x_MI @ w_IO.astype(x_MI.dtype)
    return _affine(x_MI, w_IO.astype(x_MI.dtype), b_O.astype(x_MI.dtype))


def _project_forward(x_MI, w_INO, b_NO):
    return _project(x_MI, w_INO, b_NO), (x_MI, w_INO, b_NO)


def _project_backward(saved, douts):
    """dx = sum of dout W^T, added up in the weights' dtype and rounded once; dW = x^T dout and db = sum of dout, in the
    weights' dtype."""
    x_MI, w_INO, b_NO = saved
    w_narrow_INO = w_INO.astype(x_MI.dtype)
    if is_tensor_parallel():
        # One product, because devices then exchange one sum.
        dx_MI = jnp.einsum("mno,ino->mi", jnp.stack(douts, axis=1), w_narrow_INO)
    else:
        wide = w_INO.dtype if len(douts) > 1 else x_MI.dtype
        products = [
            jax.lax.dot_general(dout_MO, w_narrow_INO[:, n], (((1,), (1,)), ((), ())), preferred_element_type=wide)
            for n, dout_MO in enumerate(douts)
        ]
        # A product plus a sum, in this order: XLA has cuBLAS add each sum to the next product.
        dx_MI = functools.reduce(lambda total_MI, product_MI: product_MI + total_MI, products)
    dw_INO = jnp.stack(
        [
            jax.lax.dot_general(x_MI, dout_MO, (((0,), (0,)), ((), ())), preferred_element_type=w_INO.dtype)
            for dout_MO in douts
        ],
        axis=1,
    )
    db_NO = None if b_NO is None else jnp.stack([jnp.sum(dout_MO.astype(b_NO.dtype), axis=0) for dout_MO in douts])
    return dx_MI.astype(x_MI.dtype), dw_INO, db_NO


_project.defvjp(_project_forward, _project_backward)


class LayerNorm(nnx.Module):
    """Layer norm (Ba et al. 2016) with the variance taken from the centred values.

    Flax's own computes it as E[x^2] - E[x]^2, which at a mean of 30 loses 29 times PyTorch's accuracy.
    """

    def __init__(self, size: int, *, epsilon: float, bias: bool, dtype, param_dtype, kernel: NormKernel) -> None:
        self.weight = nnx.Param(jnp.ones(size, param_dtype), logical_axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(size, param_dtype), logical_axes=("embed",)) if bias else None
        self.epsilon, self.dtype, self.kernel = epsilon, dtype, kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        return _layer_norm(x, self.weight[...], bias, self.epsilon, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x: jax.Array, w_D: jax.Array, b_D: jax.Array | None, epsilon: float, dtype) -> jax.Array:
    normalized, _ = _normalize(x, epsilon)
    out = normalized * w_D
    return (out if b_D is None else out + b_D).astype(dtype)


def _layer_norm_forward(x, w_D, b_D, epsilon, dtype):
    return _layer_norm(x, w_D, b_D, epsilon, dtype), (x, w_D, b_D)


def _layer_norm_backward(epsilon, dtype, saved, dout):
    # A barrier, or XLA would see the forward pass's computation here and keep its float32 values for it.
    x, w_D, b_D = jax.lax.optimization_barrier(saved)
    normalized, scale = _normalize(x, epsilon)
    dout = dout.astype(normalized.dtype)
    dnormalized = dout * w_D
    dx = dnormalized - dnormalized.mean(axis=-1, keepdims=True)
    dx = scale * (dx - normalized * (dnormalized * normalized).mean(axis=-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    db_D = None if b_D is None else dout.sum(axis=rows).astype(b_D.dtype)
    return dx.astype(x.dtype), (dout * normalized).sum(axis=rows).astype(w_D.dtype), db_D


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _normalize(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """x centred and divided by its standard deviation, and one over that, in float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    return centred * scale, scale


class RMSNorm(nnx.Module):
    """RMS norm (Zhang & Sennrich 2019): no centring, no bias. `axis` is the logical axis of its weight."""

    def __init__(self, size: int, *, epsilon: float, axis: str | None, dtype, param_dtype) -> None:
        self.weight = nnx.Param(jnp.ones(size, param_dtype), logical_axes=(axis,))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.square(x).mean(axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + self.epsilon) * self.weight[...]).astype(self.dtype)


def add_norm(norm: LayerNorm | RMSNorm, x: jax.Array, branch: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """x + branch, and its norm; without a branch the sum is x itself. One pass over memory where there is a kernel."""
    if isinstance(norm, LayerNorm) and norm.kernel == "triton":
        bias = None if norm.bias is None else norm.bias[...]
        return add_layer_norm(x, branch, norm.weight[...], bias, norm.epsilon, norm.dtype)
    x = x if branch is None else x + branch
    return x, norm(x)


class Embedding(nnx.Module):
    """A table of vectors, called with ids; rows from `used` on are zero and never looked up (see model.py).

    `narrow`: the table is used in matrix products only, and never looked up.
    """

    def __init__(
        self, rows: int, size: int, axes, *, used: int, std: float, param_dtype, rngs: nnx.Rngs, narrow: bool = False
    ) -> None:
        table = std * _normal(rngs, (used, size))
        table = jnp.pad(table, ((0, rows - used), (0, 0)))
        self.weight = nnx.Param(table.astype(param_dtype), logical_axes=axes, narrow=narrow)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """The rows (..., D) at the ids."""
        return jnp.take(self.weight[...], ids, axis=0)
