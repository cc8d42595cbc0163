"""Dropout as a function of keys, one for each sequence: the same masks on any mesh, wherever a sequence is computed.

Masks are packed, eight elements a byte, so that the backward pass can have them without drawing them again. Shapes: B
sequences, N elements of the last axis, P bytes that hold them.
"""

import functools
import math

import jax
import jax.numpy as jnp

from gpt2_jax.capture import tap


def dropout_mask(keys_B: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Which elements of an array (B, ..., N) are kept, each with probability 1 - rate: uint8 (B, ..., P).

    A sequence's mask is a function of its key, its shape and the rate, in every precision. An element has 16 random
    bits, of the 32 that Threefry gives for a counter, so that its rate is `rate` to within 2**-17.
    """
    B, *inner, N = shape
    P = math.ceil(N / 8)
    # Four words are the bits of a byte. Their axis is not the last: XLA then makes each byte in registers, in one loop.
    words_B4xP = jax.vmap(lambda key: jax.random.bits(key, (4, *inner, P), jnp.uint32))(keys_B)
    dropped_below = jnp.uint32(round(rate * 2**16))
    words = [words_B4xP[:, number] for number in range(4)]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    bits = [(half >= dropped_below).astype(jnp.uint8) << bit for bit, half in enumerate(halves)]
    return functools.reduce(jnp.bitwise_or, bits)


def unpack(mask: jax.Array, N: int) -> jax.Array:
    """The elements (..., N) of a packed mask (..., P), bool."""
    place_N = (jnp.arange(N) % 8).astype(jnp.uint8)
    return (jnp.repeat(mask, 8, axis=-1)[..., :N] >> place_N) & 1 == 1


def keep_probability(rate: float) -> float:
    """What kept elements are divided by, so that the expected value stays (Srivastava et al. 2014, section 10)."""
    return 1.0 - rate


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def drop(x: jax.Array, mask: jax.Array, rate: float) -> jax.Array:
    """`x` (..., N) scaled where its packed mask keeps it, and zero elsewhere."""
    return jnp.where(unpack(mask, x.shape[-1]), x / keep_probability(rate), 0.0)


def _drop_backward(rate: float, mask: jax.Array, g: jax.Array):
    # The barrier keeps XLA from storing the unpacked mask of the forward pass, eight times as large.
    return drop(g, jax.lax.optimization_barrier(mask), rate), None


drop.defvjp(lambda x, mask, rate: (drop(x, mask, rate), mask), _drop_backward)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """`x` (B, ..., N) with elements dropped and the rest scaled by 1 / (1 - rate); without keys or rate, `x` itself."""
    if keys_B is None or rate == 0.0:
        return x
    mask = dropout_mask(keys_B, x.shape, rate)
    tap("dropout_mask", unpack(mask, x.shape[-1]))
    return drop(x, mask, rate)


def site(keys_B: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """The keys of one of several layers or sites that drop out under `keys_B`."""
    return None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)
