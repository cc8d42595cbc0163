"""Dropout as a function of keys, one for each sequence: nothing random is stored, and a mask can be drawn again on any
mesh, wherever its sequence is computed."""

import jax
import jax.numpy as jnp

from gpt2_jax.capture import tap


def dropout_mask(keys_B: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Which elements of an array (B, ...) are kept, each with probability 1 - rate; a sequence's by its own key.

    Drawn in float32 whatever else is float64, so that the masks of a run don't depend on its precision.
    """
    return jax.vmap(lambda key: jax.random.uniform(key, shape[1:], jnp.float32))(keys_B) >= rate


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """`x` (B, ...) with elements dropped and the rest scaled by 1 / (1 - rate); without keys or a rate, `x` itself."""
    if keys_B is None or rate == 0.0:
        return x
    mask = tap("dropout_mask", dropout_mask(keys_B, x.shape, rate))
    return jnp.where(mask, x / (1.0 - rate), 0.0)


def site(keys_B: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """The keys of one of several layers or sites that drop out under `keys_B`."""
    return None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)
