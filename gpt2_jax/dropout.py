"""Dropout as a function of a key: masks are drawn packed, eight elements a byte, and kept so for the backward pass.

Shapes: N elements of the last axis, P bytes that hold them.
"""

import functools
import math

import jax
import jax.numpy as jnp

from gpt2_jax.capture import tap


def dropout_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Which elements of (..., N) are kept, each with probability 1 - rate: the bits of an array of bytes (..., P).

    The mask is a function of key, shape and rate alone, the same in every precision and on every mesh. An element takes
    16 random bits, half of what Threefry gives for one counter, so that `rate` is met to within 2**-17.
    """
    P = math.ceil(shape[-1] / 8)
    # The words on an axis of their own: each byte is then a function of the four words at its index, in one fused loop.
    words_4xP = jax.random.bits(key, (4, *shape[:-1], P), jnp.uint32)
    dropped_below = jnp.uint32(round(rate * 2**16))
    halves = [half for word in words_4xP for half in (word & 0xFFFF, word >> 16)]
    bits = [(half >= dropped_below).astype(jnp.uint8) << place for place, half in enumerate(halves)]
    return functools.reduce(jnp.bitwise_or, bits)


def unpack(packed: jax.Array, N: int) -> jax.Array:
    """The mask (..., N) of its bytes (..., P), bool."""
    bytes_of_elements = jnp.repeat(packed, 8, axis=-1)[..., :N]
    return (bytes_of_elements >> (jnp.arange(N, dtype=jnp.uint32) % 8).astype(jnp.uint8)) & 1 == 1


def scale(rate: float) -> float:
    """What kept elements are divided by, so that the expected value stays (Srivastava et al. 2014, section 10)."""
    return 1.0 - rate


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def drop(x: jax.Array, packed: jax.Array, rate: float) -> jax.Array:
    """`x` where the mask keeps it, scaled, and zero elsewhere. The backward pass is the same function."""
    return jnp.where(unpack(packed, x.shape[-1]), x / scale(rate), 0.0)


def _drop_backward(rate: float, packed: jax.Array, g: jax.Array):
    # Without the barrier XLA keeps the unpacked mask of the forward pass, eight times as large.
    return drop(g, *jax.lax.optimization_barrier((packed,)), rate), None


drop.defvjp(lambda x, packed, rate: (drop(x, packed, rate), packed), _drop_backward)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """`x` with elements dropped and the rest scaled by 1 / (1 - rate); without a key or a rate, `x` itself."""
    if key is None or rate == 0.0:
        return x
    packed = dropout_mask(key, x.shape, rate)
    tap("dropout_mask", unpack(packed, x.shape[-1]))
    return drop(x, packed, rate)


def site(key: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """The key of one of several places that drop out under `key`."""
    return None if key is None else jax.random.fold_in(key, number)
