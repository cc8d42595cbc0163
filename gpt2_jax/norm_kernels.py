"""Layer norm fused with the addition before it, as two Triton kernels for NVIDIA GPUs.

A training step is bound by memory where it isn't by matrix products, and passes over the residual stream are most of
that. XLA takes about twice the reads and writes of these kernels: it adds, normalizes, differentiates, sums over rows
and narrows in kernels of their own.

Shapes: M rows (batch x time), D features, P the power of two that D is padded to inside a kernel, G programs of the
backward kernel, each with its share of the rows.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_core.errors import UserError
from gpt2_jax.runtime import why_not_ampere

NormKernel = Literal["triton", "xla"]

# Programs of the backward kernel: some 8 for each multiprocessor of an H100. Each writes its own sums over rows.
BACKWARD_PROGRAMS = 1024

# Tests run the kernels without a GPU.
INTERPRET = False


def choose_norm_kernel(requested: str, *, precision: str, norm: str) -> NormKernel:
    """The kernel that `--norm_kernel` means here; raises UserError if the one asked for can't do the work."""
    reason = _why_not_triton(precision, norm)
    if requested == "auto":
        return "xla" if reason else "triton"
    if requested == "triton" and reason:
        raise UserError(f"--norm_kernel triton: {reason}; use --norm_kernel xla or auto")
    return requested


def _why_not_triton(precision: str, norm: str) -> str | None:
    if (reason := why_not_ampere()) is not None:
        return reason
    if precision == "float64":
        return "computes in float32, not float64"
    if norm != "layernorm":
        return f"computes layer norms, and model.norm is {norm}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def add_layer_norm(
    x: jax.Array, branch: jax.Array | None, w_D: jax.Array, b_D: jax.Array | None, epsilon: float, dtype
) -> tuple[jax.Array, jax.Array]:
    """x + branch in x's dtype, and its layer norm (Ba et al. 2016) in `dtype`, both (..., D).

    Computed in float32. Without a branch the sum is x itself.
    """
    return _forward(x, branch, w_D, b_D, epsilon, dtype)[0]


def _forward(x, branch, w_D, b_D, epsilon, dtype):
    D = x.shape[-1]
    x_MD = x.reshape(-1, D)
    M = len(x_MD)
    inputs = [x_MD, *([] if branch is None else [branch.reshape(M, D)]), w_D, *([] if b_D is None else [b_D])]
    shapes = [] if branch is None else [jax.ShapeDtypeStruct((M, D), x.dtype)]
    kernel = functools.partial(
        _forward_kernel, has_branch=branch is not None, has_bias=b_D is not None, D=D, epsilon=epsilon
    )
    *sums, out_MD = pl.pallas_call(
        kernel,
        grid=(M,),
        out_shape=[*shapes, jax.ShapeDtypeStruct((M, D), dtype)],
        compiler_params=plgpu.CompilerParams(num_warps=_warps(D)),
        interpret=INTERPRET,
        name="add_layer_norm",
    )(*inputs)
    sum_ = sums[0].reshape(x.shape) if sums else x
    return (sum_, out_MD.reshape(x.shape)), (sum_, w_D, b_D, None if branch is None else jnp.zeros((), branch.dtype))


def _backward(epsilon, dtype, saved, grads):
    sum_, w_D, b_D, branch = saved
    dsum, dout = grads
    D = sum_.shape[-1]
    flat = [a.reshape(-1, D) for a in (sum_, dsum, dout)]
    M = len(flat[0])
    G = min(BACKWARD_PROGRAMS, M)
    of_rows = jax.ShapeDtypeStruct((G, D), jnp.float32)
    dx_shapes = [jax.ShapeDtypeStruct((M, D), sum_.dtype)]
    if branch is not None and branch.dtype != sum_.dtype:
        dx_shapes.append(jax.ShapeDtypeStruct((M, D), branch.dtype))
    kernel = functools.partial(_backward_kernel, D=D, epsilon=epsilon, rows=math.ceil(M / G))
    *dx, dw_GD, db_GD = pl.pallas_call(
        kernel,
        grid=(G,),
        out_shape=[*dx_shapes, of_rows, of_rows],
        compiler_params=plgpu.CompilerParams(num_warps=_warps(D)),
        interpret=INTERPRET,
        name="add_layer_norm_backward",
    )(*flat, w_D)
    dx = [a.reshape(sum_.shape) for a in dx]
    db_D = None if b_D is None else db_GD.sum(axis=0).astype(b_D.dtype)
    return dx[0], None if branch is None else dx[-1], dw_GD.sum(axis=0).astype(w_D.dtype), db_D


add_layer_norm.defvjp(_forward, _backward)


def _forward_kernel(*refs, has_branch: bool, has_bias: bool, D: int, epsilon: float) -> None:
    """One row."""
    refs = iter(refs)
    x_ref = next(refs)
    branch_ref = next(refs) if has_branch else None
    w_ref = next(refs)
    b_ref = next(refs) if has_bias else None
    sum_ref = next(refs) if has_branch else None
    out_ref = next(refs)
    row, lanes, mask = pl.program_id(0), *_lanes(D)
    x = _load(x_ref.at[row, lanes], mask)
    if has_branch:
        x += _load(branch_ref.at[row, lanes], mask)
        plgpu.store(sum_ref.at[row, lanes], x.astype(sum_ref.dtype), mask=mask)
    normalized, _ = _normalize(x, mask, D, epsilon)
    out = normalized * _load(w_ref.at[lanes], mask)
    if has_bias:
        out += _load(b_ref.at[lanes], mask)
    plgpu.store(out_ref.at[row, lanes], out.astype(out_ref.dtype), mask=mask)


def _backward_kernel(x_ref, dsum_ref, dout_ref, w_ref, *out_refs, D: int, epsilon: float, rows: int) -> None:
    """`rows` rows one after the other, and their sums for the gradients of weight and bias."""
    *dx_refs, dw_ref, db_ref = out_refs
    program, lanes, mask = pl.program_id(0), *_lanes(D)
    w = _load(w_ref.at[lanes], mask)
    begin = program * rows
    end = jnp.minimum(begin + rows, x_ref.shape[0])

    def one(row, sums):
        dw, db = sums
        normalized, scale = _normalize(_load(x_ref.at[row, lanes], mask), mask, D, epsilon)
        dout = _load(dout_ref.at[row, lanes], mask)
        dnormalized = dout * w
        mean = jnp.sum(dnormalized) / D
        projection = jnp.sum(dnormalized * normalized) / D
        dx = scale * (dnormalized - mean - normalized * projection) + _load(dsum_ref.at[row, lanes], mask)
        for dx_ref in dx_refs:
            plgpu.store(dx_ref.at[row, lanes], dx.astype(dx_ref.dtype), mask=mask)
        return dw + dout * normalized, db + dout

    zeros = jnp.zeros(lanes.shape, jnp.float32)
    dw, db = jax.lax.fori_loop(begin, end, one, (zeros, zeros))
    plgpu.store(dw_ref.at[program, lanes], dw, mask=mask)
    plgpu.store(db_ref.at[program, lanes], db, mask=mask)


def _normalize(x, mask, D: int, epsilon: float):
    """x centred and divided by its standard deviation, and one over that. The variance is of the centred values."""
    centred = jnp.where(mask, x - jnp.sum(x) / D, 0.0)
    scale = jax.lax.rsqrt(jnp.sum(centred * centred) / D + epsilon)
    return centred * scale, scale


def _lanes(D: int):
    """Indices of a row padded to a power of two, as Triton wants it, and which of them exist."""
    lanes = jnp.arange(pl.next_power_of_2(D))
    return lanes, lanes < D


def _load(ref, mask):
    return plgpu.load(ref, mask=mask, other=0.0).astype(jnp.float32)


def _warps(D: int) -> int:
    return min(16, max(1, pl.next_power_of_2(D) // 256))
