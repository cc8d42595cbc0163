"""Einsum that accumulates and returns in float32 at least."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_f32(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`einsum(spec, x, y)` accumulated and returned in float32 at least, for bfloat16 operands too.

    Its gradient is rounded to the operands' dtype before the products of the backward pass, as PyTorch's autocast does.
    With autodiff they would be products of float32 with bfloat16, which don't run on the matrix units.
    """
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _forward(spec, x, y):
    return einsum_f32(spec, x, y), (x, y)


def _backward(spec, operands, dout):
    x, y = operands
    inputs, out_axes = spec.split("->")
    x_axes, y_axes = inputs.split(",")
    dout = dout.astype(x.dtype)
    dx = jnp.einsum(f"{out_axes},{y_axes}->{x_axes}", dout, y)
    dy = jnp.einsum(f"{out_axes},{x_axes}->{y_axes}", dout, x)
    return dx, dy


einsum_f32.defvjp(_forward, _backward)
