"""Dropout as a function of a key: nothing random is stored, and a mask can be drawn again anywhere."""

import jax
import jax.numpy as jnp

from gpt2_jax.capture import tap


def dropout_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Which elements are kept, each with probability 1 - rate.

    Drawn in float32 whatever else is float64, so that the masks of a run don't depend on its precision.
    """
    return jax.random.uniform(key, shape, jnp.float32) >= rate


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """`x` with elements dropped and the rest scaled by 1 / (1 - rate); without a key or a rate, `x` itself."""
    if key is None or rate == 0.0:
        return x
    mask = tap("dropout_mask", dropout_mask(key, x.shape, rate))
    return jnp.where(mask, x / (1.0 - rate), 0.0)


def site(key: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """The key of one of several places that drop out under `key`."""
    return None if key is None else jax.random.fold_in(key, number)
