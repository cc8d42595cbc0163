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


def _backward(spec, operands, g):
    x, y = operands
    inputs, out = spec.split("->")
    of_x, of_y = inputs.split(",")
    g = g.astype(x.dtype)
    return jnp.einsum(f"{out},{of_y}->{of_x}", g, y), jnp.einsum(f"{out},{of_x}->{of_y}", g, x)


einsum_f32.defvjp(_forward, _backward)
